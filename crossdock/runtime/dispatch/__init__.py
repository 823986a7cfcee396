"""Dispatch: tokens to the devices of their experts and back, over one or two levels of links."""
