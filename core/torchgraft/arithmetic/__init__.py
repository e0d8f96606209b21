"""Merging one tensor in float64, and undoing that to the last bit."""
