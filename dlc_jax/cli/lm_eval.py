"""The command `python -m dlc_jax.lm_eval`: the model class is registered, then lm_eval runs."""

from __future__ import annotations

import sys


def main() -> None:
    """Registers the class and runs lm_eval with the process's arguments."""
    try:
        from dlc_jax.evaluation import harness  # noqa: F401 - registers the class
    except ImportError as error:
        sys.exit(str(error))
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
