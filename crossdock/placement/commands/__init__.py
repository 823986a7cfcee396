"""`crossdock plan`: its commands, and what they do behind their options."""
