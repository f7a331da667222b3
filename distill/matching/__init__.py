"""Trajectory matching: students take T steps on the set, and the set learns to bring them where experts went."""
