"""The demo: small adapters trained by `train.py`, shipped with the project."""
