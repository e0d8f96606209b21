"""List the layers of a module or a checkpoint, select some by patterns, and plan adapters on them."""
