"""The registered adapters: what they are, where they lie, and their names.

API process and validator process; knows no live model.
"""
