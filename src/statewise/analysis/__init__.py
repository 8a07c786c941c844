"""Seeing what a mixer does. See `docs/analysis.md`."""
