"""Reading and changing what a model computes: sites, edits, lenses, patching, circuits, pictures."""
