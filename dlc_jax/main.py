"""Says which samples of a data set to keep before fine-tuning, without training anything.

python -m dlc_jax.main --config=configs/demo.py [--workdir=DIR] [--config.KEY=VALUE ...]

A configuration file names data set and encoder: configs/demo.py is the bundled sample,
configs/custom.py a template for your own. Any key can be set on the command line:
--config.probe.num_probes=8 --config.probe.placement=midpoint
--config.selection.keep_fractions='(0.1, 0.3)'
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from absl import app, flags
from ml_collections import config_flags

from dlc_jax import checks, pipeline
from dlc_jax.config import Config, describe, known_keys

_CONFIG = config_flags.DEFINE_config_file("config", None, "Configuration file, required.")
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Where artefacts go; default runs/<name of the configuration file>."
)
__doc__ += f"\nKeys, defaults and meaning:\n{describe()}\n"


def main(argv: Sequence[str]) -> None:
    """Runs the stages; what the user got wrong ends in one line and exit code 2."""
    if _CONFIG.value is None or len(argv) > 1:
        extra = f" (do not know what to do with {argv[1]!r})" if len(argv) > 1 else ""
        _fail(f"--config is required, e.g. --config=configs/demo.py{extra}")
    name = Path(config_flags.get_config_filename(flags.FLAGS["config"])).stem
    workdir = Path(_WORKDIR.value or Path("runs") / name).expanduser()
    # absl shows jax's notes on the backends it tried and did not find
    logging.getLogger("jax").setLevel(logging.WARNING)
    try:
        pipeline.run(Config.of(_CONFIG.value), workdir)
    except (checks.InputError, OSError) as error:
        _fail(str(error))


def _parse(argv: Sequence[str]) -> list[str]:
    try:
        for argument in argv[1:]:
            override = re.match(r"--?config\.([^=]+)", argument)
            if override:
                checks.one_of("configuration key", override[1], known_keys())
        return app.parse_flags_with_usage(list(argv))
    except (AttributeError, KeyError, TypeError, ValueError, SyntaxError, OSError) as error:
        _fail(
            f"{type(error).__name__}: {error}" if not isinstance(error, ValueError) else str(error)
        )


def _fail(message: str) -> NoReturn:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    app.run(main, flags_parser=_parse)
