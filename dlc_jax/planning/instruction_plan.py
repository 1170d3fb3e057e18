"""The plan of a run that prunes instructions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import jax

from dlc_jax import checks
from dlc_jax.config import Config
from dlc_jax.encoders.architecture import Architecture
from dlc_jax.encoders.decoder import DecoderConfig
from dlc_jax.encoders.huggingface import read_config, read_config_alone
from dlc_jax.encoders.language_model import longest_sequence, model_folder
from dlc_jax.encoders.paper_models import PAPER_MODELS
from dlc_jax.files.hub import fetching
from dlc_jax.planning import tables
from dlc_jax.planning.break_even import Speeds, paybacks
from dlc_jax.planning.costs import num_kept, planned_stages
from dlc_jax.planning.instruction_costs import InstructionCosts
from dlc_jax.planning.machine import (
    Machine,
    Mesh,
    is_processor,
    num_here,
    resident_bytes,
    this_machine,
)
from dlc_jax.planning.memory import DeviceJob, Finetuning, Memory, Scoring, tree_bytes
from dlc_jax.planning.printing import (
    Echo,
    print_devices,
    print_host,
    print_payback,
    print_time,
)
from dlc_jax.planning.speed import block_speed
from dlc_jax.planning.ways_to_fit import ways_on_processor

_GIB = 1 << 30
REFERENCES = (Machine("1 x 80 GiB", 1, 80 * _GIB), Machine("8 x 24 GiB", 8, 24 * _GIB))
_TOKEN = 4  # bytes


def plan_devices(config: Config, sizes: DecoderConfig, mesh: Mesh, echo: Echo) -> dict[str, str]:
    """Prints what a model takes of devices, here and elsewhere; returns what does not fit here."""
    leaves = jax.tree.leaves(Architecture(sizes, config.probe.dtype).abstract_params())
    num = sum(leaf.size for leaf in leaves)
    echo(f"plan: {config.encoder.weights}, {num:,} parameters; memory of every device")
    machines = (this_machine(mesh.num_devices), *REFERENCES)
    meshes = (mesh, *(Mesh(1, 1, machine.num_devices) for machine in REFERENCES))
    problems: dict[str, str] = {}
    for stage in planned_stages(config):
        make_job = scoring if stage == "score" else finetuning
        jobs = [make_job(config, sizes, some) for some in meshes]
        problems |= print_devices(stage, _said(jobs[0]), machines, jobs, echo)
    echo("(parts that are never there at the same time are not added up)")
    return problems


def scoring(config: Config, sizes: DecoderConfig, mesh: Mesh) -> Scoring:
    """Returns what the stage `score` does; every part of the data axis has batches of its own."""
    probe = config.probe
    return Scoring(
        sizes,
        probe.dtype,
        probe.masking,
        int(probe.num_probes),
        probe.tokens_per_batch,
        longest_sequence(sizes, config.encoder.weights, config.encoder.max_length),
        mesh.fsdp,
        mesh.probe,
    )


def finetuning(config: Config, sizes: DecoderConfig, mesh: Mesh) -> Finetuning:
    """Returns what the stage `finetune` does."""
    max_length = longest_sequence(sizes, config.encoder.weights, config.encoder.max_length)
    return Finetuning(sizes, config.lora, max_length, mesh.fsdp, mesh.data * mesh.probe)


def _said(job: DeviceJob) -> str:
    if isinstance(job, Scoring):
        return (
            f"{job.num_probes} probes in {job.dtype}, {job.tokens_per_batch} tokens per batch, "
            f"{job.max_length} per sequence"
        )
    assert isinstance(job, Finetuning)
    lora = job.lora
    again = "computed again" if lora.rematerialise else "kept"
    return (
        f"LoRA of rank {lora.rank} in {lora.dtype}, {lora.rows_at_once} rows of {job.max_length} "
        f"tokens at once, activations {again}"
    )


def plan_work(work: InstructionCosts, echo: Echo) -> dict[str, str]:
    """Prints passes, memory of hosts, time and break-even; returns what does not fit."""
    costs, lengths = work.costs(), work.lengths
    echo(
        f"\n{work.num_samples:,} instructions of {lengths.whole} tokens, padding included "
        f"({lengths.said})\n\n{tables.work_table(costs)}\n"
    )
    problems = _print_host(work, echo)
    config = work.config
    tokens = config.probe.tokens_per_batch
    speed = block_speed(work.sizes, config.probe.dtype, tokens, lengths.whole)
    echo(f"measured: {speed.said}")
    speeds = Speeds.of(work.mesh, speed.flops_per_s)
    seconds = [speeds.seconds(cost) for cost in costs]
    print_time(costs, seconds, echo)
    pruning = sum(s for s, cost in zip(seconds, costs, strict=True) if cost.stage == "score")
    if pruning:
        n, epochs, fractions = work.num_samples, config.lora.epochs, config.selection.keep_fractions
        each = speeds.training_seconds(work.training_flops / work.mesh.num_devices, 0.0)
        kept = [num_kept(work.counts, fraction) for fraction in fractions]
        rows = paybacks(fractions, kept, n, epochs, pruning, each)
        print_payback(rows, epochs, pruning, n * epochs * each, echo)
    return problems


def _print_host(work: InstructionCosts, echo: Echo) -> dict[str, str]:
    config, n = work.config, work.num_samples
    jobs: dict[str, DeviceJob] = {
        "score": scoring(config, work.sizes, work.mesh),
        "finetune": finetuning(config, work.sizes, work.mesh),
    }
    lora = Architecture(work.sizes, config.lora.dtype, config.lora.adapter)
    held = {
        "score": Memory("losses", 4 * n * int(config.probe.num_probes)),
        "finetune": Memory(
            "checkpoint on its way to disk", 2 * tree_bytes(lora.abstract_adapter())
        ),
    }
    stages = {}
    for stage in planned_stages(config):
        on_devices = jobs[stage].plan().num_bytes * num_here(local=True) * is_processor()
        stages[stage] = [
            Memory("programs, libraries, instructions", resident_bytes()),
            Memory("tokens", _TOKEN * n * work.lengths.whole),
            held[stage],
            Memory("what devices hold", on_devices),
        ]
    return print_host(stages, {stage: _fewer(jobs[stage]) for stage in stages}, echo)


def _fewer(job: DeviceJob) -> Callable[[int], str]:
    def way(excess: int) -> str:
        if is_processor():
            return ways_on_processor(job, excess)
        return "try fewer instructions, or a host with more memory"

    return way


def model_sizes(weights: str) -> DecoderConfig:
    """Returns sizes and switches of a model; those of the paper's need no network.

    Args:
      weights: As for `load_language_model`. Of a hub id, `config.json` alone is fetched.
    Raises:
      ValueError: see `load_language_model`.
    """
    if weights in PAPER_MODELS and not Path(weights).is_dir():
        return PAPER_MODELS[weights]
    if is_local(weights) or not checks.is_hub_id(weights):
        return read_config(model_folder(weights))
    with fetching(
        f"encoder.weights: {weights!r} is no local folder, and its config.json could not be",
        f"Without network the plan knows {', '.join(PAPER_MODELS)}; of another model, give a "
        "folder that has its config.json.",
    ) as hub:
        return read_config_alone(Path(hub.hf_hub_download(weights, "config.json")).parent)


def is_local(weights: str) -> bool:
    """Whether a model is bundled or in a folder here."""
    return weights.startswith("demo:") or Path(weights).expanduser().is_dir()
