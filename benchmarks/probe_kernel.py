"""Images x probes per second: this package's program against torch's, in turns in one process.

python -m benchmarks.probe_kernel [--encoders=resnet18,timm:resnet18,vit_small_patch16_224]
    [--batch_size=16] [--num_probes=3] [--chunks=1,5] [--unrolls=1,2] [--attentions=xla,cudnn]
    [--compiled] [--json=FILE]

Images of 224 px are in memory and normalised; random weights. Prints medians of the rounds, the
share of the largest rate of a matrix product measured in the same run, and the ratio to torch as
the released code runs it, NCHW in float32. The first chunk, unroll and attention make the base
variant; the others change one of them each. A variant that the device does not support is listed
with its error. Needs the test extra.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import app, flags

from benchmarks import peers
from benchmarks.measuring import (
    NUM_CLASSES,
    Measured,
    measured,
    peak,
    print_rows,
    probe_arguments,
    random_encoder,
    save,
    traced_with,
)
from dlc_jax.distributed import one_device
from dlc_jax.encoders import Encoder
from dlc_jax.encoders.converted import architecture_of
from dlc_jax.planning.programs import count_flops
from dlc_jax.probes.kernel import COMPILER_OPTIONS, Forward, losses_of_batches

_ENCODERS = flags.DEFINE_list(
    "encoders", ["resnet18", "vit_small_patch16_224"], "timm's names; timm:<name>: converted."
)
_SIZE = flags.DEFINE_integer("image_size", 224, "Pixels.")
_BATCH = flags.DEFINE_integer("batch_size", 16, "Images.")
_PROBES = flags.DEFINE_integer("num_probes", 3, "Per call.")
_CHUNKS = flags.DEFINE_list("chunks", ["1"], "Probes side by side.")
_UNROLLS = flags.DEFINE_list("unrolls", ["1"], "Probes per iteration of the loop over them.")
_ATTENTIONS = flags.DEFINE_list("attentions", [""], "As JAX names them; '': its own choice.")
_DTYPES = flags.DEFINE_list("dtypes", ["float32", "bfloat16"], "Of the network.")
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Medians are of so many.")
_COMPILED = flags.DEFINE_boolean("compiled", False, "Whether torch.compile takes part.")
_TORCH = flags.DEFINE_boolean("torch", True, "Whether torch takes part.")
_JSON = flags.DEFINE_string("json", None, "Where the rows are written too.")


class Way(NamedTuple):
    """How the program computes.

    Attributes:
      dtype: What the network computes in.
      chunk: Probes side by side.
      unroll: Probes per iteration of the loop over them, one after another.
      attention: `implementation` of `jax.nn.dot_product_attention`.
    """

    dtype: str
    chunk: int
    unroll: int
    attention: str

    @property
    def name(self) -> str:
        """In tables."""
        unroll = f", unroll {self.unroll}" if self.unroll > 1 else ""
        attention = f", attention {self.attention}" if self.attention else ""
        return f"dlc_jax {self.dtype}, chunk {self.chunk}{unroll}{attention}"


def ways() -> Iterator[Way]:
    """Yields what is asked for."""
    chunks, unrolls = list(map(int, _CHUNKS.value)), list(map(int, _UNROLLS.value))
    for dtype in _DTYPES.value:
        plain = Way(dtype, chunks[0], unrolls[0], _ATTENTIONS.value[0])
        yield plain
        yield from (plain._replace(chunk=chunk) for chunk in chunks[1:])
        yield from (plain._replace(unroll=unroll) for unroll in unrolls[1:])
        yield from (plain._replace(attention=name) for name in _ATTENTIONS.value[1:])


def ours(encoder: Encoder, way: Way, images: np.ndarray) -> Callable[[], None]:
    """Returns one call of the program, compiled."""
    forward = Forward.of(encoder, way.dtype)
    prunable, arguments = probe_arguments(encoder, forward, _PROBES.value, images)

    def program(*arguments: Any) -> tuple[jax.Array, jax.Array]:
        losses = losses_of_batches.__wrapped__
        return losses(forward, prunable, way.chunk, one_device(), *arguments)

    with traced_with(unroll=way.unroll, attention=way.attention):
        jitted = jax.jit(program, compiler_options=COMPILER_OPTIONS)
        compiled = jitted.lower(*arguments).compile()

    def call() -> None:
        jax.block_until_ready(compiled(*arguments))

    return call


def torchs(name: str, how: peers.Torch, images: np.ndarray) -> Callable[[], None]:
    """Returns the same by torch."""
    import torch

    model = peers.torch_model(architecture_of(name))
    if hasattr(model, "set_input_size"):
        model.set_input_size(images.shape[1:3])
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
    device = jax.devices()[0].device_kind
    before: list[dict[str, Any]] = []
    for name in _ENCODERS.value:
        encoder = random_encoder(name, size)
        contenders: dict[str, Callable[[], Callable[[], None]]] = {
            way.name: functools.partial(ours, encoder, way, images)
            for way in ways()
            if architecture_of(name).startswith("vit") or not way.attention
        }
        if _TORCH.value:
            hows = [peers.RELEASED, peers.CHANNELS_LAST, peers.GOOD]
            hows += [peers.COMPILED] if _COMPILED.value else []
            contenders |= {how.name: functools.partial(torchs, name, how, images) for how in hows}
        forward = Forward.of(encoder, "float32")
        flops = count_flops(lambda p, i, f=forward: f(p, i), encoder.params, images[:1])
        for found in measured(contenders, _ROUNDS.value):
            rows = _rows(name, found, flops, peaks)
            save(_JSON.value, {"device": device, "peaks": peaks, "rows": [*before, *rows]})
        before += rows
        print_rows(rows)


def _rows(
    encoder: str, found: Measured, flops: int, peaks: dict[str, float]
) -> list[dict[str, Any]]:
    released = found.seconds.get(peers.RELEASED.name)
    rows = found.rows(
        lambda some: {
            "rate": _BATCH.value * _PROBES.value / some,
            "share": None,
            "ratio": None if released is None else released / some,
        },
        encoder=encoder,
    )
    for row in rows:
        dtype = "bfloat16" if "bfloat16" in row["by"] else "float32"
        if "error" not in row and dtype in peaks:
            row["share"] = row["rate"] * flops / peaks[dtype]
    return rows


if __name__ == "__main__":
    app.run(main)
