"""Which column of a table, array, feature or key holds the images, and which the labels."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

from dlc_jax import checks

LABELS = ("label", "labels", "fine_label", "class", "class_name", "category", "target")  # usual
_NO_LABELS = ("split", "subset", "partition", "fold")  # declared like labels, as by `datasets`


@dataclasses.dataclass(frozen=True)
class Columns:
    """The names asked for; None: the usual ones."""

    image: str | None = None
    label: str | None = None


USUAL = Columns()


def column(
    where: str,
    what: str,
    names: Sequence[str],
    usual: Sequence[str],
    wanted: str | None = None,
    *,
    declared: Iterable[str] = (),
    noun: str = "column",
) -> str:
    """Returns the name of the column of images or labels; capitals do not matter.

    In this order: the one asked for; the first usual name; one with a usual name that is declared
    to be of the type; the only one that is declared or has a usual name. Where some columns are
    declared to hold images, no others are considered for them.

    Args:
      where: For messages.
      what: `image`, `path` (of an image) or `label`.
      names: Names of all columns.
      usual: Usual names in lower case, the one that wins over all others first.
      wanted: The name asked for, if any.
      declared: Names of columns that are declared to hold images or class labels.
      noun: What messages call a column.
    Raises:
      ValueError: no such column, or several that may be meant.
    """
    found = f"found {checks.listed(names) or 'none'}"
    setting = f"dataset.{'label' if what == 'label' else 'image'}_column"
    typed = [name for name in declared if name in names]
    if what == "label":
        typed = [name for name in typed if name.lower() not in _NO_LABELS]
    pool = typed if what == "image" and typed else names
    choices = [
        _named(pool, usual[:1]),
        [name for name in pool if name in typed and name.lower() in usual],
        [name for name in pool if name in typed or name.lower() in usual],
    ]
    if wanted is not None:
        choices = [_named(names, [wanted])]
    for candidates in choices:
        if len(candidates) > 1:
            raise checks.InputError(
                f"{where}: more than one {noun} may hold the {what}: {checks.listed(candidates)}; "
                f"set {setting} to one of them ({found})."
            )
        if candidates:
            return candidates[0]
    if wanted is not None:
        raise checks.InputError(f"{where}: no {noun} {wanted!r} ({setting}); {found}.")
    raise checks.InputError(
        f"{where}: no {what} {noun}; expected one named {' or '.join(usual)}, {found}. "
        f"Another name is set by {setting}."
    )


def _named(names: Sequence[str], wanted: Sequence[str]) -> list[str]:
    """Returns the names that are wanted as they are; if none is, whatever their capitals."""
    same = [name for name in names if name in wanted]
    return same or [name for name in names if name.lower() in map(str.lower, wanted)]
