"""Every setting and its default, checked before anything is loaded.

A configuration file builds on `default_config()`; `Config.of` turns what the command line made of
it into frozen dataclasses. Nothing else reads a ConfigDict.
"""

from dlc_jax.config.kinds import KINDS
from dlc_jax.config.sections import DatasetConfig, MeshConfig
from dlc_jax.config.settings import Config, default_config, describe, known_keys
