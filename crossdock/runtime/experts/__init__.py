"""Experts: the weights and arithmetic of one rank's experts, and the schedules that hide movement behind them."""
