"""What placement reads and writes: traces and their counts, topologies, plans, and other systems' files."""
