"""Running it: local deployments of real Flower processes, the demo, compose files."""
