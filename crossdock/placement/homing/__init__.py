"""Sequence homing: which device processes which sequence of a batch, from a forecast of its experts."""
