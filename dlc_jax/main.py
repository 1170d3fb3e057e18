"""Says which samples of a data set to keep, without training, and fine-tunes on them if asked.

python -m dlc_jax.main --config=configs/demo.py [--workdir=DIR] [--config.KEY=VALUE ...]

A configuration file names data set and encoder: configs/demo.py is the bundled sample,
configs/custom.py a template for your own. Any key can be set on the command line:
--config.probe.num_probes=8 --config.probe.placement=midpoint
--config.selection.keep_fractions=0.1,0.3

Some files take a choice after a colon, as in --config=configs/alpaca_cleaned.py:llama3-8b.

--config comes first; everything is run from the root of the repository.
"""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from absl import app, flags
from absl import logging as absl_logging
from ml_collections import config_flags

from dlc_jax import checks, pipeline, presets
from dlc_jax.config import Config, describe, known_keys

_CONFIG = config_flags.DEFINE_config_file("config", None, "Configuration file, required.")
_WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "Where artefacts go; default runs/<name of the configuration file>[-<what follows its colon>].",
)
_INPUT_ERROR = f"{checks.InputError.__module__}.{checks.InputError.__name__}: "
__doc__ += f"\nKeys, defaults and meaning:\n{describe()}\n"


def main(argv: Sequence[str]) -> None:
    """Runs the stages; what the user got wrong ends in one line and exit code 2."""
    if len(argv) > 1:
        _fail(f"unexpected argument {argv[1]!r}; settings are given as --config.KEY=VALUE")
    if _CONFIG.value is None:
        _fail("--config is required, e.g. --config=configs/demo.py")
    name = config_flags.get_config_filename(flags.FLAGS["config"])
    workdir = Path(_WORKDIR.value or Path("runs") / presets.run_name(name)).expanduser()
    # absl shows jax's notes on backends that are not there, every retry of a download, and each
    # step of every checkpoint
    logging.getLogger("jax").setLevel(logging.WARNING)
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # read when it is imported, which is later
    absl_logging.set_verbosity(absl_logging.FATAL)
    try:
        pipeline.run(Config.of(_CONFIG.value), workdir)
    except (checks.InputError, OSError) as error:
        _fail(str(error))
    except KeyboardInterrupt:
        print("stopped; the same command goes on where this one ended", file=sys.stderr)
        sys.exit(130)


def _parse(argv: Sequence[str]) -> list[str]:
    try:
        for argument in argv[1:]:
            override = re.match(r"--?config\.([^=]+)", argument)
            if override:
                checks.one_of("configuration key", override[1], known_keys())
        return flags.FLAGS(list(argv))
    except Exception as error:  # the configuration file is the user's code: anything can happen
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
        if "Traceback (most recent call last):" in lines:  # of what the file raised
            _fail(f"--config: cannot load it: {lines[-1].removeprefix(_INPUT_ERROR)}")
        if isinstance(error, (flags.Error, checks.InputError)):
            _fail(str(error))
        _fail(f"--config: cannot load it: {type(error).__name__}: {lines[-1]}")


def _fail(message: str) -> NoReturn:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    app.run(main, flags_parser=_parse)
