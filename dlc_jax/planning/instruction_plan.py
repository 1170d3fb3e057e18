"""The plan of a run that prunes instructions."""

from __future__ import annotations

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
from dlc_jax.planning.costs import Cost, Speeds, num_kept, planned_stages
from dlc_jax.planning.decoder_memory import Finetuning, Scoring
from dlc_jax.planning.instruction_costs import InstructionCosts
from dlc_jax.planning.machine import Machine, Mesh, is_processor, resident_bytes
from dlc_jax.planning.memory import (
    DeviceJob,
    Memory,
    MemoryPlan,
    held_by_devices,
    tree_bytes,
    ways_on_processor,
)
from dlc_jax.planning.plan import Host, Plan, Work
from dlc_jax.planning.speed import block_speed

_GIB = 1 << 30
REFERENCES = (Machine("1 x 80 GiB", 1, 80 * _GIB), Machine("8 x 24 GiB", 8, 24 * _GIB))
_TOKEN = 4  # bytes


def plan_of_instructions(
    config: Config, sizes: DecoderConfig, mesh: Mesh, costs: InstructionCosts | None
) -> Plan:
    """Returns the plan.

    Args:
      config: Checked configuration.
      sizes: Sizes and switches of the model.
      mesh: Devices that are planned for.
      costs: What is computed; None: there are no data, and only the model is planned for.
    """
    leaves = jax.tree.leaves(Architecture(sizes, config.probe.dtype).abstract_params())
    num = sum(leaf.size for leaf in leaves)
    title = f"plan: {config.encoder.weights}, {num:,} parameters"
    if costs is not None:
        lengths = costs.lengths
        title += (
            f"; {costs.num_samples:,} instructions of {lengths.whole} tokens, padding included "
            f"({lengths.measured})"
        )
    return Plan(
        title,
        mesh.num_devices,
        _jobs(config, sizes, mesh),
        None if costs is None else _work(costs),
        {some: _jobs(config, sizes, Mesh(1, 1, some.num_devices)) for some in REFERENCES},
    )


def _jobs(config: Config, sizes: DecoderConfig, mesh: Mesh) -> dict[str, DeviceJob]:
    """Returns what devices do; every part of the data axis has batches of its own."""
    probe = config.probe
    max_length = longest_sequence(sizes, config.encoder.weights, config.encoder.max_length)
    scoring = Scoring(
        sizes,
        probe.dtype,
        probe.masking,
        int(probe.num_probes),
        probe.tokens_per_batch,
        max_length,
        mesh.fsdp,
        mesh.probe,
    )
    finetuning = Finetuning(sizes, config.lora, max_length, mesh.fsdp, mesh.data * mesh.probe)
    jobs: dict[str, DeviceJob] = {"score": scoring, "finetune": finetuning}
    return {stage: jobs[stage] for stage in planned_stages(config)}


def _work(costs: InstructionCosts) -> Work:
    config, n, length = costs.config, costs.num_samples, costs.lengths.whole
    lora = Architecture(costs.sizes, config.lora.dtype, config.lora.adapter)
    adapter = tree_bytes(lora.abstract_adapter())
    held = {
        "score": Memory("losses", 4 * n * int(config.probe.num_probes)),
        "finetune": Memory("checkpoint on its way to disk", 2 * adapter),
    }

    def host(stage: str, job: DeviceJob) -> Host:
        def way(excess: int) -> str:
            if is_processor():
                return ways_on_processor(job, excess)
            return "try fewer instructions, or a host with more memory"

        memory = MemoryPlan.of(
            Memory("programs, libraries, instructions", resident_bytes()),
            Memory("tokens", _TOKEN * n * length),
            held[stage],
            held_by_devices(job),
        )
        return Host(memory, way)

    def measure(_: int) -> tuple[list[str], Speeds]:
        tokens = config.probe.tokens_per_batch
        rate, what = block_speed(costs.sizes, config.probe.dtype, tokens, length)
        return [what], Speeds.of(costs.mesh, rate)

    flops = costs.training_flops
    sample = Cost("finetune", "a sample", 1, 1, flops, flops // costs.mesh.num_devices)
    fractions = config.selection.keep_fractions
    kept = {fraction: num_kept(costs.counts, fraction) for fraction in fractions}
    jobs = _jobs(config, costs.sizes, costs.mesh)
    hosts = {stage: host(stage, job) for stage, job in jobs.items()}
    return Work(costs.costs(), sample, n, kept, config.lora.epochs, hosts, [], measure)


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
