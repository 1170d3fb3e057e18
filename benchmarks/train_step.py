"""A training step against PyTorch's, same network, batch and optimiser, in turns in one process.

python -m benchmarks.train_step [--encoders=resnet18,resnet50] [--image_size=64] [--batch_size=64]
    [--dtypes=float32,bfloat16] [--compiled] [--json=FILE]

Random weights. One table: images per second of torch (NCHW, and channels last; under autocast where
the type is bfloat16; through torch.compile where asked for) and of this package, with and without
the old state's memory given to the new one, and the ratio to the best of torch's. Needs the test
extra.
"""

from __future__ import annotations

import copy
import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

import dlc_jax as dlc
from benchmarks import peers
from benchmarks.measuring import Measured, measured, print_rows, save
from dlc_jax.probes.kernel import Forward
from dlc_jax.training.images.data import Batch
from dlc_jax.training.images.step import Network, Sgd, TrainState, initial_head, train_step

_ENCODERS = flags.DEFINE_list("encoders", ["resnet18", "resnet50"], "timm's names.")
_SIZE = flags.DEFINE_integer("image_size", 64, "Pixels.")
_BATCH = flags.DEFINE_integer("batch_size", 64, "Images.")
_DTYPES = flags.DEFINE_list("dtypes", ["float32"], "Types that the network computes in.")
_COMPILED = flags.DEFINE_boolean("compiled", False, "Whether torch.compile takes part.")
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Medians are of so many.")
_JSON = flags.DEFINE_string("json", None, "Where the rows are written too.")

CLASSES, STEPS = 15, 3


def torchs(model: Any, how: peers.Torch, images: np.ndarray, labels: np.ndarray) -> Callable:
    """Returns some steps of torch."""
    import torch

    layout = torch.channels_last if how.channels_last else torch.contiguous_format
    model = model.to(peers.device(), memory_format=layout).train()
    forward = torch.compile(model) if how.compiled else model
    inputs = torch.from_numpy(images.transpose(0, 3, 1, 2).astype(np.float32) / 255)
    inputs = inputs.to(peers.device()).contiguous(memory_format=layout)
    targets = torch.from_numpy(labels).long().to(peers.device())
    sgd = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9, nesterov=True, weight_decay=1e-5)

    def steps() -> None:
        for _ in range(STEPS):
            sgd.zero_grad()
            with torch.autocast(peers.device(), torch.bfloat16, enabled=how.bfloat16):
                logits = forward(inputs)
            torch.nn.functional.cross_entropy(logits.float(), targets).backward()
            sgd.step()
        peers.synchronise()

    return steps


def ours(
    encoder: dlc.Encoder, dtype: str, donated: bool, images: np.ndarray, labels: np.ndarray
) -> Callable[[], None]:
    """Returns some steps of this package."""
    sgd, network = Sgd(0.9, 1e-5, True), Network.of(encoder, dtype)
    batch = jax.device_put(Batch.padded(images, labels, len(labels)))
    forward = Forward.of(encoder, dtype)
    num_features = jax.eval_shape(forward.__call__, encoder.params, images[:1]).shape[1]
    head = initial_head(num_features, CLASSES, encoder.head, 0)
    states = [TrainState.start(encoder.params, encoder.statistics, head, sgd)]
    step: Callable = train_step
    if donated:
        # a copy, since the encoder's own arrays would go too
        states = [jax.tree.map(jnp.copy, states[0])]
        step = jax.jit(
            train_step.__wrapped__, static_argnames=("network", "sgd"), donate_argnames="state"
        )

    def steps() -> None:
        for _ in range(STEPS):
            states[0], _ = step(network, sgd, states[0], *batch, jnp.float32(1e-3))
        jax.block_until_ready(states[0])

    return steps


def contenders(
    name: str, dtype: str, images: np.ndarray, labels: np.ndarray, folder: Path
) -> dict[str, Callable[[], Callable[[], None]]]:
    """Returns what prepares some steps, by contender."""
    from safetensors.torch import save_file

    model = peers.import_timm().create_model(name, num_classes=CLASSES)
    save_file(model.state_dict(), folder / f"{name}.safetensors")
    encoder = dlc.load_encoder(name, str(folder / f"{name}.safetensors"))
    hows = [peers.RELEASED, peers.CHANNELS_LAST] if dtype == "float32" else [peers.GOOD]
    hows += [peers.COMPILED] if _COMPILED.value and dtype == "bfloat16" else []
    found: dict[str, Callable] = {
        how.name: functools.partial(torchs, copy.deepcopy(model), how, images, labels)
        for how in hows
    }
    for donated in (False, True):
        title = f"dlc_jax {dtype}{', state donated' if donated else ''}"
        found[title] = functools.partial(ours, encoder, dtype, donated, images, labels)
    return found


def main(_: list[str]) -> None:
    generator = np.random.default_rng(0)
    shape = (_BATCH.value, _SIZE.value, _SIZE.value, 3)
    images = generator.integers(0, 256, shape, np.uint8)
    labels = generator.integers(0, CLASSES, _BATCH.value).astype(np.int32)
    device, before = jax.devices()[0].device_kind, []
    print("| encoder | by | images / s | ratio to torch's best |\n|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for name in _ENCODERS.value:
            for dtype in _DTYPES.value:
                steps = contenders(name, dtype, images, labels, Path(folder))
                for found in measured(steps, _ROUNDS.value):
                    rows = _rows(name, found, len(labels))
                    save(_JSON.value, {"device": device, "rows": [*before, *rows]})
                before += rows
                print_rows(rows)


def _rows(encoder: str, found: Measured, batch_size: int) -> list[dict[str, Any]]:
    of_torch = [some for by, some in found.seconds.items() if by.startswith("torch")]
    best = min(of_torch, default=None)
    return found.rows(
        lambda some: {
            "rate": STEPS * batch_size / some,
            "ratio": None if best is None else best / some,
        },
        encoder=encoder,
    )


if __name__ == "__main__":
    app.run(main)
