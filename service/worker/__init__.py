"""The worker process, which owns the device, and the API process's end of it."""
