"""What one stage hands to the next, and the letters used for array axes.

Axis glossary: n samples, d features, c classes, m probes (masked networks), b batch, t tokens,
v vocabulary; h, w and s are image height, width and side in pixels.
"""

from dlc_jax.types.dataset import DEEP_IMAGES, ROWS_OF_DIGEST, Dataset, ImageSource, Sample, file_of
from dlc_jax.types.fingerprints import features_fingerprint, labels_fingerprint, scores_fingerprint
from dlc_jax.types.results import ProbeLosses, ResponseLosses, RunResult, Selection, TrainingRecord
from dlc_jax.types.settings import KEEP_FRACTIONS, Conventions, as_tuple, overridden, setting
from dlc_jax.types.trees import Params, by_path, path_name
from dlc_jax.types.tuning import Choice, Gap, Tried, Tuning

__all__ = [
    "DEEP_IMAGES",
    "KEEP_FRACTIONS",
    "ROWS_OF_DIGEST",
    "Choice",
    "Conventions",
    "Dataset",
    "Gap",
    "ImageSource",
    "Params",
    "ProbeLosses",
    "ResponseLosses",
    "RunResult",
    "Sample",
    "Selection",
    "TrainingRecord",
    "Tried",
    "Tuning",
    "as_tuple",
    "by_path",
    "features_fingerprint",
    "file_of",
    "labels_fingerprint",
    "overridden",
    "path_name",
    "scores_fingerprint",
    "setting",
]
