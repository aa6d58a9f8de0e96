"""Print the table of architectures: `python -m tests.architectures transformers|timm|torchvision|plain [NAME ...]`.

Every model is built tiny and random, its symmetry is discovered, and its function is executed under random elements.
With `--json` each model is one line as soon as it is done.
"""

import json
import sys
from collections.abc import Iterator

from tests.architectures.proof import Verdict, as_record, table
from tests.architectures.torchvision_operators import declare


def main(kind: str, names: list[str], *, as_json: bool) -> int:
    """Print the verdicts of one kind of models; return the number of broken ones."""
    verdicts = []
    for verdict in _verdicts(kind, names):
        verdicts.append(verdict)
        if as_json:
            print(json.dumps(as_record(verdict)), flush=True)
    if not as_json:
        print(table(verdicts))
    full = sum(verdict.coverage >= 0.95 for verdict in verdicts)
    broken = [verdict.model for verdict in verdicts if verdict.is_broken]
    print(
        f"\n{len(verdicts)} models, {full} with a coverage of .95 or more, broken: {broken or 'none'}", file=sys.stderr
    )
    return len(broken)


def _verdicts(kind: str, names: list[str]) -> Iterator[Verdict]:
    if kind == "transformers":
        from tests.architectures.library_configs import MODEL_TYPES, architectures_of
        from tests.architectures.library_models import examine_architecture

        # By type, because a list of all heads imports every model of the library.
        for model_type in names or MODEL_TYPES:
            yield from (examine_architecture(model_type, name) for name in architectures_of(model_type))
    elif kind == "plain":
        from tests.architectures.plain_modules import MODULES, examine_module

        yield from (examine_module(name) for name in MODULES if not names or name in names)
    else:
        from tests.architectures.vision_models import MODELS, examine_vision_model

        yield from (examine_vision_model(kind, name) for name in MODELS[kind] if not names or name in names)


if __name__ == "__main__":
    declare()
    words = [word for word in sys.argv[1:] if word != "--json"]
    sys.exit(min(main(words[0], words[1:], as_json="--json" in sys.argv), 1))
