"""The stage `plan`: what a run would take of devices, hosts and time, before it is run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from dlc_jax import checks
from dlc_jax.checks.escaping import visible
from dlc_jax.config import Config
from dlc_jax.encoders.decoder import DecoderConfig
from dlc_jax.encoders.huggingface import read_config, read_config_alone
from dlc_jax.encoders.language_model import load_tokenizer, longest_sequence, model_folder
from dlc_jax.encoders.paper_models import PAPER_MODELS
from dlc_jax.masking import AUTO
from dlc_jax.planning.image_plan import plan_images
from dlc_jax.planning.image_work import ImageWork
from dlc_jax.planning.instruction_plan import plan_devices, plan_work
from dlc_jax.planning.instruction_work import InstructionWork, Lengths
from dlc_jax.planning.machine import Mesh
from dlc_jax.planning.speed import decoding_speed
from dlc_jax.stages.score import load_configured
from dlc_jax.stages.score_instructions import load_configured_instructions
from dlc_jax.training.images import class_ids_by_name


def run_plan(config: Config, echo: Callable[[str], None]) -> None:
    """Prints what the stages asked for would take, or all if there are no others.

    Lists the data, decodes a few images and runs a program on made-up ones for two seconds. Nothing
    is written.

    Raises:
      ValueError: no such data or model; or, after everything is printed, what does not fit, and
        which setting to turn.
    """
    mesh = Mesh.of(config.mesh)
    if config.probe.num_probes == AUTO:
        config = _with_all_probes(config)
        echo("plan: probe.num_probes=auto may stop at 5 probes; planned for all of the path")
    if config.is_of_instructions:
        problems = _of_instructions(config, mesh, echo)
    else:
        problems = _of_images(config, mesh, echo)
    if mesh.note is not None:
        echo(mesh.note)
    if problems:
        raise checks.InputError(f"plan: does not fit: {'; '.join(problems)}")


def _with_all_probes(config: Config) -> Config:
    probe = config.probe
    counts = probe.for_mode(config.mode).counts(10**9)  # so many that rounding cuts no step off
    all_of_them = dataclasses.replace(probe, num_probes=len(counts.grid), placement="grid")
    return dataclasses.replace(config, probe=all_of_them)


def _of_images(config: Config, mesh: Mesh, echo: Callable[[str], None]) -> list[str]:
    config.dataset.check()
    dataset = config.dataset.load(config.dataset.train)
    checks.prototypes_can_differ(dataset.name, dataset.labels, dataset.class_names)
    num_test = 0
    if config.dataset.test is not None:
        num_test = len(class_ids_by_name(config.dataset.load(config.dataset.test), dataset))
    encoder = load_configured(config, echo).for_mode(config.mode)
    size = config.encoder.image_size
    encoder.check_image_size(size)
    decoding = decoding_speed(dataset, size)
    echo(
        f"plan: {len(dataset):,} images of {dataset.num_classes} classes "
        f"({visible(dataset.name)}), {encoder.name} of {config.encoder.weights} at {size} px"
    )
    work = ImageWork(config, encoder, dataset, mesh, num_test, decoding.pixels)
    return plan_images(work, decoding, echo)


def _of_instructions(config: Config, mesh: Mesh, echo: Callable[[str], None]) -> list[str]:
    sizes = model_sizes(config.encoder.weights)
    problems = plan_devices(config, sizes, mesh, echo)
    try:
        data = load_configured_instructions(config, config.dataset.train)
        test = config.dataset.test
        num_test = 0 if test is None else len(load_configured_instructions(config, test))
    except checks.InputError as error:  # a model can be planned for before there are data
        echo(f"note: no passes and no time, since there are no data: {error}")
        return list(problems.values())
    weights = config.encoder.weights
    tokenizer = load_tokenizer(weights) if _is_local(weights) else None
    max_length = longest_sequence(sizes, weights, config.encoder.max_length)
    lengths = Lengths.of(data, tokenizer, max_length)
    work = InstructionWork(config, sizes, mesh, len(data), num_test, lengths)
    return list((problems | plan_work(work, echo)).values())


def model_sizes(weights: str) -> DecoderConfig:
    """Returns sizes and switches of a model; those of the paper's need no network.

    Args:
      weights: As for `load_language_model`. Of a hub id, `config.json` alone is fetched.
    Raises:
      ValueError: see `load_language_model`.
    """
    if weights in PAPER_MODELS and not Path(weights).is_dir():
        return PAPER_MODELS[weights]
    if _is_local(weights) or not checks.is_hub_id(weights):
        return read_config(model_folder(weights))
    import huggingface_hub  # only when a hub id is used: the import costs half a second

    try:
        config = Path(huggingface_hub.hf_hub_download(weights, "config.json"))
        return read_config_alone(config.parent)
    except checks.InputError:
        raise
    except Exception as error:  # its errors for no network, no such id and no access vary
        raise checks.InputError(
            f"encoder.weights: {weights!r} is no local folder, and its config.json could not be "
            f"fetched from the Hugging Face hub ({checks.first_line(error)}). Without network the "
            f"plan knows {', '.join(PAPER_MODELS)}; of another model, give a folder that has its "
            "config.json."
        ) from error


def _is_local(weights: str) -> bool:
    return weights.startswith("demo:") or Path(weights).expanduser().is_dir()
