"""Recovery: images that teachers take for their classes, with the statistics that teachers know from real data."""
