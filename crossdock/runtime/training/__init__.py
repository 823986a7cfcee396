"""Training: the loop, its steps, and what a run writes down."""
