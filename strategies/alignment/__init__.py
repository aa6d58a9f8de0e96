"""Finding the transform that takes a client into the anchor's basin."""
