"""Models: gates, mixture-of-experts layers, shortcut blocks and the decoder-only transformer."""
