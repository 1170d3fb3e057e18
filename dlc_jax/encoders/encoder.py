"""A pre-trained network as a function of its parameters, and what the probes need to know."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from dlc_jax import expect
from dlc_jax.distributed import fetch
from dlc_jax.preprocess.transform import PAPER, Transform
from dlc_jax.types import Conventions, Params, by_path, path_name

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
RANDOM_KEY = "random_key"  # among the parameters while they train: what dropout draws from
# What `Encoder.pooling` may ask for.
POOLINGS = ("mean", "cls", "scalar", "own")
NO_TOKENS = ("mean", "own")  # what it may ask for of feature maps and vectors


@dataclasses.dataclass(frozen=True, eq=False)
class Encoder:
    """An encoder: parameters, a pure function of them, and which of them probes may zero.

    Bring your own network as `Encoder(params, apply, is_prunable)`, or an NNX module with
    `Encoder.from_module(module, is_prunable)`.

    Attributes:
      params: Pytree of arrays. Of a leaf named `kernel`, [h, w, in, out] or [in, out], ties between
        equal weights are in the order of torch's [out, in, h, w]; of others in their own.
      apply: `apply(params, images)` with normalised images [b, s, s, 3] gives features [b, d],
        a feature map [b, h, w, d] or tokens [b, t, d]; maps and tokens are pooled.
      is_prunable: Function from a parameter's path (`layer1/0/conv1/kernel`) to whether probes may
        zero it.
      name: For messages and provenance.
      mean, std: Normalisation of RGB in [0, 1].
      normalisation: Where mean and std come from: `explicit`, `checkpoint` or `architecture`.
      pooling: `mean` over positions or tokens, `cls`, the first token, or `scalar`, the mean over
        tokens and features that the released code takes for ViTs; `own` is what the network's own
        classifier reads, see `head`. None: `mean`, or what the released code does in official mode.
      image_size: The only image size the encoder takes, in pixels; None if it takes any.
      module_order: Sort key of prunable paths that gives the order of the original's modules, which
        decides between equal weights; None: the order of the tree.
      head: What a classifier for fine-tuning reads: `mean` over positions or tokens, `cls`, the
        first token, as timm's ViTs do, or `own`, what `apply_head` gives (`apply`, where that gives
        features); scoring uses `pooling` instead.
      apply_head: `apply_head(params, images)` gives the features [b, d] that a classifier reads,
        where they are not `apply` pooled by `head`.
      apply_training: `apply_training(params, images, real)` is `apply_head`, or without one
        `apply`, in training mode, and also returns all parameters with batch statistics moved;
        `real` [b] is 1 for samples and 0 for padding. None: fine-tuning uses the function itself.
      statistics: Paths of leaves that no gradient moves, such as running means.
      prefix: What was removed from the beginning of all names of the checkpoint.
      function: What decides the function besides the name; part of the fingerprint.
      prunable: Globs over names of the checkpoint that `is_prunable` was made of; None: a rule of
        the architecture.
      transform: How images are prepared, but for normalisation; the paper's is the default.
      batch_size: Images that the functions compute at a time, of a bundle: other numbers are filled
        up, and probes run one after another. None: any number, and probes side by side.
      drop_path, dropout: Rates of stochastic depth and of dropout while a converted network is
        fine-tuned; above 0, its params are given the entry `random_key` [2] then.
    """

    params: Params = dataclasses.field(repr=False)
    apply: Callable[[Params, Array], Array] = dataclasses.field(repr=False)
    is_prunable: Callable[[str], bool]
    name: str = "custom"
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    normalisation: str = "explicit"
    pooling: str | None = None
    image_size: int | None = None
    module_order: Callable[[str], Any] | None = None
    head: str = "mean"
    apply_head: Callable[[Params, Array], Array] | None = dataclasses.field(
        default=None, repr=False
    )
    apply_training: Callable[[Params, Array, Array], tuple[Array, Params]] | None = (
        dataclasses.field(default=None, repr=False)
    )
    statistics: frozenset[str] = dataclasses.field(default=frozenset(), repr=False)
    prefix: str = ""
    function: str = dataclasses.field(default="", repr=False)
    prunable: str | None = None
    transform: Transform = PAPER
    batch_size: int | None = None
    drop_path: float = 0.0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.pooling is not None:
            expect.one_of("encoder.pooling", self.pooling, POOLINGS)
        expect.one_of("encoder.head", self.head, ("mean", "cls", "own"))
        for path in self.statistics:
            expect.one_of("encoder.statistics", path, by_path(self.params))
        expect.normalisation(self.mean, self.std)
        expect.is_a(Transform, transform=self.transform)
        # hashable, because the compiled programs are specialised to them
        object.__setattr__(self, "mean", tuple(float(value) for value in self.mean))
        object.__setattr__(self, "std", tuple(float(value) for value in self.std))
        for path, leaf in by_path(self.params).items():
            # statistics may be limits, which are infinite where there is none
            is_bad = np.isnan if path in self.statistics else lambda x: ~np.isfinite(x)
            if jnp.issubdtype(leaf.dtype, jnp.inexact) and is_bad(leaf).any():
                raise expect.InputError(
                    f"encoder {self.name}: parameter {path} has values that are NaN or infinite."
                )

    @classmethod
    def from_module(
        cls,
        module: nnx.Module,
        is_prunable: Callable[[str], bool],
        *,
        name: str | None = None,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
        pooling: str | None = None,
        image_size: int | None = None,
        module_order: Callable[[str], Any] | None = None,
        head: str | None = None,
        transform: Transform = PAPER,
    ) -> Encoder:
        """Wraps an NNX module that maps normalised images to features, a map or tokens.

        The module is taken as it is, put into evaluation mode. Fine-tuning puts it into training
        mode; `nnx.BatchNorm` then also counts the padding of a short last batch, which repeats real
        samples (`dlc_jax.encoders.resnet.BatchNorm` does not).

        Args:
          module: Put into evaluation mode.
          is_prunable, name, mean, std, pooling, image_size, module_order, head, transform: See
            `Encoder`; None is its default.
        """
        module.eval()
        graph, state = nnx.split(module)
        given: dict[str, Any] = {"name": name, "mean": mean, "std": std, "head": head}
        return cls(
            params=nnx.to_pure_dict(state),
            is_prunable=is_prunable,
            pooling=pooling,
            image_size=image_size,
            module_order=module_order,
            transform=transform,
            **module_functions(graph, state),
            **{field: value for field, value in given.items() if value is not None},
        )

    def for_mode(self, mode: str) -> Encoder:
        """Returns the encoder with what `mode` decides filled in; explicit choices stay.

        `official`: ImageNet normalisation for every encoder (Q11), ViT tokens pooled to one
        scalar per image (Q2). One scalar makes losses ill-conditioned: float32 distances cancel,
        losses reach 1e6, and no two implementations rank samples quite alike. Images are prepared
        as the paper does it.

        Raises:
          ValueError: `official`, and a `transform` that was asked for and is not the paper's.
        """
        conventions = Conventions.of(mode)
        changes: dict = {"pooling": self.pooling or conventions.pooling}
        if conventions.imagenet_normalised and self.normalisation != "explicit":
            changes.update(mean=IMAGENET_MEAN, std=IMAGENET_STD, normalisation="official")
        if conventions.prepares_as_paper and self.transform != PAPER:
            if self.transform.is_asked_for:
                raise expect.InputError(
                    f"encoder.transform: mode {mode!r} prepares images as the paper does; expected "
                    f"'paper' ({PAPER}), got {self.transform}."
                )
            changes.update(transform=PAPER)
        return dataclasses.replace(self, **changes)

    def function_and_pooling(self, pooling: str) -> tuple[Callable[[Params, Array], Array], str]:
        """Returns what to apply for features of this pooling, and how to pool what it gives."""
        if pooling != "own":
            return self.apply, pooling
        return (self.apply, self.head) if self.apply_head is None else (self.apply_head, "own")

    def with_random_key(self, params: Params, seed: int) -> Params:
        """Returns the parameters with what dropout draws from in a run, if there is any."""
        if not (self.drop_path or self.dropout):
            return params
        return {**params, RANDOM_KEY: jax.random.PRNGKey(seed)}

    def check_image_size(self, image_size: int) -> None:
        """Raises ValueError if the encoder does not take images of this size."""
        expect.at_least("encoder.image_size", image_size, 8)
        if self.image_size is not None and image_size != self.image_size:
            way = "load_encoder(..., image_size=...) makes a ViT take others"
            if self.batch_size is not None:
                way = f"expected encoder.image_size={self.image_size}, or another bundle"
            raise expect.InputError(
                f"encoder.image_size: {self.name} takes images of {self.image_size} px only, "
                f"got {image_size}; {way}."
            )

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 over name, function, preparation, pooling, `prunable` and every parameter."""
        pooling = self.head if self.pooling == "own" else self.pooling
        given: list = [self.transform.decisive] if self.transform != PAPER else []
        given += [text for text in (self.function or None, self.prunable) if text is not None]
        return fingerprint_of((self.name, self.mean, self.std, pooling, *given), self.params)


