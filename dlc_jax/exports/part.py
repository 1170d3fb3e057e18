"""What an export writes."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Int64

from dlc_jax.types import Dataset, Selection


class Part(NamedTuple):
    """The kept or the dropped samples of a data set.

    Attributes:
      name: `kept` or `dropped`.
      samples: Those samples, with all classes.
      positions: [k] of them in the whole data set, ascending.
      selection: By which they were kept or dropped; None where only positions were given.
    """

    name: str
    samples: Dataset
    positions: Int64[np.ndarray, " k"]
    selection: Selection | None
