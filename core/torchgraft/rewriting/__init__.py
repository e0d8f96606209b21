"""Copying and rewriting tensors in files, on all cores. It knows no adapter."""
