"""One file for each system: how its layer is built on a rank. Each runs in that system's own environment and imports it and torch alone."""
