"""`crossdock` commands that start runs or look after their files, one module each."""
