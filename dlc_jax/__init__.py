"""Dataset pruning for fine-tuning by learning complexity: says which samples to keep.

import dlc_jax as dlc

dataset = dlc.load_dataset("folder:/data/flowers")
encoder = dlc.load_encoder("resnet18", weights="timm/resnet18.tv_in1k")
probes = dlc.probe(encoder, dataset)
kept = dlc.select(dlc.score(probes), probes.labels, keep_fraction=0.3, ids=probes.ids)
result = dlc.finetune(encoder, dataset, kept, test=dlc.load_dataset("folder:/data/flowers_test"))
"""

__version__ = "0.1.0"

from dlc_jax.checks import InputError
from dlc_jax.datasets import array_dataset, load_dataset, stratified_split
from dlc_jax.encoders import Encoder, load_encoder
from dlc_jax.exports import export
from dlc_jax.preprocess import ImageCache
from dlc_jax.probes import features, probe
from dlc_jax.scores import score
from dlc_jax.selection import select
from dlc_jax.training import finetune
from dlc_jax.types import Dataset, ProbeLosses, RunResult, Sample, Selection

__all__ = [
    "Dataset",
    "Encoder",
    "ImageCache",
    "InputError",
    "ProbeLosses",
    "RunResult",
    "Sample",
    "Selection",
    "array_dataset",
    "export",
    "features",
    "finetune",
    "load_dataset",
    "load_encoder",
    "probe",
    "score",
    "select",
    "stratified_split",
]
