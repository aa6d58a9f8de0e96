"""The client's part of a refit: least-squares sums of layers on fused features."""
