"""Runtime: moves tokens and weights between ranks, and trains."""
