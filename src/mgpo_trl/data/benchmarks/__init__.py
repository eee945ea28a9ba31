"""Published data sets by name: `vstar`, `hrbench-4k`, `mme-realworld-lite` and so on, from the Hub or a local copy.

On the command line, `--dataset vstar` reads the set from the Hub and `--dataset vstar:/data/vstar_bench` a copy of it.
Each set has one small module whose docstring shows a source row; `docs/benchmarks.md` has a card for each.
"""

from . import hrbench, mgpo, mme_realworld, pixmo, vstar
from .common import Benchmark, load_benchmark

BENCHMARKS: dict[str, Benchmark] = {
    benchmark.name: benchmark
    for module in (mgpo, vstar, hrbench, mme_realworld, pixmo)
    for benchmark in module.BENCHMARKS
}
"""Every set by name."""


def find_benchmark(spec: str) -> tuple[Benchmark, str | None] | None:
    """The set and the local path that `NAME` or `NAME:PATH` names; `None` where it names none."""
    name, _, path = spec.partition(":")
    return (BENCHMARKS[name], path or None) if name in BENCHMARKS else None


__all__ = ["BENCHMARKS", "Benchmark", "find_benchmark", "load_benchmark"]
