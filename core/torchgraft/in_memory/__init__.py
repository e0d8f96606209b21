"""Adapters on an nn.Module: apply, train, merge, save and load them."""
