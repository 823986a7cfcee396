"""What a plan costs: copies, bytes and seconds, predicted from counts or replayed from a trace."""
