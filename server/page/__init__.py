"""What the observer shows over HTTP: a page for people, a small JSON API behind it, and /metrics."""
