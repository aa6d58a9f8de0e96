"""How far apart models are: loss barriers along the path between them."""
