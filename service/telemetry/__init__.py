"""Metrics, logs, traces and GPU readings; must not know the rooms that report them."""
