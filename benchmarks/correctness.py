"""Whether a device computes what a CPU does, and the same bits twice.

JAX_PLATFORMS=cpu python -m benchmarks.correctness --compute=cpu.npz --reference
export XLA_FLAGS=--xla_gpu_deterministic_ops=true
python -m benchmarks.correctness --compute=device.npz
python -m benchmarks.correctness --compute=again.npz
python -m benchmarks.correctness --compare=cpu.npz,device.npz,again.npz [--json=FILE]

The first three compute masks, losses under probes (ResNet-18, ViT-S, a small Llama), a short
fine-tuning run and LoRA steps, on the default device; `again` needs a compilation cache of its own
for its programs to be compiled anew. The last prints a row per comparison and ends with 0 also
where one does not hold. --photographs is a source of images, --weights the ResNet's; ViT-S has
random weights, whose ranks mean nothing, so that of bfloat16 its losses alone are compared.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from absl import app, flags

import dlc_jax as dlc
from benchmarks.measuring import flexrand_overlap, linear_path, random_encoder, save
from dlc_jax.masking import masked
from dlc_jax.probes.certificate import compare
from dlc_jax.probes.kernel import losses_of_batches
from dlc_jax.training.images.step import initial_head
from dlc_jax.types import KEEP_FRACTIONS, by_path

_COMPUTE = flags.DEFINE_string("compute", None, "File for the arrays that this device computes.")
_COMPARE = flags.DEFINE_list("compare", [], "Files: CPU, device, the device's second run.")
_PHOTOGRAPHS = flags.DEFINE_string("photographs", "demo:caltech15/train", "Source of images.")
_WEIGHTS = flags.DEFINE_string("weights", "demo:resnet18", "Weights of ResNet-18.")
_NUM = flags.DEFINE_integer("num_images", 750, "Images that ResNet-18 scores.")
_NUM_VIT = flags.DEFINE_integer("num_vit", 75, "Images that ViT-S scores, and ResNet-18 trains on.")
_REFERENCE = flags.DEFINE_boolean("reference", False, "Whether float32 alone is computed.")
_NUM_ROWS = flags.DEFINE_integer("num_rows", 64, "Instructions.")
_JSON = flags.DEFINE_string("json", None, "Where the rows are written too.")

_VIT = "vit_small_patch16_224"
_SIDE = {"resnet18": 64, _VIT: 224}
Arrays = dict[str, np.ndarray]


class Check(NamedTuple):
    """One comparison.

    Attributes:
      name: What is compared.
      found: How far apart, or how much of it is the same.
      expected: The condition, as text.
      holds: Whether it is as expected.
    """

    name: str
    found: float
    expected: str
    holds: bool


def computed() -> Arrays:
    """Returns what is compared, computed on the default device."""
    photographs = dlc.load_dataset(_PHOTOGRAPHS.value)
    resnet = dlc.load_encoder("resnet18", _WEIGHTS.value)
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        vit = random_encoder(_VIT)  # drawn on the device itself, weights would be others
    vit = dataclasses.replace(vit, params=jax.tree.map(np.asarray, vit.params))
    encoders = {"resnet18": resnet, _VIT: vit}
    found: Arrays = {"is_cpu": np.array(jax.default_backend() == "cpu")}
    for name, encoder in encoders.items():
        found |= {f"masks/{name}": _masks(encoder)}
    some = _spread(photographs, _NUM.value)
    size = _SIDE["resnet18"]
    before = losses_of_batches._cache_size()
    dtypes = ("float32",) if _REFERENCE.value else ("float32", "bfloat16")
    for dtype in dtypes:
        compute = dlc.Compute(batch_size=125, dtype=dtype)
        probes = dlc.probe(resnet, some, image_size=size, compute=compute)
        found |= {f"losses/resnet18/{dtype}": probes.losses, "labels/resnet18": probes.labels}
    found["programs"] = np.array(losses_of_batches._cache_size() - before)
    if jax.device_count() > 1:
        run = dlc.Run(mesh=dlc.make_mesh(probe=jax.device_count()))
        compute = dlc.Compute(batch_size=125)
        probes = dlc.probe(resnet, some, image_size=size, compute=compute, run=run)
        found["losses/probe axis"] = probes.losses
    few = _spread(photographs, _NUM_VIT.value)
    path = dlc.PathSpec(num_probes=10, placement="midpoint")
    for dtype in dtypes:
        compute = dlc.Compute(batch_size=25, dtype=dtype)
        probes = dlc.probe(vit, few, image_size=_SIDE[_VIT], path=path, compute=compute)
        found |= {f"losses/{_VIT}/{dtype}": probes.losses}
    trained = dlc.finetune(
        resnet,
        few,
        image_size=64,
        epochs=5,
        batch_size=25,
        learning_rate=1e-2,
        settings=dlc.FinetuneConfig(augment=False),
    )
    found["finetune/losses"] = np.array([epoch["train_loss"] for epoch in trained.history])
    kernel = trained.weights["head"]["kernel"]
    start = initial_head(*kernel.shape, resnet.head, 0)["kernel"]
    found["finetune/head"] = np.asarray(kernel) - start
    return found | _text()


def _spread(dataset: dlc.Dataset, num: int) -> dlc.Dataset:
    """Returns so many images, or all, evenly over the data set."""
    num = min(num, len(dataset))
    positions = np.arange(num) * len(dataset) // num
    return dlc.array_dataset(
        [dataset[int(position)].image for position in positions], dataset.labels[positions]
    )


def _masks(encoder: dlc.Encoder) -> np.ndarray:
    """Returns the SHA-256 of the masks of five steps, [5, 32]."""
    path = linear_path(encoder, 50)
    on_device = jax.jit(lambda params, probe: masked(params, path.prunable, None, probe))
    rows = []
    for k in range(0, 50, 10):
        probe = jax.tree.map(lambda part, k=k: part[k], path.thresholds)
        kept = by_path(on_device(encoder.params, probe))
        digest = hashlib.sha256()
        for name in path.prunable:
            digest.update(np.packbits(np.asarray(kept[name]) != 0))
        rows.append(np.frombuffer(digest.digest(), np.uint8))
    return np.stack(rows)


def _text() -> Arrays:
    """Returns losses of the bundled language model under probes, and of its LoRA steps."""
    data = dlc.load_instructions("demo:dolly/train").subset(np.arange(_NUM_ROWS.value))
    model = dlc.load_language_model("demo:tiny-llama", dtype="float32")
    tokens = dlc.tokenise(data, model.tokenizer, 1024)
    losses = dlc.probe_responses(model, tokens, num_probes=8, tokens_per_batch=4096).losses
    tuned = dlc.finetune_lora(
        model,
        tokens,
        epochs=2,
        batch_size=16,
        learning_rate=1e-2,
        settings=dlc.LoraConfig(warmup_steps=0),
    )
    leaves = by_path(tuned.model.params)
    changes = [leaves[path] for path in sorted(leaves) if path.endswith("lora_b")]  # from 0
    flat = np.concatenate([np.asarray(leaf).ravel() for leaf in changes])
    trained = np.array([epoch["train_loss"] for epoch in tuned.history])
    return {"losses/llama": losses, "lora/losses": trained, "lora/b": flat}


# largest difference of losses; ViT and Llama have no ReLU, where a rounding may flip a sign
_BOUNDS = {
    "losses/resnet18/float32": 1e-5,
    f"losses/{_VIT}/float32": 2e-6,
    f"losses/{_VIT}/bfloat16": 2e-3,
    "losses/llama": 1e-5,
    "finetune/losses": 1e-4,
    "lora/losses": 1e-5,
}


def compared(cpu: Arrays, device: Arrays, again: Arrays) -> Iterator[Check]:
    """Yields every comparison."""
    is_cpu = bool(device["is_cpu"])
    yield Check("the device is no CPU", not is_cpu, "1", not is_cpu)
    for name in ("resnet18", _VIT):
        pairs = zip(device[f"masks/{name}"], cpu[f"masks/{name}"], strict=True)
        same = np.mean([np.array_equal(ours, theirs) for ours, theirs in pairs])
        yield _all(f"masks/{name}: the same bits as on the CPU", same)
    for name, bound in _BOUNDS.items():
        reference = cpu[name.replace("bfloat16", "float32")]
        apart = float(np.abs(device[name] - reference).max())
        yield Check(f"{name}: from the CPU's", apart, f"<= {bound:g}", apart <= bound)
    for name in ("finetune/head", "lora/b"):
        distance = np.linalg.norm(device[name] - cpu[name])
        apart = float(distance / np.linalg.norm(cpu[name]))
        yield Check(f"{name}: change, from the CPU's, of its norm", apart, "<= 0.01", apart <= 1e-2)
    same = np.mean([np.array_equal(device[name], again[name]) for name in device])
    yield _all("everything: the same bits twice", same)
    num = int(device["programs"])
    yield Check("programs for 50 probes in two types", num, "2", num == 2)
    if "losses/probe axis" in device:
        same = np.mean(device["losses/probe axis"] == device["losses/resnet18/float32"])
        yield _all("probe axis: the same bits as on one device", same)
    yield from _selections(cpu, device)


def _all(name: str, share: np.floating) -> Check:
    return Check(name, float(share), "1", bool(share == 1))


def _selections(cpu: Arrays, device: Arrays) -> Iterator[Check]:
    labels = cpu["labels/resnet18"]
    reference = cpu["losses/resnet18/float32"].mean(axis=0)
    for dtype, least in (("float32", 1.0), ("bfloat16", 0.98)):
        scores = device[f"losses/resnet18/{dtype}"].mean(axis=0)
        found = compare(reference, scores, labels)
        shared = {"easiest": min(found.easiest.values()), "hardest": min(found.hardest.values())}
        shared["flexrand"] = min(
            flexrand_overlap(reference, scores, labels, fraction) for fraction in KEEP_FRACTIONS
        )
        for method, share in shared.items():
            title = f"kept/{dtype}/{method}: shared with the CPU's, least of all fractions"
            yield Check(title, share, f">= {least:g}", share >= least)
        if dtype == "bfloat16":
            title = "ranks/bfloat16: Spearman within classes"
            yield Check(title, found.spearman, ">= 0.999", found.spearman >= 0.999)


def main(_: list[str]) -> None:
    if _COMPUTE.value:
        np.savez(_COMPUTE.value, **computed())
        return
    files = [Path(name) for name in _COMPARE.value]
    if len(files) != 3:
        raise app.UsageError("--compute=FILE, or --compare=CPU,DEVICE,AGAIN")
    expect = list(compared(*[dict(np.load(file)) for file in files]))
    print("| | found | expected | holds |\n|---|---|---|---|")
    for check in expect:
        print(f"| {check.name} | {check.found:.4g} | {check.expected} | {check.holds} |")
    save(_JSON.value, [check._asdict() for check in expect])


if __name__ == "__main__":
    app.run(main)
