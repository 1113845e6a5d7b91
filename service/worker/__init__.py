"""The worker process, which owns the device: its loop, and the API process's end of it."""
