"""Commands on model files: inspect, align, apply and check."""
