"""Picks the samples of a data set worth keeping, without training, and fine-tunes on them if asked.

python -m dlc_jax.main --config=configs/demo.py [--workdir=DIR] [--config.KEY=VALUE ...]

A configuration file names data set and encoder: configs/demo.py is the bundled sample,
configs/custom.py a template for your own; configs/instructions_demo.py and configs/instructions.py
are those for instructions. Any key can be set on the command line:
--config.probe.num_probes=8 --config.probe.placement=midpoint
--config.selection.keep_fractions=0.1,0.3

Some files take a choice after a colon, as in --config=configs/alpaca_cleaned.py:llama3-8b.

--config comes first; everything is run from the root of the repository.
"""

from __future__ import annotations

import dlc_jax.signals as signals  # `from dlc_jax` would load all of it first

if __name__ == "__main__":
    signals.listen()

from absl import app, flags

from dlc_jax.cli import main as command

if __name__ == "__main__":
    flags.adopt_module_key_flags(command)
    __doc__ += command.KEYS
    app.run(command.main, flags_parser=command.parse)
