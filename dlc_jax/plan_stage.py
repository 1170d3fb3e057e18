"""The stage `plan`: what a run would take of every device, before anything is loaded."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax

from dlc_jax import checks
from dlc_jax.config import Config
from dlc_jax.encoders.architecture import Architecture
from dlc_jax.encoders.decoder import DecoderConfig
from dlc_jax.encoders.huggingface import read_config
from dlc_jax.encoders.language_model import longest_sequence, model_folder
from dlc_jax.encoders.paper_models import PAPER_MODELS
from dlc_jax.planning.memory import (
    Finetuning,
    Job,
    MemoryPlan,
    Scoring,
    first_that_fits,
    halves,
)
from dlc_jax.reports.table import markdown

_GIB = 1 << 30
_USABLE = 0.9  # of a device; the rest goes to the driver, libraries and fragmentation
_MOST_DEVICES = 256


class Machine(NamedTuple):
    """Devices that are planned for."""

    name: str
    num_devices: int
    bytes_each: int


REFERENCES = (Machine("1 x 80 GiB", 1, 80 * _GIB), Machine("8 x 24 GiB", 8, 24 * _GIB))


def run_plan(config: Config, echo: Callable[[str], None]) -> None:
    """Prints what scoring and fine-tuning would take; reads the model's `config.json` only.

    Raises:
      ValueError: no such model, or one that this decoder does not compute.
    """
    sizes = model_sizes(config.encoder.weights)
    leaves = jax.tree.leaves(Architecture(sizes, config.probe.dtype).abstract_params())
    num = sum(leaf.size for leaf in leaves)
    echo(f"plan: {config.encoder.weights}, {num:,} parameters; GiB on every device")
    machines = (_this_machine(config.mesh.fsdp), *REFERENCES)
    for stage, make_job in (("score", scoring), ("finetune", finetuning)):
        jobs = [make_job(config, sizes, machine.num_devices) for machine in machines]
        plans = [job.plan() for job in jobs]
        echo(f"\n{stage}: {_said(jobs[0])}\n\n{_table(machines, plans)}\n")
        for machine, job, plan in zip(machines, jobs, plans, strict=True):
            if not _fits(plan, machine):
                echo(f"{stage}, {machine.name}: does not fit; {_ways_out(job, machine)}")
    if config.mesh.fsdp > jax.device_count():
        echo(f"mesh.fsdp: {config.mesh.fsdp}, but {jax.device_count()} devices are here")
    echo("(parts that are never there at the same time are not added up)")


def model_sizes(weights: str) -> DecoderConfig:
    """Returns sizes and switches of a model; those of the paper's need no network.

    Args:
      weights: As for `load_language_model`. Of a hub id, `config.json` alone is fetched.
    Raises:
      ValueError: see `load_language_model`.
    """
    if weights in PAPER_MODELS and not Path(weights).is_dir():
        return PAPER_MODELS[weights]
    is_hub_id = checks.is_hub_id(weights)
    if weights.startswith("demo:") or Path(weights).expanduser().is_dir() or not is_hub_id:
        return read_config(model_folder(weights))
    import huggingface_hub  # only when a hub id is used: the import costs half a second

    try:
        return read_config(Path(huggingface_hub.hf_hub_download(weights, "config.json")).parent)
    except checks.InputError:
        raise
    except Exception as error:  # its errors for no network, no such id and no access vary
        raise checks.InputError(
            f"encoder.weights: {weights!r} is no local folder, and its config.json could not be "
            f"fetched from the Hugging Face hub ({checks.first_line(error)}). Without network the "
            f"plan knows {', '.join(PAPER_MODELS)}; of another model, give a folder that has its "
            "config.json."
        ) from error


def scoring(config: Config, sizes: DecoderConfig, num_devices: int) -> Scoring:
    """Returns what the stage `score` does."""
    probe = config.probe
    return Scoring(
        sizes,
        probe.dtype,
        probe.masking,
        probe.num_probes,
        probe.tokens_per_batch,
        longest_sequence(sizes, config.encoder.weights, config.encoder.max_length),
        num_devices,
    )


def finetuning(config: Config, sizes: DecoderConfig, num_devices: int) -> Finetuning:
    """Returns what the stage `finetune` does."""
    max_length = longest_sequence(sizes, config.encoder.weights, config.encoder.max_length)
    return Finetuning(sizes, config.lora, max_length, num_devices)


def _this_machine(num_devices: int) -> Machine:
    device = jax.devices()[0]
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        bytes_each = stats["bytes_limit"]
    else:  # devices that are the host's processor share its memory
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        bytes_each = memory // max(num_devices, jax.device_count())
    return Machine(f"{num_devices} x {device.device_kind}", num_devices, bytes_each)


def _fits(plan: MemoryPlan, machine: Machine) -> bool:
    return plan.num_bytes <= _USABLE * machine.bytes_each


def _said(job: Job) -> str:
    if isinstance(job, Scoring):
        return (
            f"{job.num_probes} probes in {job.dtype}, {job.tokens_per_batch} tokens per batch, "
            f"{job.max_length} per sequence"
        )
    lora = job.lora
    again = "computed again" if lora.rematerialise else "kept"
    return (
        f"LoRA of rank {lora.rank} in {lora.dtype}, {lora.rows_at_once} rows of {job.max_length} "
        f"tokens at once, activations {again}"
    )


def _table(machines: tuple[Machine, ...], plans: list[MemoryPlan]) -> str:
    found = [{part.name: part.num_bytes for part in plan.parts} for plan in plans]
    longest = max(plans, key=lambda plan: len(plan.parts))
    names = dict.fromkeys(part.name for plan in (longest, *plans) for part in plan.parts)
    rows = [
        [name, *(f"{parts[name] / _GIB:.2f}" if name in parts else "-" for parts in found)]
        for name in names
    ]
    rows.append(["most at any time", *(f"{plan.num_bytes / _GIB:.2f}" for plan in plans)])
    rows.append(["of (90 %)", *(f"{_USABLE * m.bytes_each / _GIB:.2f}" for m in machines)])
    pairs = zip(plans, machines, strict=True)
    rows.append(["fits", *("yes" if _fits(plan, machine) else "no" for plan, machine in pairs)])
    return markdown(["GiB per device", *(machine.name for machine in machines)], rows)


def _ways_out(job: Job, machine: Machine) -> str:
    """Returns the settings each of which alone would make it fit, changed as little as can be."""
    limit = int(_USABLE * machine.bytes_each)
    ways = [way for knob in _knobs(job) if (way := first_that_fits(knob, limit)) is not None]
    if not ways:
        return f"no single setting helps, up to {_MOST_DEVICES} devices; change several"
    return f"try {', or '.join(ways)}"


def _knobs(job: Job) -> Iterator[list[tuple[str, Job]]]:
    """Yields settings with their values in the order to try."""

    def with_length(num: int) -> tuple[str, Job]:
        return f"encoder.max_length={num}", dataclasses.replace(job, max_length=num)

    def with_devices(num: int) -> tuple[str, Job]:
        return f"mesh.fsdp={num}", dataclasses.replace(job, fsdp=num)

    if isinstance(job, Scoring):
        yield [
            (f"probe.tokens_per_batch={num}", dataclasses.replace(job, tokens_per_batch=num))
            for num in halves(job.tokens_per_batch, 256)
        ]
    else:
        if not job.lora.rematerialise:
            lora = dataclasses.replace(job.lora, rematerialise=True)
            yield [("lora.rematerialise=True", dataclasses.replace(job, lora=lora))]
        yield [
            (f"lora.rows_at_once={num}", dataclasses.replace(job, lora=lora))
            for num in halves(job.lora.rows_at_once, job.fsdp)
            for lora in [dataclasses.replace(job.lora, rows_at_once=num)]
        ]
    yield [with_length(num) for num in halves(job.max_length, 128)]
    doubled = [job.fsdp << i for i in range(1, 9) if job.fsdp << i <= _MOST_DEVICES]
    yield [with_devices(num) for num in doubled]
