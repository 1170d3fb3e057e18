"""The devices of a run, and a language model loaded over them."""

from __future__ import annotations

import jax
import numpy as np
from jax.sharding import Mesh

from dlc_jax import checks
from dlc_jax.distributed.sharding import FSDP, sharding_of
from dlc_jax.encoders.language_model import LanguageModel, load_language_model


def make_mesh(fsdp: int) -> Mesh:
    """Returns a mesh of the first `fsdp` devices.

    Raises:
      ValueError: fewer devices are there.
    """
    checks.integer("mesh.fsdp", fsdp)
    checks.at_least("mesh.fsdp", fsdp, 1)
    devices = jax.devices()
    if fsdp > len(devices):
        raise checks.InputError(
            f"mesh.fsdp: {fsdp} devices are asked for, {len(devices)} of kind "
            f"{devices[0].device_kind} are there; expected at most {len(devices)}."
        )
    # not jax.make_mesh: its axes are of the kind where every operation has to name its sharding
    return Mesh(np.array(devices[:fsdp]), (FSDP,))


def load_sharded(weights: str, dtype: str, fsdp: int) -> LanguageModel:
    """Loads a language model with its weights spread over devices.

    Args:
      weights, dtype: As for `load_language_model`.
      fsdp: Number of devices; 1: all on the default one.
    Raises:
      ValueError: see `load_language_model`; fewer devices are there.
    """
    mesh = make_mesh(fsdp)
    where = None if fsdp == 1 else sharding_of(mesh)
    return load_language_model(weights, dtype=dtype, sharding_of=where)
