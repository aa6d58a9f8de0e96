"""Robust rules: the result moves by a bounded distance, whatever a minority of clients sends."""
