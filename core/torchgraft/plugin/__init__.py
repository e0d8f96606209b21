"""The hooks that a plugin provides, and how plugins are found, checked and called."""
