"""A Ray cluster of several nodes on this machine, in a process of its own: prints its address, then obeys lines on stdin.

`python ray_host.py NODES CORES`. `remove`: the youngest node goes, as if its power did.
`state`: prints where metrics are scraped, and how many placement groups there are.
End of input ends the cluster. Metrics are there a second after they change, where Ray would take ten.
"""

import json
import sys
from typing import Any

import ray
from ray.cluster_utils import Cluster


def main(num_nodes: int, cores: int) -> None:
    settings = {"num_cpus": 0, "include_dashboard": False, "_system_config": {"metrics_report_interval_ms": 1000}}
    cluster = Cluster(initialize_head=True, head_node_args=settings)
    nodes = [cluster.add_node(num_cpus=cores, object_store_memory=100_000_000) for _ in range(num_nodes)]
    print(cluster.address, flush=True)
    for line in sys.stdin:
        if line.strip() == "remove":
            cluster.remove_node(nodes.pop(), allow_graceful=False)
            print("removed", flush=True)
        if line.strip() == "state":
            print(json.dumps(state(cluster.address)), flush=True)
    cluster.shutdown()


def state(address: str) -> dict[str, Any]:
    ray.init(address=address, configure_logging=False, log_to_driver=False)
    try:
        scraped = [f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}" for node in ray.nodes() if node["Alive"]]
        groups = [group for group in ray.util.placement_group_table().values() if group["state"] != "REMOVED"]
        return {"scraped": scraped, "groups": len(groups)}
    finally:
        ray.shutdown()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
