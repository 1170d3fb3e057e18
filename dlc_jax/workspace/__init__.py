"""A work directory: names and formats in it, what is done in it, its lock, its copy in a bucket."""

from dlc_jax.workspace.records import Record, Step, Written
from dlc_jax.workspace.workspace import Workspace
