"""Kinds of data, each with what the stages ask of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from dlc_jax.config import Config
from dlc_jax.tasks.images import ImageTask
from dlc_jax.tasks.instructions import InstructionTask
from dlc_jax.tasks.task import Task

# By the names of `config.KINDS`.
TASKS: Mapping[str, Callable[[Config, Callable[[str], None]], Task]] = {
    "images": ImageTask,
    "instructions": InstructionTask,
}


def task_of(config: Config, say: Callable[[str], None]) -> Task:
    """Returns the task of a configuration; nothing is loaded yet.

    Args:
      config: Checked configuration.
      say: Takes each line meant for the user.
    """
    return TASKS[config.data_kind.name](config, say)
