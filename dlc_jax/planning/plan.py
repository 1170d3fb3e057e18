"""A plan: what a run takes of time, devices and hosts, and when pruning has paid for itself."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from dlc_jax.planning.costs import Cost, Speeds
from dlc_jax.planning.machine import USABLE, Machine, host_memory, this_machine
from dlc_jax.planning.memory import DeviceJob, Host, MemoryPlan, ways_out
from dlc_jax.reports.table import markdown

FACTOR = 2.0  # that a prediction may be off by, either way
_GIB, _MIB = 1 << 30, 1 << 20
_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")
_SHARE = f"{USABLE:.0%}".replace("%", " %")


@dataclasses.dataclass(frozen=True)
class Work:
    """What a run does with its data.

    Attributes:
      costs: Parts of the run in their order.
      sample: Cost of a sample in an epoch of fine-tuning.
      num_samples: Samples to prune.
      kept: Samples kept at each keep fraction.
      epochs: Epochs of a fine-tuning run.
      hosts: Host memory of each stage.
      details: Returns lines on what is read, decoded and kept.
      measure: Measures how fast this machine is, given the bytes of a device that it may take: what
        was measured in words, and speeds. None: it would not fit.
      problems: What has no room on disk.
    """

    costs: Sequence[Cost]
    sample: Cost
    num_samples: int
    kept: Mapping[float, int]
    epochs: int
    hosts: Mapping[str, Host]
    details: Sequence[str]
    measure: Callable[[int], tuple[Sequence[str], Speeds] | None]
    problems: Sequence[str] = ()


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a run takes, as its task counts it.

    Attributes:
      title: What is planned, in words.
      num_devices: Devices of the run, over all processes.
      jobs: What they do in each stage.
      work: What is done with the data; None: there are none, and `jobs` is all that is known.
      elsewhere: Other machines, to compare with, and the stages' jobs on them.
    """

    title: str
    num_devices: int = 1
    jobs: Mapping[str, DeviceJob] = dataclasses.field(default_factory=dict)
    work: Work | None = None
    elsewhere: Mapping[Machine, Mapping[str, DeviceJob]] = dataclasses.field(default_factory=dict)

    def print(self, echo: Callable[[str], None], *, details: bool = False) -> list[str]:
        """Prints time, memory and break-even; returns what does not fit.

        Args:
          echo: Takes each line meant for the user.
          details: Also prints passes, operations, bytes, and what memory is made of.
        """
        echo(self.title)
        here = this_machine(self.num_devices)
        measured = self.work.measure(here.limit) if self.work is not None else None
        if self.work is not None and measured is None:
            echo("\ntime: not measured, since scoring does not fit")
        elif self.work is not None and measured is not None:
            echo(f"\n{_time_table(self.work.costs, measured[1])}\n")
            echo("(without compiling, and as fast as just measured: within a factor of 2)")
        claims = list(self._claims(here))
        if claims:
            echo(f"\n{_memory_table(claims)}\n")
        for claim in claims:
            if not (claim.fits or claim.is_here):
                echo(f"{claim.stage}, {claim.owner}: does not fit; {claim.way()}")
        if self.work is not None and measured is not None:
            _print_payback(self.work, measured[1], echo)
        if details:
            self._print_details(here, echo)
            for line in measured[0] if measured is not None else ():
                echo(f"measured: {line}")
        else:
            echo("passes, operations, bytes and parts of memory: --config.plan_details=True")
        # of a processor the host's memory is the device's, and what else is there counts as well:
        # the host's claim is the stricter one
        problems = {
            claim.stage: f"{claim.stage} takes {gib(claim.takes)} of {claim.owner}, which has "
            f"{gib(claim.limit)} to plan with ({_SHARE}); {claim.way()}"
            for claim in claims
            if claim.is_here and not claim.fits
        }
        return [*problems.values(), *(self.work.problems if self.work is not None else ())]

    def _claims(self, here: Machine) -> Iterator[_Claim]:
        for stage, job in self.jobs.items():
            for machine, some in ((here, job), *((m, j[stage]) for m, j in self.elsewhere.items())):
                way = functools.partial(ways_out, some, machine.limit)
                takes, owner = some.plan().num_bytes, f"a device of {machine.name}"
                yield _Claim(stage, owner, takes, machine.limit, way, machine is here)
                if machine is here and self.work is not None:
                    host, limit = self.work.hosts[stage], int(USABLE * host_memory())
                    takes = host.memory.num_bytes
                    way = functools.partial(host.way, takes - limit)
                    yield _Claim(stage, "a process's host", takes, limit, way, True)

    def _print_details(self, here: Machine, echo: Callable[[str], None]) -> None:
        if self.work is not None:
            echo(f"{_work_table(self.work.costs)}\n")
            for line in self.work.details:
                echo(line)
        for stage, job in self.jobs.items():
            plans = {here.name: job.plan()}
            plans |= {machine.name: jobs[stage].plan() for machine, jobs in self.elsewhere.items()}
            echo(f"\n{stage}: {job.describe()}\n\n{_parts_table('device', plans)}\n")
        echo("(parts that are never there at the same time are not added up)")
        if self.work is not None:
            plans = {stage: host.memory for stage, host in self.work.hosts.items()}
            echo(f"\n{_parts_table('process', plans)}\n")


