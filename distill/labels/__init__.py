"""Soft labels: how they are stored."""
