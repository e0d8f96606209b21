"""Adapters and checkpoints on disk, with no model in memory: apply, check, merge, unmerge, export."""
