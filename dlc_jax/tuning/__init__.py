"""Choosing how to choose: linear probes over all subset sizes, and what they say of methods."""

from dlc_jax.tuning.confidence import held_out_probabilities, self_confidence
from dlc_jax.tuning.linear import LinearProbeConfig, linear_probes
from dlc_jax.tuning.trials import FinetuneTrials, Trial
from dlc_jax.tuning.tune import KeepCurve, TuningConfig, keep_curve, tune
