"""The clock: scheduling, residency, the worker process and the client."""
