"""Adapters, one per on-disk format, and the rendered collection."""
