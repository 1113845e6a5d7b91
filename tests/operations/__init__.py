"""Faults of the place where the service runs, each made by its own means on a process of its own."""
