"""SHA-256 of what is handed on."""

from __future__ import annotations

import hashlib

import numpy as np
from jaxtyping import Integer


def labels_fingerprint(labels: Integer[np.ndarray, " n"]) -> str:
    """Returns the SHA-256 of labels in their order."""
    return hashlib.sha256(np.ascontiguousarray(labels, np.int32).tobytes()).hexdigest()


def scores_fingerprint(scores: np.ndarray, labels: Integer[np.ndarray, " n"]) -> str:
    """Returns the SHA-256 of scores, as float32, and labels in their order."""
    digest = hashlib.sha256(np.ascontiguousarray(scores, np.float32).tobytes())
    digest.update(labels_fingerprint(labels).encode())
    return digest.hexdigest()


def features_fingerprint(features: np.ndarray) -> str:
    """Returns the SHA-256 of features, as float32, in the order of their rows."""
    return hashlib.sha256(np.ascontiguousarray(features, np.float32).tobytes()).hexdigest()
