"""Which weights of a checkpoint probes may zero, where that is asked for by name."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping

from dlc_jax import expect


def chosen_weights(globs: str, names: Mapping[str, str], encoder: str) -> Callable[[str], bool]:
    """Returns the `is_prunable` of an encoder that masks what these globs match.

    Args:
      globs: Globs over names, such as `blocks.*.mlp.*`; several are separated by commas.
      names: Names in the checkpoint of all weights of convolutions and linear layers, by path.
      encoder: Name of the encoder, for messages.
    Raises:
      ValueError: a glob that matches none of them.
    """
    chosen: set[str] = set()
    for glob in globs.split(","):
        found = {path for path, name in names.items() if fnmatch.fnmatchcase(name, glob.strip())}
        if not found:
            raise expect.InputError(
                f"encoder.prunable: {glob.strip()!r} matches none of the {len(names)} weights of "
                f"convolutions and linear layers of {encoder}; expected a glob over their names: "
                f"{expect.listed(names.values())}."
            )
        chosen |= found
    return frozenset(chosen).__contains__
