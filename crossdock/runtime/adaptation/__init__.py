"""Adaptation: what is measured in a live run, and what is decided anew from it between two steps."""
