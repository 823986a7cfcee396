"""Placement: decides where experts live. Reads traces and topologies, writes plans; knows no torch and no process group."""
