"""What a Flower client adds: align to the anchor, collect statistics, probe the barrier, build the reply."""
