"""One rank of `test_nodes.py`: moves tokens through an MoE layer and prints what the ledger and this host's interface counted."""

import json
import os
import sys

import torch

from benchmarks.netlab import Lab
from crossdock.models.moe import MoELayer
from crossdock.runtime.transport import ledger
from crossdock.runtime.transport.collectives import all_gather_objects, barrier
from crossdock.runtime.transport.mesh import Mesh, initialise, shutdown


def main(lab_name: str, dispatch: str, steps: int) -> None:
    lab, rank, node, world_size = Lab.attach(lab_name), *(int(os.environ[name]) for name in ("RANK", "GROUP_RANK", "WORLD_SIZE"))
    initialise(rank, world_size, timeout_s=60)
    nodes = tuple(other * lab.nodes // world_size for other in range(world_size))
    mesh = Mesh.create(rank, world_size, world_size, nodes, timeout_s=60)
    layer = MoELayer(512, 16, num_experts=8, top_k=2, mesh=mesh, dispatch=dispatch)
    generator = torch.Generator().manual_seed(rank)
    x_TD = torch.randn(1, 512, 512, generator=generator).requires_grad_()
    barrier(mesh)
    before = lab.counters(node)
    barrier(mesh)
    mesh.ledger.take()
    for _ in range(steps):
        layer(x_TD).sum().backward()
    flights = mesh.ledger.take()
    barrier(mesh)
    on_the_wire = lab.counters(node) - before
    counted = {kind: ledger.bytes_by_class(flights, kind)[2] for kind in ("tokens", "metadata", "counts")}
    gathered = all_gather_objects((node, counted), mesh)
    total = {kind: sum(other[kind] for at, other in gathered if at == node) for kind in counted}
    print(json.dumps({"node": node, "counted": total, "sent": on_the_wire.sent_bytes, "received": on_the_wire.received_bytes}))
    shutdown()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
