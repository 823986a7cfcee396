"""A Ray cluster of several nodes on this machine, in a process of its own: prints its address, then obeys lines on stdin.

`python ray_host.py NODES CORES`. `remove`: the youngest node goes, as if its power did.
End of input ends the cluster.
"""

import sys

from ray.cluster_utils import Cluster


def main(num_nodes: int, cores: int) -> None:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    nodes = [cluster.add_node(num_cpus=cores, object_store_memory=100_000_000) for _ in range(num_nodes)]
    print(cluster.address, flush=True)
    for line in sys.stdin:
        if line.strip() == "remove":
            cluster.remove_node(nodes.pop(), allow_graceful=False)
            print("removed", flush=True)
    cluster.shutdown()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
