"""Losses of every sample under masked copies of the encoder, without training anything."""

from dlc_jax.probes.certificate import RankCertificate, certify
from dlc_jax.probes.images import Compute, features, probe
from dlc_jax.probes.kernel import DTYPES
