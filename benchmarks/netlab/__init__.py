"""A laboratory of emulated hosts on one Linux machine: network namespaces joined by a switch, every link with a rate and a latency.

    with Lab(nodes=2, rate_bit_per_s=500e6, latency_s=1e-3) as lab:
        lab.torchrun(["-m", "crossdock", "train", "configs/tiny.yaml"], ranks_per_node=2)
        lab.set_rate(250e6)
        print(lab.counters(0).sent_bytes)

    python -m benchmarks.netlab torchrun --nodes 2 --ranks-per-node 2 --rate 500e6 -- train.py   (torchrun on every host, then teardown)
    python -m benchmarks.netlab run --nodes 4 --rate 1e9 --latency 1e-3 -- COMMAND ...          (any command on every host)
    python -m benchmarks.netlab up --nodes 2 --rate 500e6,250e6                                 (prints the name and leaves it standing)
    python -m benchmarks.netlab list|exec|rate|counters|down ...

Each host is a network namespace with `eth0` = 10.77.0.(i+1)/24, a hostname `node<i>` and its own /etc/hosts; the switch is a bridge in a
namespace of its own, so nothing is made in the root namespace and several laboratories coexist. Traffic inside one host is not shaped.
`lab.py` builds and removes, `links.py` shapes, `cable.py` delays, `owners.py` knows what is ours and clears up, `programs.py` runs things.
"""

from benchmarks.netlab.lab import Lab, attached_or_new, unavailable_reason
from benchmarks.netlab.links import Counters
from benchmarks.netlab.owners import standing

__all__ = ["Counters", "Lab", "attached_or_new", "standing", "unavailable_reason"]
