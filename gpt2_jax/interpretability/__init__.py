"""Reading and changing what a model computes: sites, lenses, patching, circuits, pictures."""
