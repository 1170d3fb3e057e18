"""Checkpoints of a run, written while training goes on, the last good one kept."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dlc_jax import artefacts, checks
from dlc_jax.distributed import processes

_STATE, _HISTORY = "state", "history"
_AFTER_WRITE = "The last whole one is untouched; the same command goes on from it."
_AFTER_READ = "Delete the folder to start this run again."


class Checkpoints:
    """The folder `checkpoint/` of a run; a context that ends with the last one on disk."""

    def __init__(self, folder: Path):
        import orbax.checkpoint as ocp  # half a second, which only fine-tuning to disk needs

        self._ocp = ocp
        self._folder = folder
        # one process keeps all of it, and the others do not know: Orbax should not wait for them
        alone = ocp.options.MultiprocessingOptions(
            primary_host=processes.index(),
            active_processes={processes.index()},
            barrier_sync_key_prefix=f"alone_{processes.index()}",
        )
        options = ocp.CheckpointManagerOptions(
            max_to_keep=1,
            cleanup_tmp_directories=True,
            create=False,
            **({"multiprocessing_options": alone} if processes.count() > 1 else {}),
        )
        with self._clear_errors("open"):
            folder.mkdir(parents=True, exist_ok=True)
            self._manager = ocp.CheckpointManager(folder.resolve(), options=options)
        self._pushed = set(self._manager.all_steps())

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        if error is None:
            self.wait()
            self._manager.close()
            return
        with contextlib.suppress(Exception):  # the first error is the one to tell
            self._manager.close()

    def save(self, number: int, state: Any, history: list[dict[str, Any]]) -> None:
        """Starts writing a state, a pytree of arrays; earlier ones go once it is whole."""
        self.wait()  # Orbax would as well
        if processes.count() > 1:  # every process has all of it
            state = jax.tree.map(np.asarray, state)
        with self._clear_errors("write"):
            self._manager.save(
                number,
                args=self._ocp.args.Composite(
                    **{
                        _STATE: self._ocp.args.StandardSave(state),
                        _HISTORY: self._ocp.args.JsonSave({"epochs": history}),
                    }
                ),
            )

    def restore(self, like: Any) -> tuple[Any, list[dict[str, Any]]] | None:
        """Returns the last whole state and what led to it; None if there is none.

        Args:
          like: Arrays of the same structure, shapes and types, that lie where it goes.
        """
        epoch = self._manager.latest_step()
        if epoch is None:
            return None
        shapes = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), like
        )
        with self._clear_errors("read"):
            found = self._manager.restore(
                epoch,
                args=self._ocp.args.Composite(
                    **{
                        _STATE: self._ocp.args.StandardRestore(shapes),
                        _HISTORY: self._ocp.args.JsonRestore(),
                    }
                ),
            )
        return found[_STATE], found[_HISTORY]["epochs"]

    def wait(self) -> None:
        """Returns when everything is on disk."""
        with self._clear_errors("write"):
            self._manager.wait_until_finished()
        self._push()

    def _push(self) -> None:
        """Gives the last state to those who do not share the folder, and then takes earlier ones.

        In between they have two, each whole.
        """
        last = self._manager.latest_step()
        if last is None or last in self._pushed or not (self._folder / str(last)).is_dir():
            return
        artefacts.push(self._folder / str(last))
        for earlier in self._pushed:
            artefacts.remove(self._folder / str(earlier))
        self._pushed = {last}

    @contextlib.contextmanager
    def _clear_errors(self, what: str):
        try:
            yield
        except Exception as error:  # Orbax and TensorStore raise anything from OSError on
            raise checks.InputError(
                f"{self._folder}: cannot {what} a checkpoint: {_reason(error)}. "
                + (_AFTER_WRITE if what == "write" else _AFTER_READ)
            ) from error


def _reason(error: Exception) -> str:
    """TensorStore hides what the system said between paths and a page of its own settings."""
    said = re.search(r": ([^:\[\]]+) \[(?:tensorstore_spec|os_error_code)=", str(error))
    return said[1] if said else checks.first_line(error)[:300]
