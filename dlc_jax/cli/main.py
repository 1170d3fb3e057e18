"""The command `python -m dlc_jax.main`: flags, configuration, and how a run ends."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Sequence
from typing import NoReturn

from absl import flags
from absl import logging as absl_logging
from ml_collections import config_flags

from dlc_jax import expect, signals
from dlc_jax.config import Config, describe, known_keys
from dlc_jax.distributed import processes, use_all_cores
from dlc_jax.distributed.watch import end, watched
from dlc_jax.expect import show, visible
from dlc_jax.presets import run_name
from dlc_jax.stages import pipeline
from dlc_jax.tasks.agreement import agree_on_settings
from dlc_jax.workspace import bucket, lease
from dlc_jax.workspace.object_store import Unreachable

_CONFIG = config_flags.DEFINE_config_file("config", None, "Configuration file, required.")
_WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "Where artefacts go: a folder, s3://BUCKET/NAME or gs://BUCKET/NAME; default runs/<name of "
    "the configuration file>[-<what follows its colon>].",
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator_address", None, "host:port of the first of several processes."
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Of this run; see launch/README.md.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Of this one, from 0.")
_HEARTBEAT_S = flags.DEFINE_integer(
    "heartbeat_s", 30, "Seconds without a sign of life after which a process counts as dead."
)
_START_TIMEOUT_S = flags.DEFINE_integer(
    "start_timeout_s", 300, "Seconds to wait for all processes to start.", lower_bound=1
)
KEYS = f"\nKeys, defaults and meaning:\n{describe()}\n"


def main(argv: Sequence[str]) -> None:
    """Runs the stages; what the user got wrong ends in one line and exit code 2."""
    if len(argv) > 1:
        _fail(f"unexpected argument {argv[1]!r}; settings are given as --config.KEY=VALUE")
    if _CONFIG.value is None:
        _fail("--config is required, e.g. --config=configs/demo.py")
    name = config_flags.get_config_filename(flags.FLAGS["config"])
    workdir = _WORKDIR.value or f"runs/{run_name(name)}"
    # absl shows jax's notes on backends that are not there, every retry of a download, and each
    # step of every checkpoint
    logging.getLogger("jax").setLevel(logging.WARNING)
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # read when it is imported, which is later
    absl_logging.set_verbosity(absl_logging.FATAL)
    try:
        place = processes.find_place(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
    except expect.InputError as error:
        _fail(str(error))
    with watched(place is not None):
        code, said = _run(place, workdir)
        if code:
            end(code, said)


def _run(place: processes.Place | None, workdir: str) -> tuple[int, str]:
    """Returns the exit code, and what other processes say of this one's end."""
    try:
        with signals.raised():
            if place is None:
                use_all_cores()
            else:
                seconds = {"heartbeat_s": _HEARTBEAT_S.value, "timeout_s": _START_TIMEOUT_S.value}
                processes.start(place, **seconds)
            config = Config.of(_CONFIG.value)
            agree_on_settings(config, workdir)
            with bucket.work_in(workdir, show) as (folder, echo):
                pipeline.run(config, folder, echo)
            processes.wait_for_all()
        return 0, ""
    except processes.SaidByFirst as error:
        return 2, f"failed: {error}"
    except (expect.InputError, OSError) as error:
        _say(f"error: {' '.join(str(error).split())}")
        return 2, f"failed: {error}"
    except processes.NotAllCame as error:
        _say(f"stopped: {error}")
        return signals.RESTART, "did not find the others"
    except Unreachable as error:
        _say(f"stopped: {error} The same command goes on from what is there.")
        return signals.RESTART, "cannot reach the bucket"
    except lease.Lost as error:
        _say(f"stopped: {error}")
        return signals.RESTART, "lost the work directory to another run"
    except signals.Stopped:
        by = "SIGTERM" if signals.code() == signals.RESTART else "Ctrl-C"
        _say(f"stopped by {by}; the same command goes on where this one ended")
        return signals.code(), f"was stopped by {by}"


def _say(message: str) -> None:
    prefix = "" if processes.is_first() else f"process {processes.index()}: "
    show(prefix + visible(message), to_stderr=True)


def parse(argv: Sequence[str]) -> list[str]:
    """Parses the flags; what the user got wrong ends in one line and exit code 2."""
    try:
        for argument in argv[1:]:
            override = re.match(r"--?config\.([^=]+)", argument)
            if override:
                expect.one_of("configuration key", override[1], known_keys())
        return flags.FLAGS(list(argv))
    except Exception as error:  # the configuration file is the user's code: anything can happen
        raised: BaseException | None = error.__context__
        while raised is not None:  # of what the file raised, the first is the one that says why
            if isinstance(raised, expect.InputError) and raised.__context__ is None:
                _fail(f"--config: cannot load it: {raised}")
            raised = raised.__context__
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
        if "Traceback (most recent call last):" in lines:  # of what the file raised
            _fail(f"--config: cannot load it: {lines[-1]}")
        if isinstance(error, (flags.Error, expect.InputError)):
            _fail(str(error))
        _fail(f"--config: cannot load it: {type(error).__name__}: {lines[-1]}")


def _fail(message: str) -> NoReturn:
    said = f"error: {' '.join(message.split())}"
    _say(said)
    end(2, f"failed: {message}")
