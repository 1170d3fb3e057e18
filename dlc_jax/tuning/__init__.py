"""Choosing how to choose: linear probes over all subset sizes, and what they say of methods."""

from dlc_jax.tuning.curve import KeepCurve, keep_curve
from dlc_jax.tuning.linear import LinearProbeConfig, linear_probes
from dlc_jax.tuning.trials import FinetuneTrials, Trial
from dlc_jax.tuning.tune import tune
