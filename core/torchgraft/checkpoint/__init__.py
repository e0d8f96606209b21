"""Read a base model on disk: headers, tensors, layout and sidecar files. Nothing here knows about adapters."""
