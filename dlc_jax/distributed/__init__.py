"""Models over several devices."""

from dlc_jax.distributed.mesh import load_sharded, make_mesh
from dlc_jax.distributed.sharding import (
    on_every_device,
    over_devices,
    partition,
    sharding_of,
    whole_rows,
)

__all__ = [
    "load_sharded",
    "make_mesh",
    "on_every_device",
    "over_devices",
    "partition",
    "sharding_of",
    "whole_rows",
]
