"""Launch: starts processes, and nothing else may; every launcher ends in `worker.main`."""
