"""Numbers as people read them."""

import math

_MISSING = "–"


def number(value: float) -> str:
    """Three significant digits; a dash where there is nothing."""
    return f"{value:.3g}" if math.isfinite(value) else _MISSING


def size(of_bytes: float) -> str:
    """Bytes in decimal units."""
    for unit in ("B", "kB", "MB"):
        if of_bytes < 1000:
            return f"{of_bytes:.3g} {unit}"
        of_bytes /= 1000
    return f"{of_bytes:.3g} GB"


def duration(seconds: float) -> str:
    """Seconds below two minutes, then minutes, then hours."""
    if seconds < 120:
        return f"{seconds:.3g} s"
    if seconds < 7200:
        return f"{seconds / 60:.3g} min"
    return f"{seconds / 3600:.3g} h"


def arrow(before: float, after: float) -> str:
    """A measure before and after alignment; empty where neither was taken."""
    if not (math.isfinite(before) or math.isfinite(after)):
        return ""
    return f"{number(before)} → {number(after)}"
