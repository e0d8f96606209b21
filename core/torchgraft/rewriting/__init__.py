"""Copy and rewrite tensors in files, on all cores. Nothing here depends on adapters."""
