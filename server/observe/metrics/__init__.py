"""The metrics that Prometheus scrapes: their catalogue, their values in a report, and the registry that sums them."""
