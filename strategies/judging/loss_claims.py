"""Bounds on what one client reports of its examples where clients choose between a round's models.

A choice is made by sums, and a sum has no bound of its own: a client that claims a loss of a million under all models
but one has chosen for everybody. What the clients have in common says how far a claim counts:

    examples    at most a multiple of what four fifths of the clients do not exceed
    loss        under each model and for each example likewise, and for the client as a whole a few nats more
    errors      of the examples that a model classifies wrongly, likewise

The mean of the models can be far worse for a client whose labels others lack than for the rest, and a client of ten
examples may have one that its model is sure of and wrong about; both are left as they are.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from fedbasin.proto.report import PathSums

# Fewer clients have no majority that could be told from a minority.
_FEWEST = 3
# Share of the clients among whom the largest value is usual, and the multiples of it up to which examples and losses
# count. With sizes by Dirichlet(0.3) an honest client has judged by eight times as many examples. Of honest clients of
# ten tasks, six rounds each, one was cut: with two labels each, where a step had ruined its model.
_USUAL, _MOST_EXAMPLES, _MULTIPLE = 0.8, 8.0, 4.0
# What a client's examples may have lost or got wrong beside that: 20 nats are three or four confident errors.
_NATS, _ERRORS = 20.0, 5.0


def bounded_claims(paths: Mapping[int, PathSums]) -> dict[int, tuple[PathSums, str]]:
    """Return the paths of the clients whose claims are cut back, and what was cut, in words.

    Args:
        paths: by client, the sums of its losses under the same models.
    """
    everybody = {node: path for node, path in paths.items() if path.examples}
    if len(everybody) < _FEWEST:
        return {}
    count = 2 * sum(bool(path.correct_after) for path in everybody.values()) > len(everybody)
    # Of a sum with one of them nobody's correct examples would be known.
    silent = {node for node, path in everybody.items() if count and not path.correct_after}
    judges = {node: path for node, path in everybody.items() if node not in silent}
    most = _MOST_EXAMPLES * _usual([path.examples for path in judges.values()])
    shortened = {node: _shortened(path, most) for node, path in judges.items()}
    usual_losses, usual_errors = (_usual_of_models(shortened, sums_of) for sums_of in (_losses, _errors))
    # A squared error has the unit of the targets: what is usual takes the place of the nats.
    nats = _NATS if count else 0.0
    cut = {
        node: (bounded, note)
        for node, path in shortened.items()
        if (note := _note(judges[node], bounded := _bounded(path, usual_losses, usual_errors, nats)))
    }
    return cut | dict.fromkeys(
        silent, (PathSums(), "its losses do not count: it lacks the correct examples that most report")
    )


def _shortened(path: PathSums, most: float) -> PathSums:
    """Return the path of a client that counts for fewer examples than it claims."""
    if path.examples <= most:
        return path
    factor = most / path.examples
    loss, correct = (tuple(factor * value for value in sums) for sums in (path.loss_after, path.correct_after))
    return replace(path, loss_after=loss, correct_after=correct, examples=most)


def _usual(values: Sequence[float]) -> float:
    """Return what four fifths of the clients do not exceed; no more than the second largest of a few."""
    return sorted(values)[int(_USUAL * (len(values) - 1))]


def _usual_of_models(paths: Mapping[int, PathSums], sums_of: Callable[[PathSums], tuple[float, ...]]) -> list[float]:
    """Return what is usual under each model, for one example."""
    means = ([value / path.examples for value in sums_of(path)] for path in paths.values())
    return [_usual(of_model) for of_model in zip(*means, strict=False)]


def _bounded(path: PathSums, usual_losses: list[float], usual_errors: list[float], nats: float) -> PathSums:
    losses = (
        min(loss, _MULTIPLE * usual * path.examples + max(nats, _ERRORS * usual))
        for loss, usual in zip(path.loss_after, usual_losses, strict=True)
    )
    errors = (
        min(error, _MULTIPLE * usual * path.examples + _ERRORS)
        for error, usual in zip(_errors(path), usual_errors, strict=False)
    )
    return replace(path, loss_after=tuple(losses), correct_after=tuple(path.examples - error for error in errors))


def _losses(path: PathSums) -> tuple[float, ...]:
    return path.loss_after


def _errors(path: PathSums) -> tuple[float, ...]:
    return tuple(path.examples - correct for correct in path.correct_after)


def _note(claimed: PathSums, bounded: PathSums) -> str:
    """Return what was cut back, in words; empty where nothing was."""
    notes = []
    if bounded.examples < claimed.examples:
        notes.append(f"examples cut from {claimed.examples:.3g} to {bounded.examples:.3g}")
    factor = bounded.examples / claimed.examples
    cut = [
        index
        for index, loss in enumerate(claimed.loss_after)
        # Beyond the rounding of the factor.
        if bounded.loss_after[index] < factor * loss * (1 - 1e-9)
        or (bounded.correct_after and bounded.correct_after[index] > factor * claimed.correct_after[index] * (1 + 1e-9))
    ]
    if cut:
        worst = max(cut, key=lambda index: claimed.loss_after[index])
        before, after = claimed.loss_after[worst] / claimed.examples, bounded.loss_after[worst] / bounded.examples
        notes.append(f"loss under {len(cut)} of {len(claimed.points)} models cut, from {before:.3g} to {after:.3g}")
    return "; ".join(notes)