class _Claim(NamedTuple):
    """What a stage takes of a device or host, here or on another machine."""

    stage: str
    owner: str
    takes: int
    limit: int
    way: Callable[[], str]
    is_here: bool

    @property
    def fits(self) -> bool:
        return self.takes <= self.limit


def _memory_table(claims: Sequence[_Claim]) -> str:
    rows = [
        [
            claim.stage,
            claim.owner,
            gib(claim.takes),
            gib(claim.limit),
            "yes" if claim.fits else "no",
        ]
        for claim in claims
    ]
    return markdown(["stage", "memory of", "takes", f"of ({_SHARE})", "fits"], rows)


class Payback(NamedTuple):
    """What pruning saves at a keep fraction.

    Attributes:
      keep_fraction: Kept.
      saved_seconds: Seconds that one fine-tuning run saves against one on everything.
      epochs: Epochs of one run after which the time of pruning is won back.
      runs: Runs of all their epochs after which it is.
    """

    keep_fraction: float
    saved_seconds: float
    epochs: float
    runs: float


def paybacks(
    kept: Mapping[float, int],
    num_samples: int,
    epochs: int,
    pruning_seconds: float,
    sample_seconds: float,
) -> list[Payback]:
    """Returns when pruning has paid for itself.

    Args:
      kept: Samples kept at each keep fraction.
      num_samples: n.
      epochs: Epochs of a fine-tuning run.
      pruning_seconds: Seconds of all that it takes to know what to keep.
      sample_seconds: Seconds for one sample in an epoch.
    """
    found = []
    for keep_fraction, num in kept.items():
        each = (num_samples - num) * sample_seconds  # saved by an epoch
        won_back = pruning_seconds / each if each else math.inf
        runs = won_back / epochs if epochs else math.inf
        found.append(Payback(keep_fraction, each * epochs, won_back, runs))
    return found


def payback_table(paybacks: Sequence[Payback], epochs: int) -> str:
    """Returns when pruning has paid for itself, a line per keep fraction."""

    def number(value: float) -> str:
        return "never" if math.isinf(value) else f"{value:.3g}"

    rows = [
        [f"{keep:.2f}", duration(saved), number(epochs), number(runs)]
        for keep, saved, epochs, runs in paybacks
    ]
    header = ["keep fraction", "saved by a run", "won back after: epochs", f"or runs of {epochs}"]
    return markdown(header, rows)


def _print_payback(work: Work, speeds: Speeds, echo: Callable[[str], None]) -> None:
    pruning = sum(speeds.seconds(cost) for cost in work.costs if cost.stage == "score")
    if pruning:
        each, n, epochs = speeds.seconds(work.sample), work.num_samples, work.epochs
        rows = paybacks(work.kept, n, epochs, pruning, each)
        echo(
            f"break-even: pruning takes {duration(pruning)}, a run on everything ({epochs} "
            f"epochs) {duration(n * epochs * each)}\n\n{payback_table(rows, epochs)}\n"
        )


def _time_table(costs: Sequence[Cost], speeds: Speeds) -> str:
    parts = [(cost.stage, cost.name, speeds.seconds(cost)) for cost in costs]
    if len(parts) > 1:
        parts.append(("", "all", sum(seconds for *_, seconds in parts)))
    rows = [
        [stage, part, duration(some), f"{duration(some / FACTOR)} and {duration(some * FACTOR)}"]
        for stage, part, some in parts
    ]
    return markdown(["stage", "part", "expected", "between"], rows)


def _work_table(costs: Sequence[Cost]) -> str:
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


def _parts_table(owner: str, columns: Mapping[str, MemoryPlan]) -> str:
    """Returns what memory is made of, of a device or process, a column for each name."""
    found = [{part.name: part.num_bytes for part in plan.parts} for plan in columns.values()]
    names = dict.fromkeys(name for parts in sorted(found, key=len, reverse=True) for name in parts)
    totals = [plan.num_bytes for plan in columns.values()]
    unit, name_of_unit = _unit(totals)
    rows = [
        [name, *(f"{parts[name] / unit:.2f}" if name in parts else "-" for parts in found)]
        for name in names
    ]
    rows.append(["most at any time", *(f"{total / unit:.2f}" for total in totals)])
    return markdown([f"{name_of_unit} per {owner}", *columns], rows)


def amount(num_bytes: float) -> str:
    """Returns bytes as people say them, in powers of 1000."""
    power = min(len(_UNITS) - 1, int(math.log10(num_bytes) // 3)) if num_bytes >= 1 else 0
    return f"{num_bytes / 1000**power:.3g} {_UNITS[power]}"


def gib(num_bytes: float) -> str:
    """Returns gibibytes, or mebibytes where they are few."""
    unit, name = _unit([num_bytes])
    return f"{num_bytes / unit:.2f} {name}"


def duration(seconds: float) -> str:
    """Returns a time in the unit that suits it."""
    for size, unit in ((86_400, "days"), (3_600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"


def _unit(sizes: Iterable[float]) -> tuple[int, str]:
    return (_GIB, "GiB") if max(sizes) >= _GIB else (_MIB, "MiB")
