"""Losses of every sample under masked copies of the encoder, without training anything."""

from dlc_jax.probes.certificate import Interval, RankCertificate, certify
from dlc_jax.probes.kernel import DTYPES
from dlc_jax.probes.measure import features, probe, resolve_batch_size, resolve_chunk
from dlc_jax.probes.prototypes import ClassSums, prototype_loss

__all__ = [
    "DTYPES",
    "ClassSums",
    "Interval",
    "RankCertificate",
    "certify",
    "features",
    "probe",
    "prototype_loss",
    "resolve_batch_size",
    "resolve_chunk",
]
