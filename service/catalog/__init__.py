"""The shelf: what adapters are, where they lie, and which names they have. Knows no live model."""
