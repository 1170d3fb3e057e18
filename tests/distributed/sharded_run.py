"""Run by a test in its own process with eight devices: a model over all, four and one of them."""

import json
import sys
from pathlib import Path

import conftest  # noqa: F401  checks annotations at run time
import jax
import numpy as np

from dlc_jax.distributed import make_mesh, on_every_device, over_devices
from dlc_jax.encoders.language_model import LanguageModel, door_of, load_language_model
from dlc_jax.exports.peft import write_merged
from dlc_jax.masking import prunable_paths
from dlc_jax.masking.thresholds import Thresholds
from dlc_jax.planning.decoder_memory import Finetuning, Scoring
from dlc_jax.preprocess.tokens import Tokenised
from dlc_jax.probes.text import _probe_losses, probe_responses, response_losses
from dlc_jax.training.loop import train
from dlc_jax.training.lora.settings import LoraConfig
from dlc_jax.training.lora.step import Sums, TokenRows, add_rows, initial_adapter
from dlc_jax.training.lora.tuner import LoraTuner
from dlc_jax.types import by_path

NUM_PROBES, ROWS, LENGTH = 4, 8, 128
LORA = {"optimiser": "adamw", "learning_rate": 0.5, "warmup_steps": 0, "dtype": "float32"}


def main(folder: str, out: str) -> None:
    """All of it for a decoder; of a converted model what it computes."""
    if door_of(Path(folder)).config is not None:
        of_decoder(folder, out)
        return
    found = {}
    for name, mesh in (("one", None), ("many", make_mesh(fsdp=4, devices=jax.devices()[:4]))):
        model = load_language_model(folder, dtype="float32", mesh=mesh)
        data = _data(model.config.vocab_size)
        found[name] = _losses(model, data) | _two_steps(model, data, ("o_proj", "down_proj"))
        found[name] |= {"held": _held(model.params), "fingerprint": model.fingerprint}
    write_merged(model, Path(out).parent / "merged")
    Path(out).write_text(json.dumps(found))


def of_decoder(folder: str, out: str) -> None:
    mesh = make_mesh(fsdp=8)
    one, many = (load_language_model(folder, dtype="float32", mesh=on) for on in (None, mesh))
    found = {"weights": _size(many.params), "held": _held(many.params)}
    found |= {"planned": _planned(many)}
    found |= {"compiled": _compiled(many)}
    data = _data(one.config.vocab_size)
    for name, model in (("one", one), ("many", many)):
        found[name] = _losses(model, data) | _two_steps(model, data)
    four = load_language_model(folder, dtype="float32", mesh=make_mesh(data=2, fsdp=4))
    found["two times four"] = _losses(four, data)
    write_merged(many, Path(out).parent / "merged")
    Path(out).write_text(json.dumps(found))


def _data(vocab_size: int) -> Tokenised:
    generator = np.random.default_rng(0)
    lengths = generator.integers(33, 65, 13)  # one bucket; no multiple of anything
    tokens = tuple(generator.integers(2, vocab_size, n).astype(np.int32) for n in lengths)
    num_prompt = (lengths // 2).astype(np.int32)
    ids = np.array([f"row {i}" for i in range(13)])
    return Tokenised(tokens, num_prompt, np.zeros(13, bool), ids)


def _losses(model: LanguageModel, data: Tokenised) -> dict[str, list]:
    """Returns those of the whole model, and under every probe."""
    probes = probe_responses(model, data, num_probes=NUM_PROBES, tokens_per_batch=512)
    losses = response_losses(model, data, tokens_per_batch=512)
    return {"losses": losses.tolist(), "probes": probes.losses.tolist()}


def _held(params) -> list[int]:
    """Returns the bytes on every device."""
    held = {device: 0 for device in jax.devices()}
    for leaf in jax.tree.leaves(params):
        for shard in leaf.addressable_shards:
            held[shard.device] += shard.data.nbytes
    return list(held.values())


def _two_steps(
    model: LanguageModel, data: Tokenised, targets: tuple[str, ...] = ("q_proj", "down_proj")
) -> dict[str, list[float]]:
    """Returns how every fifth value of A and of B moved; SGD, since it goes by size, not sign."""
    # few matrices, for the time that compiling takes
    fast = {"targets": targets, "rematerialise": False}
    settings = LoraConfig(
        epochs=2, batch_size=13, rows_at_once=5, **{**LORA, **fast, "optimiser": "sgd"}
    )
    tuner = LoraTuner(model, data, settings)
    leaves = by_path(train(tuner, np.arange(13), seed=0).model.params)
    moved: dict[str, list[float]] = {"lora_a": [], "lora_b": []}
    for path, start in by_path(initial_adapter(tuner._architecture, 0)).items():
        change = (np.asarray(leaves[path]) - start).ravel()[::5]
        moved[path.rpartition("/")[2]] += change.tolist()
    return moved


def _planned(model: LanguageModel) -> dict[str, dict[str, int]]:
    config = model.config
    jobs = {
        "probe": Scoring(config, "float32", "l1", NUM_PROBES, ROWS * LENGTH, LENGTH, 8),
        "again": Finetuning(config, _lora(True), LENGTH, 8),
        "kept": Finetuning(config, _lora(False), LENGTH, 8),
    }
    found = {name: dict(part[:2] for part in job.plan().parts) for name, job in jobs.items()}
    return {name: parts | {"total": jobs[name].plan().num_bytes} for name, parts in found.items()}


def _lora(rematerialise: bool) -> LoraConfig:
    return LoraConfig(rows_at_once=ROWS, rematerialise=rematerialise, **LORA)


def _compiled(model: LanguageModel) -> dict[str, int]:
    """Returns the bytes of arguments and of what XLA needs besides, on every device."""
    tokens = np.ones((ROWS, LENGTH), np.int32)
    prunable = prunable_paths(model.params, model.is_prunable)
    thresholds = on_every_device(
        model.params,
        Thresholds(np.zeros(NUM_PROBES, np.int32), np.zeros((NUM_PROBES, len(prunable)), np.int32)),
    )
    arrays = over_devices(model.params, (tokens, tokens))
    programs = {
        "probe": _probe_losses.lower(
            model.architecture, prunable, model.params, None, thresholds, *arrays
        )
    }
    for name, rematerialise in (("again", True), ("kept", False)):
        tuner = LoraTuner(model, _data(8), _lora(rematerialise))
        adapter = on_every_device(model.params, initial_adapter(tuner._architecture, 0))
        sums = on_every_device(model.params, Sums.zero(adapter))
        rows = over_devices(model.params, TokenRows(tokens, tokens, tokens > 0))
        programs[name] = add_rows.lower(tuner._architecture, model.params, adapter, rows, sums)
    found = {}
    for name, program in programs.items():
        memory = program.compile().memory_analysis()
        found[name] = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    return found


def _size(params) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))


if __name__ == "__main__":
    main(*sys.argv[1:])
