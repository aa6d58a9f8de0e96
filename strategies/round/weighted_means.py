"""Means of the clients' metrics, weighted by the clients' weights."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias

Value: TypeAlias = float | Sequence[float]


def weighted_means(clients: Iterable[tuple[Mapping[str, Value], float]]) -> dict[str, float | list[float]]:
    """Return the mean of each metric over the clients that sent a finite value of it.

    Lists are averaged entry by entry. A metric is a number, or a list of one length, as most clients have sent it: values
    of another form are left out. So is a value that is not finite, or with which the sum is not, because one client's
    overflow would be everybody's.

    Args:
        clients: for each client its metrics and its weight.
    """
    sums: dict[str, dict[int | None, tuple[list[float], float, int]]] = {}
    for metrics, weight in clients:
        for name, value in metrics.items():
            form, entries = (None, [value]) if isinstance(value, int | float) else (len(value), list(value))
            forms = sums.setdefault(name, {})
            total, seen, count = forms.get(form, ([0.0] * len(entries), 0.0, 0))
            added = [a + weight * b for a, b in zip(total, entries, strict=True)]
            if all(map(math.isfinite, added)):
                forms[form] = added, seen + weight, count + 1
    # Of equally many the form of the client that came first.
    commonest = {name: max(forms.items(), key=lambda form: form[1][2]) for name, forms in sums.items() if forms}
    return {
        name: total[0] / seen if form is None else [entry / seen for entry in total]
        for name, (form, (total, seen, _)) in commonest.items()
        if seen
    }
