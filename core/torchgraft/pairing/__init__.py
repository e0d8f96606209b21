"""Check whether an adapter fits a base, and under which names."""
