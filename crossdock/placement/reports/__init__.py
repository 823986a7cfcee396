"""Plans and runs as one HTML page, with charts of its own."""
