"""The HTTP side of the observer: a page for people, a small JSON API behind it, and /metrics."""
