"""Whole jobs on real input, ours beside hand-written ones that give the identical result."""
