"""Which dispatch, expert slot, chunks and gathered experts each layer should use under a plan."""
