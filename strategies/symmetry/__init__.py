"""Which transforms leave a model's function unchanged: groups, sites, tracing."""
