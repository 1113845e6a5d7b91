"""The catalog's fixtures: a tiny base, an adapters directory, and a registry over it."""

from ..catalog.conftest import base, catalog, plain, root

__all__ = ["base", "catalog", "plain", "root"]
