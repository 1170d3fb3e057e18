"""Training records for the tests of scores."""

import dataclasses

import numpy as np

from dlc_jax.types import TrainingRecord

NAMES = {"correct": 1, "logits": 0, "early_logits": 1, "early_squared_norms": 1, "labels": 0}


def random_record(
    num: int = 40, classes: int = 7, epochs: int = 6, runs: int = 3, batch: int = 8, seed: int = 0
) -> TrainingRecord:
    """Returns a record of noise; logits from nearly uniform to nearly certain."""
    generator = np.random.default_rng(seed)
    scale = np.geomspace(0.1, 8, num)[generator.permutation(num), None]
    labels = generator.integers(0, classes, num).astype(np.int32)
    logits = scale * generator.normal(size=(1 + runs, num, classes))
    return TrainingRecord(
        correct=generator.random((epochs, num)) < generator.random(num),
        logits=logits[0].astype(np.float32),
        early_logits=logits[1:].astype(np.float32),
        early_squared_norms=generator.gamma(5, 20, (runs, num)).astype(np.float32),
        early_epoch=2,
        batch_size=batch,
        labels=labels,
        ids=np.array([f"s{i}" for i in range(num)]),
        class_names=tuple(f"c{j}" for j in range(classes)),
        seconds=1.0,
        num_epochs=epochs + (runs - 1) * 2,
    )


def reordered(record: TrainingRecord, order: np.ndarray) -> TrainingRecord:
    """Returns the record of the same samples in another order."""
    taken = {name: np.take(getattr(record, name), order, axis) for name, axis in NAMES.items()}
    return dataclasses.replace(record, ids=record.ids[order], **taken)
