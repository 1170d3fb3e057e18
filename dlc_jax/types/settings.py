"""Settings as dataclasses, what `mode` decides, and paths of the leaves of a tree."""

from __future__ import annotations

import dataclasses
import numbers
from typing import Any, TypeVar

import jax
import numpy as np

from dlc_jax import expect

Params = Any  # a pytree of arrays


def path_name(path: tuple) -> str:
    """Returns `layer1/0/conv1/kernel` for the key path of a leaf."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def by_path(params: Params) -> dict[str, Any]:
    """Returns the leaves of a tree by path, in tree order."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}


KEEP_FRACTIONS = tuple(k / 10 for k in range(1, 10))  # the paper's
Settings = TypeVar("Settings")


def setting(default: Any, doc: str) -> Any:
    """Returns a dataclass field of a configuration, with what `--help` says of it."""
    return dataclasses.field(default=default, metadata={"doc": doc})


def overridden(settings: Settings, **values: Any) -> Settings:
    """Returns the settings, a dataclass, with those of these values that are not None."""
    given = {name: value for name, value in values.items() if value is not None}
    return dataclasses.replace(settings, **given) if given else settings  # type: ignore[type-var]


def as_tuple(value: Any) -> Any:
    """Returns an array, a list or one number or text as a tuple; anything else as it is."""
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, (str, numbers.Real)):
        return (value,)
    return tuple(value) if isinstance(value, list) else value


@dataclasses.dataclass(frozen=True)
class Conventions:
    """What `mode` decides: the paper's way, or the released code's where that differs.

    Defaults are those of mode `default`.

    Attributes:
      mode: `default` or `official`.
      schedule: The learning path's, where none is asked for (Q1).
      pooling: How a ViT's tokens become features, where nothing is asked for (Q2).
      deep_images: What becomes of more than 8 bits a channel, where nothing is asked for.
      num_runs: Runs of a training record, where no number is asked for.
      imagenet_normalised: Whether every encoder takes ImageNet's mean and deviation (Q11).
      ties_as_torch: Whether torch's order decides between equally small weights.
      floors_milestones: Whether the learning rate falls after whole epochs only (Q6).
      draws_as_released: Whether samples are rounded, drawn and sorted as the released code does it,
        which knows some splits and keep fractions only, and nothing of ids.
    """

    mode: str = "default"
    schedule: str = "linear"
    pooling: str = "mean"
    deep_images: str = "error"
    num_runs: int = 3
    imagenet_normalised: bool = False
    ties_as_torch: bool = False
    floors_milestones: bool = True
    draws_as_released: bool = False

    @classmethod
    def of(cls, mode: str) -> Conventions:
        """Returns the conventions of that name; ValueError if there are none."""
        expect.one_of("mode", mode, _CONVENTIONS)
        return _CONVENTIONS[mode]


_CONVENTIONS = {
    "default": Conventions(),
    "official": Conventions(
        mode="official",
        schedule="geometric",
        pooling="scalar",
        deep_images="clip",
        num_runs=10,
        imagenet_normalised=True,
        ties_as_torch=True,
        floors_milestones=False,
        draws_as_released=True,
    ),
}
