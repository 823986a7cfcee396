"""Plans beside one another: compared, under what-ifs, with error bars, relabelled, and with homes."""
