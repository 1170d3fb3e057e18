"""The stage `plan`: what a run would take of devices, hosts and time, before it is run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from dlc_jax import expect
from dlc_jax.config import Config
from dlc_jax.masking import AUTO
from dlc_jax.planning.machine import MeshSize
from dlc_jax.tasks import task_of


def run_plan(config: Config, echo: Callable[[str], None]) -> None:
    """Prints what the stages asked for would take, or all if there are no others.

    Lists the data, decodes a few images and runs a program on made-up ones for two seconds. Nothing
    is written.

    Raises:
      ValueError: no such data or model; or, after everything is printed, what does not fit, and
        which setting to turn.
    """
    mesh = MeshSize.of(config.mesh)
    if config.probe.num_probes == AUTO:
        config = _with_all_probes(config)
        echo("plan: probe.num_probes=auto may stop at 5 probes; planned for all of the path")
    problems = task_of(config, echo).plan(mesh).print(echo, details=config.plan_details)
    if mesh.note is not None:
        echo(mesh.note)
    if problems:
        raise expect.InputError(f"plan: does not fit: {'; '.join(problems)}")


def _with_all_probes(config: Config) -> Config:
    probe = config.probe
    counts = probe.for_mode(config.mode).counts(10**9)  # so many that rounding cuts no step off
    all_of_them = dataclasses.replace(probe, num_probes=len(counts.grid), placement="grid")
    return dataclasses.replace(config, probe=all_of_them)
