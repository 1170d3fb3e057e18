"""The public names of the package, which `dlc_jax` loads when the first one is used.

The examples of their docstrings follow `import dlc_jax as dlc` and `import numpy as np`; those that
write files do so in the current folder.
"""

from dlc_jax.datasets import array_dataset, load_dataset, stratified_split
from dlc_jax.datasets.instructions import Instructions, load_instructions
from dlc_jax.distributed import Run, make_mesh, use_all_cores
from dlc_jax.encoders import Encoder, load_encoder, save_encoder
from dlc_jax.encoders.language_model import LanguageModel, load_language_model
from dlc_jax.evaluation import evaluate_mmlu, load_mmlu
from dlc_jax.evaluation.generation import generate
from dlc_jax.expect import InputError
from dlc_jax.exports import export
from dlc_jax.exports.peft import load_adapter, write_adapter, write_merged
from dlc_jax.masking import PathSpec
from dlc_jax.preprocess.cache import ImageCache
from dlc_jax.preprocess.images import Images
from dlc_jax.preprocess.tokens import tokenise
from dlc_jax.preprocess.transform import Transform
from dlc_jax.probes import Compute, RankCertificate, certify, features, probe
from dlc_jax.probes.responses import measure_responses, response_features
from dlc_jax.probes.text import probe_responses, response_losses
from dlc_jax.scores import score
from dlc_jax.selection import (
    Candidates,
    Rules,
    SuspectLabels,
    select,
    similarities,
    suspect_labels,
)
from dlc_jax.training.images import FinetuneConfig, RecordConfig, finetune, record_training
from dlc_jax.training.lora.settings import LoraConfig
from dlc_jax.training.lora.tuner import finetune_lora
from dlc_jax.tuning import (
    FinetuneTrials,
    LinearProbeConfig,
    keep_curve,
    linear_probes,
    self_confidence,
    tune,
)
from dlc_jax.types import (
    Dataset,
    ProbeLosses,
    ResponseLosses,
    RunResult,
    Sample,
    Selection,
    TrainingRecord,
    Tuning,
)

__all__ = [
    "Candidates",
    "Compute",
    "Dataset",
    "Encoder",
    "FinetuneConfig",
    "FinetuneTrials",
    "ImageCache",
    "Images",
    "InputError",
    "Instructions",
    "LanguageModel",
    "LinearProbeConfig",
    "LoraConfig",
    "PathSpec",
    "ProbeLosses",
    "RankCertificate",
    "RecordConfig",
    "ResponseLosses",
    "Rules",
    "Run",
    "RunResult",
    "Sample",
    "Selection",
    "SuspectLabels",
    "TrainingRecord",
    "Transform",
    "Tuning",
    "array_dataset",
    "certify",
    "evaluate_mmlu",
    "export",
    "features",
    "finetune",
    "finetune_lora",
    "generate",
    "keep_curve",
    "linear_probes",
    "load_adapter",
    "load_dataset",
    "load_encoder",
    "load_instructions",
    "load_language_model",
    "load_mmlu",
    "make_mesh",
    "measure_responses",
    "probe",
    "probe_responses",
    "record_training",
    "response_features",
    "response_losses",
    "save_encoder",
    "score",
    "select",
    "self_confidence",
    "similarities",
    "stratified_split",
    "suspect_labels",
    "tokenise",
    "tune",
    "use_all_cores",
    "write_adapter",
    "write_merged",
]
