"""Reads a data set end to end and reports what is wrong with it before anything is run on it.

python -m dlc_jax.check --dataset=folder:/data/flowers/train [--test=folder:/data/flowers/test]

Prints a table, and names what cannot be read or has more than 8 bits a channel; --json=FILE writes
all of it. Exit code 0: nothing found; 1: something to look at; 2: the source cannot be used at all.
"""

from __future__ import annotations

import dlc_jax.signals as signals  # `from dlc_jax` would load all of it first

if __name__ == "__main__":
    signals.listen()

from absl import app, flags

from dlc_jax.cli import check as command

if __name__ == "__main__":
    flags.adopt_module_key_flags(command)
    app.run(command.main, flags_parser=command.parse)
