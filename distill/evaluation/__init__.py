"""Whether a set is worth it: students on the set and on its controls, with paired seeds and intervals."""
