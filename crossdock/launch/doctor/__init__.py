"""What a machine and its ranks offer a run, and what is wrong with them."""
