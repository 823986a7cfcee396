"""Runnable measurements: `python -m benchmarks.NAME [--short] [--json]`."""
