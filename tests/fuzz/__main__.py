"""The fuzzer: `python -m tests.fuzz [TRIES] [SEED]` tries mutated replies in all recipes and all ways of aligning."""

import resource
import sys
import time
import traceback
from collections import Counter

from tests.fuzz.stages import MOST_BYTES, RUNS, record, try_reply


def main(tries: int, seed: int) -> int:
    """Print outcomes and failures; return the number of failures."""
    for run in RUNS:
        record(run)
    outcomes: Counter[str] = Counter()
    failures: dict[str, tuple[str, int, int]] = {}
    failed, started, before = 0, time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    runs = list(RUNS)
    for number in range(tries):
        run = runs[number % len(runs)]
        place = (number // len(runs)) % len(record(run))
        try:
            outcomes[try_reply(run, place, seed + number)] += 1
        except Exception as error:  # noqa: BLE001 - every failure of the server is what is looked for
            failed += 1
            frame = traceback.extract_tb(error.__traceback__)[-1]
            key = f"{type(error).__name__}: {str(error)[:200]} ({frame.filename.rsplit('/', 1)[-1]}:{frame.lineno})"
            failures.setdefault(key, (run, place, seed + number))
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(
        f"{tries} replies in {time.perf_counter() - started:.0f} s, {failed} failures; peak memory grew by {grown:.0f} MB"
    )
    print(f"replies above {MOST_BYTES} bytes are refused; outcomes: {dict(outcomes.most_common())}")
    for key, (run, place, number) in failures.items():
        print(f'{{"run": "{run}", "place": {place}, "seed": {number}}}  {key}')
    return failed


if __name__ == "__main__":
    arguments = [int(argument) for argument in sys.argv[1:]]
    sys.exit(bool(main(*[*arguments, 100_000, 0][:1], *[*arguments[1:], 0][:1])))