def fingerprint_of(settings: Any, params: Params) -> str:
    """Returns the SHA-256 over settings, as `repr` shows them, and every parameter."""
    digest = hashlib.sha256(repr(settings).encode())
    for path, leaf in by_path(params).items():
        digest.update(f"{path} {leaf.dtype} {leaf.shape}".encode())
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):  # of a module with dropout
            leaf = jax.random.key_data(leaf)
        digest.update(fetch(leaf).tobytes())
    return digest.hexdigest()


def module_functions(graph: nnx.GraphDef, state: Any, *, pools: bool = False) -> dict[str, Any]:
    """Returns what `Encoder` needs of a split module, by field.

    Args:
      graph, state: The module.
      pools: Whether it gives what its head reads if it is called with `pooled=True`.
    """
    not_trained = nnx.filter_state(state, nnx.filterlib.Not(nnx.Param))
    head: dict[str, Any] = {"pooled": True} if pools else {}
    return {
        "apply": functools.partial(apply_module, graph),
        "apply_head": functools.partial(apply_module, graph, **head) if pools else None,
        "apply_training": functools.partial(train_module, graph, **head),
        "statistics": frozenset(by_path(nnx.to_pure_dict(not_trained))),
    }


def apply_module(graph: nnx.GraphDef, params: Params, images: Array, **options: Any) -> Array:
    """Runs the module with this structure and these parameters."""
    return nnx.merge(graph, nnx.State(params))(images, **options)


