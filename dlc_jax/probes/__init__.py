"""Losses of every sample under masked copies of the encoder, without training anything."""

from dlc_jax.probes.certificate import RankCertificate, certify
from dlc_jax.probes.kernel import DTYPES
from dlc_jax.probes.measure import features, probe
from dlc_jax.probes.settings import Compute

__all__ = [
    "DTYPES",
    "Compute",
    "RankCertificate",
    "certify",
    "features",
    "probe",
]
