"""Crossdock beside other systems for expert parallelism: the same layer and the same small model, in one run. `python -m benchmarks.peers`."""