def train_module(
    graph: nnx.GraphDef, params: Params, images: Array, real: Array, **options: Any
) -> tuple[Array, Params]:
    """Runs the module in training mode; also returns its parameters as they are afterwards."""
    module = nnx.merge(graph, nnx.State(params))
    module.train(sample_mask=real)
    output = module(images, **options)
    module.train(sample_mask=None)
    return output, nnx.to_pure_dict(nnx.state(module))


def split_statistics(params: Params, statistics: frozenset[str]) -> tuple[Params, Params]:
    """Returns the trained leaves and the others, both with None in the places of the other."""

    def is_trained(path: tuple, leaf: Array) -> bool:
        return jnp.issubdtype(leaf.dtype, jnp.floating) and path_name(path) not in statistics

    keep = jax.tree_util.tree_map_with_path(is_trained, params)
    trained = jax.tree.map(lambda leaf, mine: leaf if mine else None, params, keep)
    others = jax.tree.map(lambda leaf, mine: None if mine else leaf, params, keep)
    return trained, others


def join_statistics(trained: Params, others: Params) -> Params:
    """Undoes `split_statistics`."""

    def either(mine: Any, other: Any) -> Any:
        return other if mine is None else mine

    return jax.tree.map(either, trained, others, is_leaf=lambda leaf: leaf is None)


def pool(output: Float[Array, "b *positions d"], pooling: str) -> Float[Array, "b e"]:
    """Pools a feature map or token sequence to one vector per image; vectors pass through."""
    if output.ndim == 2:
        return output
    if output.ndim == 4:  # a feature map: the released code's pooling is right for these
        return output.mean(axis=(1, 2))
    if pooling == "scalar":
        return output.mean(axis=(1, 2))[:, None]
    return output[:, 0] if pooling == "cls" else output.mean(axis=1)


def precision_of(dtype: str) -> contextlib.AbstractContextManager:
    """Returns a context whose float32 matmuls and convolutions are not done in TF32 on GPUs."""
    return jax.default_matmul_precision("highest" if dtype == "float32" else "default")


def normalise(images: Array, mean: tuple, std: tuple) -> Float[Array, "b s s 3"]:
    """Returns (images / 255 - mean) / std as float32, for uint8 images on the device."""
    scaled = images.astype(jnp.float32) / 255
    return (scaled - jnp.asarray(mean, jnp.float32)) / jnp.asarray(std, jnp.float32)
