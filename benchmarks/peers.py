"""What the benchmarks are compared with: torch, as the released code uses it, and used well."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from dlc_jax.encoders.converted import timm_library


class Torch(NamedTuple):
    """How torch computes.

    Attributes:
      name: In tables.
      channels_last: Memory layout of activations and kernels.
      bfloat16: Whether under autocast.
      compiled: Whether through `torch.compile`.
    """

    name: str
    channels_last: bool = False
    bfloat16: bool = False
    compiled: bool = False


# torch's own settings, as the released code leaves them: on GPUs its convolutions use TF32
RELEASED = Torch("torch NCHW float32")
CHANNELS_LAST = Torch("torch channels_last float32", channels_last=True)
GOOD = Torch("torch channels_last bfloat16", channels_last=True, bfloat16=True)
COMPILED = Torch("torch compiled bfloat16", channels_last=True, bfloat16=True, compiled=True)


def import_timm() -> Any:
    """Returns timm, also where torchvision's operators do not match the torch build."""
    _, timm = timm_library("benchmarks")
    return timm


def torch_model(name: str, checkpoint: str | None = None) -> Any:
    """Returns a network of timm without its head, in evaluation mode, on the GPU if there is one.

    Args:
      name: timm's.
      checkpoint: Its weights, safetensors, perhaps of narrower layers; None: as initialised.
    """
    import torch

    timm = import_timm()
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=0, global_pool="")
    if checkpoint is not None:
        from safetensors.torch import load_file

        model.load_state_dict(load_file(checkpoint), strict=False)
    return model.eval().to(device())


def device() -> str:
    """Returns where torch computes."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def synchronise() -> None:
    """Waits until a GPU has done what it was told."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def masked_weights(model: Any, step: float, num_probes: int) -> list[list[Any]]:
    """Returns the masked weights of convolutions and linear layers, for every probe.

    By the magnitude of all of them, an equal share more each time: exact counts do not matter to
    a measurement of time.
    """
    import torch

    layers = prunable_layers(model)
    sizes = torch.cat([layer.weight.detach().abs().flatten() for layer in layers])
    ordered = sizes.sort().values
    cuts = [ordered[int(k * step * len(ordered))] for k in range(num_probes)]
    return [
        [layer.weight.detach() * (layer.weight.abs() >= cut) for layer in layers] for cut in cuts
    ]


def prunable_layers(model: Any) -> list[Any]:
    """Returns the layers that the released code masks."""
    import torch

    return [m for m in model.modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))]


def losses_of_batch(
    model: Any, how: Torch, weights: list[list[Any]], prototypes: Any, labels: Any
) -> Callable[[Any], np.ndarray]:
    """Returns what gives the losses [m, b] of a batch of normalised images [b, 3, s, s].

    Inverse distances to the class prototypes are the logits, as in the released code.
    """
    import torch

    layers = prunable_layers(model)
    layout = torch.channels_last if how.channels_last else torch.contiguous_format
    model = model.to(memory_format=layout)
    forward = torch.compile(model) if how.compiled else model

    def compute(images: Any) -> np.ndarray:
        rows = []
        images = images.contiguous(memory_format=layout)
        with torch.inference_mode():
            for masked in weights:
                for layer, weight in zip(layers, masked, strict=True):
                    layer.weight.data = weight
                with torch.autocast(device(), torch.bfloat16, enabled=how.bfloat16):
                    output = forward(images)
                features = (
                    output.float().flatten(2).mean(2)
                    if output.ndim == 4
                    else output.float().mean(1)
                )
                logits = 1 / torch.cdist(features, prototypes)
                rows.append(torch.nn.functional.cross_entropy(logits, labels, reduction="none"))
        return torch.stack(rows).cpu().numpy()

    return compute
