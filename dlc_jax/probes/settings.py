"""How the probe program runs."""

from __future__ import annotations

import dataclasses
import numbers

import jax

from dlc_jax import checks
from dlc_jax.masking import AUTO
from dlc_jax.probes.kernel import DTYPES
from dlc_jax.types import setting

_BATCH_SIZE = 128
_PIXELS_IN_CACHE = 16 * 224**2


@dataclasses.dataclass(frozen=True)
class Compute:
    """How the probe program runs on images.

    Attributes:
      batch_size: Samples per program call and device; changes speed and memory, not the losses.
        `auto`: 128, and on CPUs fewer of larger images (16 at 224 px), which stay in the cache.
      chunk: Most probes side by side, or `auto`; changes speed and memory, not the losses.
      dtype: What the network computes in, `float32` or `bfloat16`; distances are float32.

    Example: `dlc.probe(encoder, dataset, compute=dlc.Compute(dtype="bfloat16"))`.
    """

    batch_size: int | str = setting(AUTO, "images per call of the probe program, or auto")
    chunk: str | int = setting(AUTO, "most probes side by side, or auto")
    dtype: str = setting("float32", f"of the network: {', '.join(DTYPES)}")

    def check(self) -> None:
        """Raises ValueError unless all values are in range; names are the configuration's."""
        for name in ("batch_size", "chunk"):
            value = getattr(self, name)
            is_number = isinstance(value, numbers.Integral) and not isinstance(value, bool)
            if value != AUTO and (not is_number or value < 1):
                raise checks.InputError(
                    f"probe.{name}: expected {AUTO!r} or an integer >= 1, got {value!r}."
                )
        checks.one_of("probe.dtype", self.dtype, DTYPES)

    def images_per_call(self, image_size: int) -> int:
        """Returns how many images a program call takes.

        Source of `auto`: docs/log/speed.md.
        """
        if not isinstance(self.batch_size, str):
            return self.batch_size
        if jax.default_backend() != "cpu":
            return _BATCH_SIZE
        return max(1, min(_BATCH_SIZE, _PIXELS_IN_CACHE // max(image_size, 1) ** 2))

    def probes_per_call(self, num_probes: int) -> int:
        """Returns how many probes to map side by side: at most `chunk`, more than half of it.

        Within that range, the number that leaves the fewest places of the last chunk empty. `auto`
        is one after another: on CPU that is fastest for every architecture (docs/log/parity.md),
        since side by side convolutions become grouped ones and matmuls batched ones. Other backends
        take the same until they are measured.
        """
        if isinstance(self.chunk, str):
            return 1
        most = min(self.chunk, num_probes)
        return min(range(most, most // 2, -1), key=lambda c: -num_probes % c)
