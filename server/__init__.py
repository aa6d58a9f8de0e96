"""The running thing: rounds over a real Flower grid, configuration, checkpoints, telemetry, command line."""
