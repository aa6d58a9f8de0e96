"""What all checks of a reply cost beside its sum: finite entries, norms, bounds, and keeping it until all are judged."""

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import torch
from flwr.app import Message
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

from fedbasin.server.exchange import stage_attempt
from fedbasin.server.exchange.cohort import Cohort
from fedbasin.server.exchange.receive import receive
from fedbasin.server.exchange.stage_attempt import RoundContext, StageAttempt, StageLimits
from fedbasin.server.exchange.streaming_grid import NodeReply
from fedbasin.strategies.fusion.spool import SpoolFiles
from fedbasin.strategies.round.fuse import Fuse
from tests.benchmarks.bench_fold import Round, flat
from tests.benchmarks.figures import Figure, Goal, Say, in_fresh_process

REPLIES = 6
REPETITIONS = 5
CASES = ((12, "packed"), (300, "packed"))
SHARE = 0.05
PARTS = ("decode", "receive", "check", "keep", "bounds", "add")

HOW = f"""{REPLIES} replies of 170 MB float32 to one averaged model in float64, through a whole `StageAttempt`. Seconds
of the processor, on one thread, for each reply: `decode` is Flower's making of the message from its objects, as they come from the SuperLink (without
their transfer); `receive` reads headers and finds the tensors; `check` is names, shapes, dtypes, finite entries and norms; `keep` the
write to disk until all are judged, beyond 64 MB of replies, into the file of the stage before; `bounds` the judgement by medians and directions; `add` the sum. The share of the checks is
that of `check`, `keep` and `bounds`: of the server's time a reply, with `decode`, and in brackets of receiving, checking and adding alone.
Medians of {REPETITIONS} repetitions."""


def measure(say: Say) -> Figure:
    rows, shares = [], {}
    for tensors, layout in CASES:
        case = f"{tensors}, {layout}"
        say(f"checks: {REPLIES} replies of {case}")
        seconds = in_fresh_process("bench_checks", tensors, layout)
        cost = sum(seconds[part] for part in ("check", "keep", "bounds"))
        shares[case] = cost / sum(seconds.values())
        alone = cost / (sum(seconds.values()) - seconds["decode"])
        rows.append((case, *(f"{seconds[part]:.3f}" for part in PARTS), f"{shares[case]:.0%} ({alone:.0%})"))
    goal = Goal(
        f"checks take at most {SHARE:.0%} of the server's time a reply",
        "; ".join(f"{case}: {share:.0%}" for case, share in shares.items()),
        all(share <= SHARE for share in shares.values()),
    )
    return Figure("Cost of the checks", HOW, ("tensors", *PARTS, "share of the checks"), rows, [goal])


@contextmanager
def _timed(seconds: dict[str, float], part: str, owner: object, name: str) -> Iterator[None]:
    function: Callable[..., object] = getattr(owner, name)

    def measured(*args: object, **more: object) -> object:
        began = time.process_time()
        try:
            return function(*args, **more)
        finally:
            seconds[part] += time.process_time() - began

    with patch.object(owner, name, measured):
        yield


def _attempt(of_round: Round, files: SpoolFiles) -> tuple[dict[str, float], StageAttempt]:
    """Return the seconds of each part for one reply, and the attempt that has the sum."""
    nodes = list(range(1, REPLIES + 1))
    stage = of_round.stage(torch.float64)
    context = RoundContext(1, packed=True, files=files)
    attempt = StageAttempt(lambda: stage, of_round.anchor, nodes, context, StageLimits())
    seconds = dict.fromkeys(PARTS, 0.0)
    with ExitStack() as timers:
        for part, owner, name in (
            ("receive", stage_attempt, "receive"),
            ("check", Fuse, "check"),
            ("check", stage_attempt, "measure"),
            ("keep", Cohort, "keep"),
            ("bounds", StageAttempt, "_judge"),
            ("add", StageAttempt, "_add"),
        ):
            timers.enter_context(_timed(seconds, part, owner, name))
        attempt.add_all(NodeReply(m.metadata.src_node_id, m, 0.0) for m in of_round.replies)
    return {part: value / REPLIES for part, value in seconds.items()}, attempt


def _decoding_seconds(message: Message) -> float:
    objects = {key: part.deflate() for key, part in get_all_nested_objects(message).items()}
    began = time.process_time()
    inflate_object_from_contents(message.object_id, objects)
    return time.process_time() - began


def main(tensors: int, layout: str) -> None:
    torch.set_num_threads(1)
    of_round = Round(tensors, layout, REPLIES)
    repetitions, files, attempt = [], SpoolFiles(), None
    for _ in range(REPETITIONS):
        del attempt  # whose file the next one uses
        seconds, attempt = _attempt(of_round, files)
        seconds["decode"] = _decoding_seconds(of_round.replies[0])
        repetitions.append(seconds)
    if attempt.accepted < REPLIES:
        raise RuntimeError(f"only {attempt.accepted} of {REPLIES} replies were accepted: {attempt.report()}")
    examples = [50.0 + node for node in range(1, REPLIES + 1)]
    models = [flat(receive(message, attempt.request, 2**31).update.parameters).double() for message in of_round.replies]
    mean = sum(n * model for n, model in zip(examples, models, strict=True)) / sum(examples)
    torch.testing.assert_close(flat(attempt.finish().model), mean.float())
    medians = {part: statistics.median(entry[part] for entry in repetitions) for part in PARTS}
    sys.stdout.write(json.dumps(medians) + "\n")


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
