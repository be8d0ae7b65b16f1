"""Parallel corpora: reading, fetching, cleaning, splitting and batching."""
