"""The worker's policy: which sequences run in the next step, and where their adapters and KV lie.

Runs in the worker process. Integers only; imports no torch.
"""
