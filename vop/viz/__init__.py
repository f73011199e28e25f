"""Drawings and the report."""
