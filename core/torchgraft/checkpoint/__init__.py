"""A base model on disk: its headers, tensors, layout and the files beside them. It knows nothing about adapters."""
