"""lm_eval's own command line, with the model class `dlc_jax`.

python -m dlc_jax.lm_eval --model dlc_jax --model_args pretrained=<folder>,dtype=bfloat16 \
    --tasks mmlu --num_fewshot 5

lm_eval has no plugins: it knows its own classes, and those that were registered in its process.
"""

from __future__ import annotations

import dlc_jax.signals as signals  # `from dlc_jax` would load all of it first

if __name__ == "__main__":
    signals.listen()

import sys


def main() -> None:
    """Registers the class and runs lm_eval with the process's arguments."""
    try:
        from dlc_jax.evaluation import harness  # noqa: F401 - registers the class
    except ImportError as error:
        sys.exit(str(error))
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
