"""Fusion of clients' models: precision-weighted sums, closed-form heads, low-rank adapters."""
