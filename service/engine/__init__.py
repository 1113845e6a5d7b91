"""The clock: which sequences run in the next step, and the process they run in.

Integers only; imports no torch.
"""
