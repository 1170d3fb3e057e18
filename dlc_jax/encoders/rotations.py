"""Rotary positions of a decoder: by how much pairs of features turn, and the turning itself.

Sources: Su et al. 2021, arXiv 2104.09864; Peng et al. 2023, arXiv 2309.00071, for YaRN;
Grattafiori et al. 2024, arXiv 2407.21783, for the scaling of Llama 3.1.
"""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int

Frequencies = Float32[np.ndarray, " f"]  # angle per token of each pair of features


@dataclasses.dataclass(frozen=True)
class LinearScaling:
    """All rotations slowed alike, for a longer context.

    Attributes:
      factor: By how much.
    """

    factor: float
    amplitude: ClassVar[float] = 1.0

    def slowed(self, frequencies: Frequencies, theta: float) -> Frequencies:
        return frequencies / np.float32(self.factor)


# called so since it was the only one: its name is in fingerprints
@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's stretch of slow rotations to a longer context.

    Attributes:
      factor: Factor by which wavelengths over `original_length / low_freq_factor` grow.
      low_freq_factor, high_freq_factor: Between the two wavelengths the factor fades in.
      original_length: Context in tokens that the model was pre-trained with.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_length: float
    amplitude: ClassVar[float] = 1.0

    def slowed(self, frequencies: Frequencies, theta: float) -> Frequencies:
        turns = self.original_length * frequencies / (2 * np.pi)  # in the original context
        low, high = self.low_freq_factor, self.high_freq_factor
        share = np.clip((turns - low) / (high - low), 0, 1)  # that stays as it was
        slow = frequencies / self.factor
        return (share * frequencies + (1 - share) * slow).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class YarnScaling:
    """YaRN's stretch of slow rotations to a longer context, with sharper attention.

    Attributes:
      factor: Factor by which the longest wavelengths grow.
      most_turns, fewest_turns: Rotations that turn more often in the original context stay as they
        are, those that turn less often are slowed by the factor; a ramp over features lies between.
      original_length: Context in tokens that the model was pre-trained with.
      amplitude: Factor on queries and keys, where they are turned.
      whole: Whether the ramp starts and ends at whole pairs of features.
    """

    factor: float
    most_turns: float
    fewest_turns: float
    original_length: float
    amplitude: float
    whole: bool = True

    def slowed(self, frequencies: Frequencies, theta: float) -> Frequencies:
        num = len(frequencies)

        def place(turns: float) -> float:
            ratio = self.original_length / (turns * 2 * math.pi)
            return num * math.log(ratio) / math.log(theta)

        first, last = place(self.most_turns), place(self.fewest_turns)
        if self.whole:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, 2 * num - 1)
        width = last - first if last != first else 0.001
        slow = np.clip((np.arange(num, dtype=np.float32) - first) / np.float32(width), 0, 1)
        return frequencies / np.float32(self.factor) * slow + frequencies * (1 - slow)


Scaling = LinearScaling | RopeScaling | YarnScaling

# Cosines and sines by which pairs of features of each token turn.
Rotation = tuple[Float[Array, "b t h"], Float[Array, "b t h"]]


def places_in_sequence(segments: Int[Array, "b t"]) -> Int[Array, "b t"]:
    """Returns the place of every token in its sequence; 0 at padding.

    transformers takes a place that does not follow the one before for the start of a sequence that
    sees nothing of others, so that padding is seen by none.
    """
    places = jnp.arange(segments.shape[1], dtype=jnp.int32)
    starts = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    first = jax.lax.cummax(jnp.where(starts, places, 0), axis=1)
    return jnp.where(segments == 0, 0, places - first)


def rotation_of(
    places: Int[Array, "b t"],
    num_places: int,
    *,
    theta: float,
    scaling: Scaling | None,
    head_dim: int,
    dtype: DTypeLike,
) -> Rotation:
    """Returns by how much each token's features turn.

    Args:
      places: Place of every token in its sequence.
      num_places: More than any of them.
      theta: Base of the wavelengths.
      scaling: None: as pre-trained.
      head_dim: Features of a head, two of which turn together.
      dtype: Type of what is returned; angles are float32.
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequencies = 1 / np.power(np.float32(theta), exponents)
    amplitude = 1.0
    if scaling is not None:
        frequencies = scaling.slowed(frequencies, theta)
        amplitude = scaling.amplitude
    angles = jnp.arange(num_places, dtype=jnp.float32)[:, None] * frequencies
    angles = jnp.concatenate([angles, angles], axis=-1)
    cosines, sines = (turn(angles) * amplitude for turn in (jnp.cos, jnp.sin))
    return cosines.astype(dtype)[places], sines.astype(dtype)[places]


def rotate(x: Float[Array, "b t k h"], rotation: Rotation) -> Float[Array, "b t k h"]:
    """Returns queries or keys, turned."""
    cosines, sines = (part[:, :, None] for part in rotation)
    first, second = jnp.split(x, 2, axis=-1)
    return x * cosines + jnp.concatenate([-second, first], axis=-1) * sines
