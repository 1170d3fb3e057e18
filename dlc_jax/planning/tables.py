"""A plan as text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from dlc_jax.planning.break_even import FACTOR, Payback
from dlc_jax.planning.costs import Cost
from dlc_jax.planning.machine import USABLE, Machine
from dlc_jax.planning.memory import Memory, MemoryPlan
from dlc_jax.reports.table import markdown

_GIB, _MIB = 1 << 30, 1 << 20
_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")


def device_table(machines: Sequence[Machine], plans: Sequence[MemoryPlan]) -> str:
    """Returns what a job takes of every device, a column per machine."""
    found = [{part.name: part.num_bytes for part in plan.parts} for plan in plans]
    longest = max(plans, key=lambda plan: len(plan.parts))
    names = dict.fromkeys(part.name for plan in (longest, *plans) for part in plan.parts)
    unit, said = _unit(plan.num_bytes for plan in plans)
    rows = [
        [name, *(f"{parts[name] / unit:.2f}" if name in parts else "-" for parts in found)]
        for name in names
    ]
    rows.append(["most at any time", *(f"{plan.num_bytes / unit:.2f}" for plan in plans)])
    rows.append([_limit_row(), *(f"{machine.limit / unit:.2f}" for machine in machines)])
    pairs = zip(plans, machines, strict=True)
    rows.append(["fits", *("yes" if p.num_bytes <= m.limit else "no" for p, m in pairs)])
    return markdown([f"{said} per device", *(machine.name for machine in machines)], rows)


def host_table(stages: dict[str, list[Memory]], limit: int) -> str:
    """Returns what every process takes of its host, a column per stage."""
    found = {stage: {p.name: p.num_bytes for p in parts} for stage, parts in stages.items()}
    names = dict.fromkeys(name for parts in found.values() for name in parts)
    totals = {stage: sum(parts.values()) for stage, parts in found.items()}
    unit, said = _unit(totals.values())
    rows = [
        [
            name,
            *(f"{parts[name] / unit:.2f}" if parts.get(name) else "-" for parts in found.values()),
        ]
        for name in names
        if any(parts.get(name) for parts in found.values())
    ]
    rows.append(["in all", *(f"{total / unit:.2f}" for total in totals.values())])
    rows.append([_limit_row(), *(f"{limit / unit:.2f}" for _ in totals)])
    rows.append(["fits", *("yes" if total <= limit else "no" for total in totals.values())])
    return markdown([f"{said} per process", *stages], rows)


def work_table(costs: Sequence[Cost]) -> str:
    """Returns passes, samples and operations of every part of a run."""
    rows = [
        [
            cost.stage,
            cost.name,
            f"{cost.passes:,}",
            f"{cost.num_samples:,}",
            f"{cost.flops / 1e12:,.4g}",
            f"{cost.decodes:,}" if cost.decodes else "-",
        ]
        for cost in costs
    ]
    header = ["stage", "part", "passes", "samples in all", "TFLOP", "images decoded"]
    return markdown(header, rows)


def time_table(costs: Sequence[Cost], seconds: Sequence[float]) -> str:
    """Returns how long every part is expected to take, and within what range."""
    rows = [
        [cost.stage, cost.name, *_range(each)] for cost, each in zip(costs, seconds, strict=True)
    ]
    if len(costs) > 1:
        rows.append(["", "all", *_range(sum(seconds))])
    return markdown(["stage", "part", "expected", "between"], rows)


def payback_table(paybacks: Sequence[Payback], epochs: int) -> str:
    """Returns when pruning has paid for itself, a line per keep fraction."""
    rows = [
        [
            f"{row.keep_fraction:.2f}",
            duration(row.saved_seconds),
            _number(row.epochs),
            _number(row.runs),
        ]
        for row in paybacks
    ]
    header = ["keep fraction", "saved by a run", "won back after: epochs", f"or runs of {epochs}"]
    return markdown(header, rows)


def amount(num_bytes: float) -> str:
    """Returns bytes as people say them, in powers of 1000."""
    power = min(len(_UNITS) - 1, int(math.log10(num_bytes) // 3)) if num_bytes >= 1 else 0
    return f"{num_bytes / 1000**power:.3g} {_UNITS[power]}"


def gib(num_bytes: float) -> str:
    """Returns gibibytes, or mebibytes where they are few."""
    unit, said = _unit([num_bytes])
    return f"{num_bytes / unit:.2f} {said}"


def duration(seconds: float) -> str:
    """Returns a time in the unit that suits it."""
    for size, unit in ((86_400, "days"), (3_600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"


def _range(seconds: float) -> list[str]:
    low, high = duration(seconds / FACTOR), duration(seconds * FACTOR)
    return [duration(seconds), f"{low} and {high}"]


def _number(value: float) -> str:
    return "never" if math.isinf(value) else f"{value:.3g}"


def _unit(sizes: Iterable[float]) -> tuple[int, str]:
    return (_GIB, "GiB") if max(sizes) >= _GIB else (_MIB, "MiB")


def _limit_row() -> str:
    return f"of ({USABLE:.0%})".replace("%", " %")
