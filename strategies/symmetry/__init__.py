"""Which transforms leave a model's function unchanged: groups, spaces, tracing."""
