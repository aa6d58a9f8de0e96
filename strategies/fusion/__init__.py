"""Precision-weighted sums: what clients know about their weights, and the mean it gives."""
