"""The ranks of one host as child processes of the command."""
