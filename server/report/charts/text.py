"""Numbers as text for people."""

import math

_MISSING = "–"


def number(value: float) -> str:
    """Return three significant digits, or a dash where the number is missing."""
    return f"{value:.3g}" if math.isfinite(value) else _MISSING


def size(count: float) -> str:
    """Return a number of bytes in decimal units."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def duration(seconds: float) -> str:
    """Return seconds below two minutes, then minutes, then hours."""
    if seconds < 120:
        return f"{seconds:.3g} s"
    if seconds < 7200:
        return f"{seconds / 60:.3g} min"
    return f"{seconds / 3600:.3g} h"


def arrow(before: float, after: float) -> str:
    """Return a measure before and after alignment; empty where neither was measured."""
    if not (math.isfinite(before) or math.isfinite(after)):
        return ""
    return f"{number(before)} → {number(after)}"
