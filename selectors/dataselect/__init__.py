"""Data selectors: each picks real samples of the source and says why, in a `Selection`."""
