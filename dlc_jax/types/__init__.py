"""What one stage hands to the next, and the letters used for array axes.

Axis glossary: n samples, d features, c classes, m probes (masked networks), b batch, t tokens,
v vocabulary; h, w and s are image height, width and side in pixels.
"""

from dlc_jax.types.dataset import (
    DEEP_IMAGES,
    ROWS_OF_DIGEST,
    Dataset,
    ImageSource,
    Sample,
    features_fingerprint,
    file_of,
    labels_fingerprint,
    scores_fingerprint,
)
from dlc_jax.types.results import (
    Choice,
    Gap,
    ProbeLosses,
    ResponseLosses,
    RunResult,
    Selection,
    TrainingRecord,
    Tried,
    Tuning,
)
from dlc_jax.types.settings import (
    KEEP_FRACTIONS,
    Conventions,
    Params,
    as_tuple,
    by_path,
    overridden,
    path_name,
    setting,
)
