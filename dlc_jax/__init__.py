"""Dataset pruning for fine-tuning by learning complexity: says which samples to keep.

import dlc_jax as dlc

dataset = dlc.load_dataset("folder:/data/flowers")
encoder = dlc.load_encoder("resnet18", weights="timm/resnet18.tv_in1k")
probes = dlc.probe(encoder, dataset)
kept = dlc.select(dlc.score(probes), probes.labels, keep_fraction=0.3, ids=probes.ids)
result = dlc.finetune(encoder, dataset, kept, test=dlc.load_dataset("folder:/data/flowers_test"))
"""

import importlib.util
from typing import TYPE_CHECKING, Any

from dlc_jax.version import __version__ as __version__

if TYPE_CHECKING:
    from dlc_jax.api import *  # noqa: F403
    from dlc_jax.api import __all__ as __all__


def __getattr__(name: str) -> Any:
    """Loads all public names, or a part of the package, as soon as one is used.

    A command has to listen to signals before that takes its seconds.
    """
    if name == "__all__" or not name.startswith("_"):
        if importlib.util.find_spec(f"dlc_jax.{name}") is not None:
            return importlib.import_module(f"dlc_jax.{name}")
        api = importlib.import_module("dlc_jax.api")
        if name == "__all__" or name in api.__all__:
            return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    names = importlib.import_module("dlc_jax.api").__all__
    return sorted({*globals(), *names})
