"""Smaller datastores: which entries can go, and why."""
