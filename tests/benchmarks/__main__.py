"""`python -m tests.benchmarks [NAME ...]`: measure all figures, or these, and write docs/records/benchmarks.md."""

import sys
from collections.abc import Callable

from rich.console import Console

from tests.benchmarks import (
    bench_checks,
    bench_discovery,
    bench_finish,
    bench_fisher,
    bench_fold,
    bench_identity_bounds,
    bench_layers,
    bench_lora,
    bench_matching,
    bench_matching_memory,
    bench_memory,
    bench_merge,
    bench_merge_rules,
    bench_observer,
    bench_observer_siege,
    bench_one_round,
    bench_own_features,
    bench_own_starts,
    bench_page,
    bench_rebasin,
    bench_robust,
    bench_served,
    bench_stages,
    bench_telemetry,
    bench_tensors,
)
from tests.benchmarks.figures import PAGE, Figure, Say, show, write

BENCHMARKS: dict[str, Callable[[Say], Figure]] = {
    "fold": bench_fold.measure,
    "checks": bench_checks.measure,
    "finish": bench_finish.measure,
    "memory": bench_memory.measure,
    "tensors": bench_tensors.measure,
    "identity_bounds": bench_identity_bounds.measure,
    "matching": bench_matching.measure,
    "matching-memory": bench_matching_memory.measure,
    "layers": bench_layers.measure,
    "rebasin": bench_rebasin.measure,
    "telemetry": bench_telemetry.measure,
    "observer": bench_observer.measure,
    "siege": bench_observer_siege.measure,
    "own_starts": bench_own_starts.measure,
    "one_round": bench_one_round.measure,
    "own_features": bench_own_features.measure,
    "stages": bench_stages.measure,
    "lora": bench_lora.measure,
    "merge": bench_merge.measure,
    "merge-rules": bench_merge_rules.measure,
    "fisher": bench_fisher.measure,
    "page": bench_page.measure,
    "robust": bench_robust.measure,
    "served": bench_served.measure,
    "discovery": bench_discovery.measure,
}


def main(names: list[str]) -> int:
    console = Console(highlight=False)
    if unknown := sorted(set(names) - BENCHMARKS.keys()):
        console.print(f"no benchmark {', '.join(unknown)}; there are {', '.join(BENCHMARKS)}")
        return 2
    for name in names or BENCHMARKS:
        figure = BENCHMARKS[name](lambda text: console.print(f"[dim]{text}[/dim]", soft_wrap=True))
        show(figure, console)
        # At once: an interrupted run keeps what it has measured.
        write({name: figure}, list(BENCHMARKS))
    console.print(f"written to {PAGE}", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
