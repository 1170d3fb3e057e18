"""Whether a training record can be scored."""

from __future__ import annotations

import numpy as np

from dlc_jax import checks
from dlc_jax.types import TrainingRecord


def check_record(record: TrainingRecord) -> None:
    """Raises ValueError unless shapes agree, labels are in range and values are finite."""
    num_runs, num, num_classes = record.early_logits.shape
    shapes = {
        "correct": (len(record.correct), num),
        "logits": (num, num_classes),
        "early_squared_norms": (num_runs, num),
        "labels": (num,),
        "ids": (num,),
    }
    for name, expected in shapes.items():
        found = getattr(record, name).shape
        if found != expected or 0 in expected:
            raise checks.InputError(
                f"training record: {name} has shape {found}, expected {expected} and no empty "
                f"axis, since early_logits [r, n, c] has {record.early_logits.shape}."
            )
    if record.labels.min() < 0 or record.labels.max() >= num_classes:
        raise checks.InputError(
            f"training record: labels must be in 0..{num_classes - 1}, found "
            f"{record.labels.min()}..{record.labels.max()}."
        )
    for name, values in (
        ("logits", record.logits),
        ("early_logits", record.early_logits.swapaxes(0, 1)),
        ("early_squared_norms", record.early_squared_norms.T),
    ):
        bad = np.flatnonzero(~np.isfinite(values.reshape(num, -1)).all(axis=1))
        if bad.size:
            raise checks.InputError(
                f"training record: {name} of {bad.size} samples are not finite, first of sample "
                f"{record.ids[bad[0]]!s}. Train with a smaller learning rate?"
            )
