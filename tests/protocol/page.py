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

- Every rule has the same examples in the same slices, the same first model and the same local training (AdamW,
  learning rate 1e-3, weight decay 1e-2, batches of 32), from the same seeds. All clients take part in every
  round, unless a rule has `fraction_train`.
- Recipes of fedbasin (lower case) run through `FedBasin` and the client's mod; Flower's strategies (`FedAvg`,
  `FedAvgM`, `FedAdam`, `FedProx`) are the real objects, over the same clients. Only the network is missing.
- Bytes are those of all records of all messages, both ways. Seconds are processor time on one thread: training,
  statistics and packing of all clients together, and the server's own.
- `RidgeHead` and `RandomFeaturesHead` are closed forms from labels, on the raw inputs and on 1024 random ReLU
  features, exact sums over any split in one round. A rule that does not beat them on a task has not learned a
  representation there. Their bytes are those of float32 sums, the Gram as a triangle.
- Both closed forms are drawn as level lines: nothing follows their one round.
- Numbers are test accuracies and test losses, means over the seeds that all rules of a table have. Where a rule was
  tried with several settings, the table has its best one, chosen by the mean test accuracy over all rounds, for every
  rule alike; that flatters what was tried more.

- On glyphs the settings of Flower's strategies were tried on one seed and 15 rounds of Dirichlet(0.3), FedAvgM with
  0.5, 0.7 and 0.9 and FedAdam with 0.01 and 0.03, and the best one, FedAvgM with 0.7, was run on all seeds and splits;
  FedProx with 0.01 on Dirichlet(0.3).
- Flower's FedAvgM applies its momentum to BatchNorm's running variances too, which fall below zero in some rounds: its
  rows of 0.100 on `cnn_norm`. Compare with FedAvg there.

```
python -m tests.protocol run --task digits --split 'dirichlet([0.1, 0.3])' --seeds 5 --jobs 2 \\
    --rule FedAvg --rule 'FedAvgM(server_momentum=[0.5, 0.7, 0.9])' --rule 'FedAdam(eta=[0.01, 0.03])' \\
    --rule 'FedProx(proximal_mu=[0.01, 0.1])' \\
    --rule RidgeHead --rule RandomFeaturesHead --rule auto-features --rule auto --rule features --rule head
python -m tests.protocol run --task clusters --task teacher --split 'dirichlet([0.1, 0.3])' --seeds 3 --rounds 15 --jobs 2 \\
    --rule FedAvg --rule 'FedAvgM(server_momentum=[0.5, 0.7, 0.9])' --rule 'FedAdam(eta=[0.01, 0.03])' \\
    --rule 'FedProx(proximal_mu=[0.01, 0.1])' \\
    --rule RidgeHead --rule RandomFeaturesHead --rule auto-features --rule auto
python -m tests.protocol run --task glyphs --model cnn --split 'dirichlet([0.1, 0.3])' --split groups --rounds 30 --jobs 2 \\
    --rule 'FedAvgM(server_momentum=0.7)' --rule RidgeHead --rule RandomFeaturesHead --rule auto
python -m tests.protocol run --task glyphs --model cnn --split 'dirichlet([0.1, 0.3])' --split groups --jobs 2 --rule FedAvg
python -m tests.protocol run --task glyphs --model cnn --rounds 15 --jobs 2 --rule auto-features --rule 'FedProx(proximal_mu=0.01)'
python -m tests.protocol run --task glyphs --model cnn --split 'dirichlet(0.1)' --split groups --rounds 10 --jobs 2 --rule auto-features
python -m tests.protocol run --task digits --model cnn_norm --model transformer --jobs 2 \\
    --rule FedAvg --rule 'FedAvgM(server_momentum=[0.5, 0.7])' --rule auto-features --rule auto
python -m tests.protocol run --task wine --task cancer --split iid --split 'dirichlet(0.3)' --clients 5 --seeds 5 --rounds 10 --jobs 2 \\
    --rule fedavg --rule 'FedAvgM(server_momentum=[0.5, 0.7, 0.9])' --rule RidgeHead --rule auto-features --rule auto --rule head
python -m tests.protocol run --task digits --split 'shards(2)' --seeds 5 --rounds 10 --jobs 2 --rule fedavg --rule features \\
    --rule 'FedAvgM(server_momentum=[0.5, 0.7, 0.9])' --rule RidgeHead --rule auto-features --rule auto --rule head
python -m tests.protocol run --task letters --split 'dirichlet([0.05, 0.3])' --seeds 1 --rounds 10 --jobs 2 \\
    --rule FedAvg --rule 'FedAvgM(server_momentum=[0.5, 0.7])' --rule RidgeHead --rule RandomFeaturesHead --rule auto
python -m tests.protocol run --task letters --split 'few(5)' --clients 50 --seeds 3 --jobs 2 \\
    --rule FedAvg --rule 'FedAvgM(server_momentum=[0.5, 0.7])' --rule RidgeHead --rule RandomFeaturesHead --rule auto
python -m tests.protocol run --task letters --clients 50 --seeds 1 --jobs 2 \\
    --rule 'fedavgm(fraction_train=0.2)' --rule 'head(fraction_train=0.2)' --rule 'auto(fraction_train=0.2)'
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
    (folder / name).write_text(picture.draw(best, title) + "\n")
    parts = [
        f"## {title}",
        f"![Accuracy by round, bytes and client seconds]({folder.name}/{name})",
        tables.markdown(best[::-1]),
        tables.settings_note(best),
        "Losses, with the settings whose mean test loss over rounds is lowest:",
        tables.losses(lowest_of_each(rows)),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")
