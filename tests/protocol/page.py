"""docs/records/protocol.md: tables and curves of every scene, written from the results."""

import re
from pathlib import Path

from tests.benchmarks.figures import machine, wrap
from tests.protocol import behind, picture, tables
from tests.protocol.results import Curves
from tests.protocol.summary import Row, Scene, best_of_each, lowest_of_each, scenes

_HEAD = """# Protocol

How the rules compare, under one protocol. Written by `python -m tests.protocol report` from the results of
`python -m tests.protocol run`; the scripts are in `tests/protocol`, and `--help` says what they take.

- Every rule has the same examples in the same slices, the same first model and the same local training, from the same
  seeds: AdamW with a learning rate of 1e-3 unless a table says otherwise, weight decay 1e-2, batches of 32. All clients
  take part in every round, unless a rule has `fraction_train`.
- Under every rule a client keeps a tenth of its examples, at least one, for evaluation, as the apps of Flower's
  quickstarts keep a fifth. The mod compares models by them, as README's app has it do. `auto(held_out=0.1)` is the same
  recipe for an app that passes no such examples: the mod compares by a tenth of what the clients train on.
- Recipes of fedbasin (lower case) run through `FedBasin` and the client's mod; Flower's strategies (`FedAvg`,
  `FedAvgM`, `FedAdam`, `FedProx`) are the real objects, over the same clients. Only the network is missing.
- Bytes are those of all records of all messages, both ways. Seconds are processor time on one thread: training,
  statistics and packing of all clients together, and the server's own.
- `RidgeHead` and `RandomFeaturesHead` are closed forms from targets, on the raw inputs and on 1024 random ReLU
  features, exact sums over any split in one round. A rule that does not beat them on a task has not learned a
  representation there. Their bytes are those of float32 sums, the Gram as a triangle.
- Both closed forms are drawn as level lines: nothing follows their one round. They ask all clients, also where the
  other rules sample some. For a class of each pixel and for the next character they are not defined.
- Numbers are test accuracies and test losses, means over the seeds that all rules of a table have. Where a rule was
  tried with several settings, the table has its best one, chosen by the mean test accuracy over all rounds, for every
  rule alike; that flatters what was tried more. Tasks without right and wrong have losses alone.
- With sizes by `quantity` the bounds on one client cut the largest client back
  ([without them](decisions.md)).
- Flower's FedAvgM applies its momentum to BatchNorm's running variances too, which fall below zero in some rounds: its
  rows of 0.100 with a network that has BatchNorm. Compare with FedAvg there.

| task | what it is |
|---|---|
| `teacher`, `clusters`, `friedman` | generated: a random network's largest output, gaussian clusters, Friedman's first function |
| `digits`, `diabetes` | ship with scikit-learn |
| `glyphs` | letters in 16 fonts of matplotlib's, turned and sheared, with noise |
| `digits(sources=10)` | the same digits from ten scanners, each with scales and offsets of its own: clients differ in their inputs |
| `sayings`, `scenes`, `colour_digits` | made of these digits: six yes or no for each, a class for each pixel, Flower's quickstart |
| `modules`, `python_topics` | text that Python brings: which module a passage is of, the next character of its documentation |
| `letters`, `satellite`, `vowels`, `handwriting` | files that a user has fetched ([where from](../../tests/protocol/fetched.py)) |

```
F4="--rule FedAvg --rule FedAvgM(server_momentum=[0.5,0.9]) --rule FedProx(proximal_mu=0.01) --rule auto"
F8="$F4 --rule FedAvgM(server_momentum=0.7) --rule FedAdam(eta=[0.01,0.03]) --rule FedProx(proximal_mu=0.1)"
HEADS="--rule RidgeHead --rule RandomFeaturesHead"
run() { python -m tests.protocol run --jobs 2 "$@"; }
long() { run --rounds 60 "$@"; }
long --task teacher --task clusters $F8 $HEADS
long --task diabetes --task friedman $F4 $HEADS
long --task vowels --model lstm $F4 $HEADS
long --task colour_digits --split iid --model quickstart --optimizer sgd --rate 0.02 --epochs 1 --clients 4 $F4 $HEADS
long --task digits $F4 $HEADS
long --task satellite $F4 $HEADS
long --task letters --split 'few(5)' --clients 50 $F8 $HEADS
long --task letters --clients 50 --rule 'fedavg(fraction_train=0.2)' --rule 'fedavgm(fraction_train=0.2)' --rule 'auto(fraction_train=0.2)' $HEADS
long --task digits --split 'shards(2)' $F4 $HEADS
long --task 'digits(sources=10)' --split groups $F4 $HEADS
long --task sayings --model small_cnn --epochs 2 $F4 $HEADS
long --task scenes --model segmenter --epochs 1 $F4
long --task python_topics --split groups --model gpt2 --epochs 1 --rate 3e-3 $F4
long --task modules --model transformer --epochs 2 --rate 3e-3 $F4 $HEADS
long --task digits --model transformer --epochs 2 $F4 $HEADS
long --task digits --model resnet --epochs 2 $F4 $HEADS
long --task letters --split 'dirichlet(0.05)' $F4 $HEADS
long --task letters --split 'quantity(0.3)' $F4 $HEADS
long --task 'handwriting(train=2000)' --model cnn --epochs 2 $F4 $HEADS
run --rounds 10 --task glyphs --model cnn $F4 $HEADS
run --rounds 15 --task teacher --task clusters --rule 'auto(held_out=0.1)'
run --rounds 20 --task diabetes --task friedman --rule 'auto(held_out=0.1)'
run --rounds 10 --task digits --split 'shards(2)' --rule features
python -m tests.protocol report
```
"""


_BEHIND = """## Where `auto` is behind

More than a point of accuracy below the best of Flower's strategies, or a loss more than 2 % above the lowest, in
rounds 1, 2, 5, 10, 15, 20 and 60. The best one is chosen for each cell anew, on the test examples and among all
settings, which no user can do.
"""


def write(file: Path, curves: Curves) -> None:
    """Write the page, and beside it a folder of its name with the pictures.

    What that folder's `notes.txt` and `earlier.txt` say comes before the tables and after them: what the results do not
    know, such as the machines, and tables whose results are no longer there.
    """
    folder = file.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    measured = scenes(curves)
    sections = [_section(scene, rows, folder) for scene, rows in measured.items()]
    notes, earlier = (_text_of(folder / name) for name in ("notes.txt", "earlier.txt"))
    written = wrap(f"Written {machine()}.") + "\n"
    file.write_text("\n".join([_HEAD, *notes, _BEHIND, behind.cells(measured), "", *sections, written, *earlier]))


def _text_of(file: Path) -> list[str]:
    return [file.read_text()] if file.is_file() else []


def _section(scene: Scene, rows: list[Row], folder: Path) -> str:
    title, best = tables.heading(scene), best_of_each(rows)
    name = f"{_slug(title)}.svg"
    measure = "Accuracy" if best[0].has_accuracy else "Loss"
    (folder / name).write_text(picture.draw(best, title) + "\n")
    parts = [
        f"## {title}",
        f"![{measure} by round, bytes and client seconds]({folder.name}/{name})",
        tables.markdown(best[::-1]),
        tables.settings_note(best),
        "Losses, with the settings whose mean test loss over rounds is lowest:",
        tables.losses(lowest_of_each(rows)),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")
