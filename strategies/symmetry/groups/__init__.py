"""The groups that can act on a space of a model, and their elements."""
