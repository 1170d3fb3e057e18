"""Images x probes per second: this package's program against torch's, in turns in one process.

python -m benchmarks.probe_kernel [--encoders=resnet18,resnet50,vit_small_patch16_224]
    [--batch_size=16] [--num_probes=3] [--chunks=1] [--compiled] [--json=FILE]

Images of 224 px are in memory and normalised; random weights. Prints medians of the rounds, the
share of the largest rate of a matrix product measured in the same run, and the ratio to torch as
the released code runs it, NCHW in float32. Needs the test extra.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from absl import app, flags

from benchmarks import peers
from benchmarks.measuring import measured, peak, random_encoder
from dlc_jax.distributed import one_device
from dlc_jax.encoders import Encoder
from dlc_jax.masking import exact_thresholds, path_counts, prunable_paths
from dlc_jax.planning.flops import count_flops
from dlc_jax.probes.kernel import Forward, losses_of_batches
from dlc_jax.types import by_path

_ENCODERS = flags.DEFINE_list("encoders", ["resnet18", "vit_small_patch16_224"], "timm's names.")
_SIZE = flags.DEFINE_integer("image_size", 224, "Pixels.")
_BATCH = flags.DEFINE_integer("batch_size", 16, "Images.")
_PROBES = flags.DEFINE_integer("num_probes", 3, "Per call.")
_CHUNKS = flags.DEFINE_list("chunks", ["1"], "Probes side by side.")
_DTYPES = flags.DEFINE_list("dtypes", ["float32", "bfloat16"], "Of the network.")
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Medians are of so many.")
_COMPILED = flags.DEFINE_boolean("compiled", False, "Whether torch.compile takes part.")
_TORCH = flags.DEFINE_boolean("torch", True, "Whether torch takes part.")
_JSON = flags.DEFINE_string("json", None, "Where the rows are written too.")

NUM_CLASSES = 10


def ours(encoder: Encoder, dtype: str, chunk: int, images: np.ndarray) -> Callable[[], None]:
    """Returns one call of the program."""
    prunable = prunable_paths(encoder.params, encoder.is_prunable)
    leaves = by_path(encoder.params)
    num_weights = sum(leaves[path].size for path in prunable)
    counts = path_counts(num_weights, num_probes=_PROBES.value).chosen
    thresholds = jax.device_put(exact_thresholds(encoder.params, prunable, None, counts))
    params, pixels = jax.device_put(encoder.params), jax.device_put(images[None])
    labels = np.zeros((1, len(images)), np.int32)
    forward = Forward.of(encoder, dtype)
    width = jax.eval_shape(lambda p, i: forward(p, i), encoder.params, images).shape[1]
    prototypes = np.random.default_rng(0).normal(size=(NUM_CLASSES, width)).astype(np.float32)
    mesh = one_device()

    def call() -> None:
        losses_of_batches(
            forward, prunable, chunk, mesh, params, None, thresholds, prototypes, pixels, labels
        ).block_until_ready()

    return call


def torchs(name: str, how: peers.Torch, images: np.ndarray) -> Callable[[], None]:
    """Returns the same by torch."""
    import torch

    model = peers.torch_model(name)
    weights = peers.masked_weights(model, 0.02, _PROBES.value)
    inputs = torch.from_numpy(images.transpose(0, 3, 1, 2).astype(np.float32) / 255)
    inputs = inputs.to(peers.device())
    with torch.inference_mode():
        output = model(inputs[:1])
    width = output.shape[1] if output.ndim == 4 else output.shape[-1]
    prototypes = torch.randn(NUM_CLASSES, width).to(peers.device())
    labels = torch.zeros(len(images), dtype=torch.long, device=peers.device())
    compute = peers.losses_of_batch(model, how, weights, prototypes, labels)

    def call() -> None:
        compute(inputs)
        peers.synchronise()

    return call


def main(_: list[str]) -> None:
    size, batch_size = _SIZE.value, _BATCH.value
    shape = (batch_size, size, size, 3)
    images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    peaks = {dtype: peak(dtype) for dtype in _DTYPES.value}
    print(f"{jax.devices()[0].device_kind}; matrix products, TFLOP/s: ", end="")
    print(", ".join(f"{dtype} {value / 1e12:.2f}" for dtype, value in peaks.items()))
    print("| encoder | by | img x probe / s | share of peak | ratio to the released code's |")
    print("|---|---|---|---|---|", flush=True)
    rows = []
    for name in _ENCODERS.value:
        encoder = random_encoder(name)
        calls = {
            f"dlc_jax {dtype}, chunk {chunk}": ours(encoder, dtype, int(chunk), images)
            for dtype in _DTYPES.value
            for chunk in _CHUNKS.value
        }
        if _TORCH.value:
            hows = [peers.RELEASED, peers.CHANNELS_LAST, peers.GOOD]
            hows += [peers.COMPILED] if _COMPILED.value else []
            calls |= {how.name: torchs(name, how, images) for how in hows}
        forward = Forward.of(encoder, "float32")
        flops = count_flops(lambda p, i, f=forward: f(p, i), encoder.params, images[:1])
        seconds = measured(calls, _ROUNDS.value)
        for by, some in seconds.items():
            rate = batch_size * _PROBES.value / some
            dtype = "bfloat16" if "bfloat16" in by else "float32"
            share = rate * flops / peaks[dtype] if dtype in peaks else float("nan")
            ratio = seconds.get(peers.RELEASED.name, float("nan")) / some
            rows.append({"encoder": name, "by": by, "rate": rate, "share": share, "ratio": ratio})
            print(f"| {name} | {by} | {rate:.1f} | {share:.2f} | {ratio:.2f} |", flush=True)
    if _JSON.value:
        found = {"device": jax.devices()[0].device_kind, "peaks": peaks, "rows": rows}
        Path(_JSON.value).write_text(json.dumps(found))


if __name__ == "__main__":
    app.run(main)
