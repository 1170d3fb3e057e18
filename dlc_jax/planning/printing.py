"""Parts of a plan that images and instructions share; they return what does not fit, by stage."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from dlc_jax.planning import tables
from dlc_jax.planning.break_even import Payback
from dlc_jax.planning.costs import Cost
from dlc_jax.planning.machine import USABLE, Machine, host_memory
from dlc_jax.planning.memory import DeviceJob, Memory
from dlc_jax.planning.ways_to_fit import fits, ways_out

_SHARE = f"{USABLE:.0%}".replace("%", " %")
Echo = Callable[[str], None]


def print_devices(
    stage: str, said: str, machines: Sequence[Machine], jobs: Sequence[DeviceJob], echo: Echo
) -> dict[str, str]:
    """Prints what a stage takes of devices.

    Args:
      stage, said: Name of the stage, and its settings in words.
      machines: This one first, whose misfit counts; others are only printed.
      jobs: On each of them.
      echo: Takes each line meant for the user.
    """
    plans = [job.plan() for job in jobs]
    echo(f"\n{stage}: {said}\n\n{tables.device_table(machines, plans)}\n")
    problems = {}
    for machine, job, plan in zip(machines, jobs, plans, strict=True):
        if fits(job, machine):
            continue
        ways = ways_out(job, machine)
        echo(f"{stage}, {machine.name}: does not fit; {ways}")
        if machine is machines[0]:
            problems[stage] = (
                f"{stage} takes {tables.gib(plan.num_bytes)} of every device, {machine.name} has "
                f"{tables.gib(machine.limit)} to plan with ({_SHARE}); {ways}"
            )
    return problems


def print_host(
    stages: dict[str, list[Memory]], ways: dict[str, Callable[[int], str]], echo: Echo
) -> dict[str, str]:
    """Prints what a process takes of its host.

    Args:
      stages: Parts of memory by stage.
      ways: Stage -> function from the bytes that are too many to the setting to turn.
      echo: See `print_devices`.
    """
    limit = int(USABLE * host_memory())
    echo(f"\n{tables.host_table(stages, limit)}\n")
    problems = {}
    for stage, parts in stages.items():
        total = sum(part.num_bytes for part in parts)
        if total > limit:
            problems[stage] = (
                f"{stage} takes {tables.gib(total)} of a process's host, which has "
                f"{tables.gib(limit)} to plan with ({_SHARE}); {ways[stage](total - limit)}"
            )
    return problems


def print_time(costs: Sequence[Cost], seconds: Sequence[float], echo: Echo) -> None:
    """Prints how long every part is expected to take."""
    echo(f"\n{tables.time_table(costs, seconds)}\n")
    echo("(without compiling, and as fast as in the seconds measured: within a factor of 2)")


def print_payback(
    paybacks: Sequence[Payback], epochs: int, pruning: float, full: float, echo: Echo
) -> None:
    """Prints after how much fine-tuning pruning has paid for itself.

    Args:
      paybacks: Savings, one entry per keep fraction.
      epochs: Epochs of a run.
      pruning: Seconds of pruning.
      full: Seconds of a run on everything.
      echo: See `print_devices`.
    """
    echo(
        f"\nbreak-even: pruning takes {tables.duration(pruning)}, a run on everything "
        f"({epochs} epochs) {tables.duration(full)}\n\n{tables.payback_table(paybacks, epochs)}\n"
    )
