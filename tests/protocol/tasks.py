"""The catalogue of tasks."""

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

from tests.protocol import fetched, sequences, tabular, targets, texts
from tests.protocol.spec import made, parse
from tests.protocol.task import Task


def catalogue(cache_folder: Path) -> dict[str, Callable[..., Task]]:
    """Every task by name; what takes seconds to draw, or a user has fetched, is kept in `cache_folder`."""
    return {
        "digits": tabular.digits,
        "wine": tabular.wine,
        "cancer": tabular.cancer,
        "clusters": tabular.clusters,
        "teacher": tabular.teacher,
        "letters": partial(fetched.letters, cache_folder),
        "satellite": partial(fetched.satellite, cache_folder),
        "handwriting": partial(fetched.handwriting, cache_folder),
        "vowels": partial(fetched.vowels, cache_folder),
        "glyphs": partial(_glyphs, cache_folder),
        "recall": sequences.recall,
        "modular_sum": sequences.modular_sum,
        "topics": sequences.topics,
        "modules": texts.modules,
        "python_topics": texts.topics_of_python,
        "diabetes": targets.diabetes,
        "friedman": targets.friedman,
        "sayings": targets.sayings,
        "scenes": targets.scenes,
        "colour_digits": targets.colour_digits,
    }


@cache
def load(text: str, cache_folder: Path) -> Task:
    """The task of a spec, once in a process.

    Raises:
        SpecError: there is no such task.
    """
    return made("task", parse(text), catalogue(cache_folder))


def _glyphs(cache_folder: Path, train: int = 5000, test: int = 2000) -> Task:
    # Here, because drawing needs matplotlib's fonts, and the other tasks do not.
    from tests.protocol.glyphs import glyphs

    return glyphs(cache_folder, train, test)
