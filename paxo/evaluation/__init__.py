"""Held-out accuracy, win rates with intervals, tables and plots."""
