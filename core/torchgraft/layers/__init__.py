"""The layers of a module or a checkpoint, the selection grammar, and the plan that a selection gives."""
