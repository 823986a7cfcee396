"""Crossdock beside other systems for expert parallelism: the same layer and small model, in one run. `python -m benchmarks.peers`."""
