"""Optimization: gradients summed over ranks, and the optimizer step on full-precision master weights."""
