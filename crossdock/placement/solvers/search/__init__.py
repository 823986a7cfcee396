"""What the methods search with: states of a layer or chain, prices of swaps, starts, recombination."""
