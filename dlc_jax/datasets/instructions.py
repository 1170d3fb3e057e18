"""Instruction data: prompts with the responses to them."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int64

from dlc_jax import expect
from dlc_jax.datasets.labels import content_ids, encode_labels
from dlc_jax.datasets.row_sources import ROW_SOURCES
from dlc_jax.datasets.templates import TEMPLATES, Row, Rows, texts_of, told_by_columns


@dataclasses.dataclass(frozen=True, eq=False)
class Instructions:
    """Prompts with responses, in the order of their source.

    Attributes:
      prompts: [n] everything before the response, template included.
      responses: [n] never empty.
      ids: [n] stable names, unique.
      rows: [n] as the source has them.
      name: Name of the source.
      has_special_tokens: Whether begin and end of sequence are in the texts, as a chat template
        puts them there; otherwise the tokenizer adds them.
    """

    prompts: tuple[str, ...] = dataclasses.field(repr=False)
    responses: tuple[str, ...] = dataclasses.field(repr=False)
    ids: np.ndarray = dataclasses.field(repr=False)
    rows: tuple[dict[str, Any], ...] = dataclasses.field(repr=False)
    name: str = "instructions"
    has_special_tokens: bool = False

    def __len__(self) -> int:
        return len(self.prompts)

    def subset(self, positions: Int64[np.ndarray, " k"]) -> Instructions:
        """Returns the samples at these positions."""
        return dataclasses.replace(
            self,
            prompts=tuple(self.prompts[i] for i in positions),
            responses=tuple(self.responses[i] for i in positions),
            ids=self.ids[positions],
            rows=tuple(self.rows[i] for i in positions),
        )

    def without_prompts(self, begin: str = "") -> Instructions:
        """Returns the responses with nothing before them but `begin` where a prompt begins so."""
        prompts = tuple(begin if prompt.startswith(begin) else "" for prompt in self.prompts)
        return dataclasses.replace(self, prompts=prompts)

    def categories(self, column: str) -> tuple[np.ndarray, tuple[str, ...]]:
        """Returns a class id per row and the names of the classes, sorted, by a column of text.

        Raises:
          ValueError: a row without it.
        """
        values = [row.get(column) for row in self.rows]
        Rows([{"id": i} for i in self.ids], self.name).refuse(
            (not isinstance(value, str) or not value.strip() for value in values),
            f"have no text in column {column!r}",
        )
        expect.no_nul(self.name, f"column {column!r}:", values)
        labels, names, _ = encode_labels(values, None, self.name)
        return labels, names

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 over every id, prompt and response, and over who adds special tokens."""
        digest = hashlib.sha256(b"special tokens" if self.has_special_tokens else b"")
        for row in zip(self.ids.tolist(), self.prompts, self.responses, strict=True):
            digest.update(json.dumps(row).encode())
        return digest.hexdigest()


def load_instructions(
    source: str, template: str | None = None, *, tokenizer: Any = None
) -> Instructions:
    """Loads instruction data.

    Args:
      source: `jsonl:`, `json:` (a list of objects) or `parquet:`, each of a file, a folder or a
        glob; JSON may be compressed, as the suffix says: `.jsonl.gz`, `.json.zst`;
        `hf:<owner/name or folder>/<split>`, Hugging Face hub or a local copy, see `load_hf`, or
        with JSON of either kind where the split has no Parquet file;
        `demo:dolly/train`, `demo:dolly/test`, the bundled sample.
      template: `alpaca`, around `instruction`, `input` and `output`; `prompt`, for `prompt` and
        `response` as they are to be read; `chat`, the tokenizer's own, for `messages`, a list of
        {role, content} that ends with the response, or for either of the other two. None: the one
        whose columns are there.
      tokenizer: For `chat`: a tokenizer of transformers, or a function that returns one, which is
        called if it is needed.
    Returns:
      Ids are the column `id` where it is there and unique; otherwise a hash of prompt and response
      (of the messages, for `chat`), with a number for repeated ones.
    Raises:
      ValueError: an unknown scheme, nothing there, the hub cannot be reached, a damaged file, no
        rows, no or several templates that fit, columns that are missing or no text, and empty
        responses, by id; for `chat`, see also `templates.render`.
    Example:
      >>> data = dlc.load_instructions("demo:dolly/train")
      >>> len(data), data.responses[0][:24]
      (400, 'Kangen water is alkaline')
    """
    scheme, separator, where = source.partition(":")
    if not separator:
        raise expect.InputError(f"{source!r}: expected <scheme>:<file>, such as jsonl:train.jsonl.")
    expect.one_of(f"scheme of {source!r}", scheme, ROW_SOURCES)
    rows = ROW_SOURCES[scheme](where)
    if not rows:
        raise expect.InputError(f"{source}: has no rows.")
    return instructions(rows, template, source, tokenizer=tokenizer)


def instructions(
    rows: Sequence[Row], template: str | None = None, name: str = "rows", *, tokenizer: Any = None
) -> Instructions:
    """Makes instruction data of rows, at least one; see `load_instructions`."""
    named = Rows(rows, name)
    if template is None:
        template = told_by_columns(named, TEMPLATES)
    expect.one_of("template", template, TEMPLATES)
    prompts, responses, identities = texts_of(named, template, tokenizer)
    given = [row.get("id") for row in rows]
    ids = [str(i) for i in given]
    if None in given or len(set(ids)) < len(ids):
        ids = content_ids(map(str.encode, identities))
    unique, copies = expect.as_ids(name, ids), tuple(map(dict, rows))
    return Instructions(prompts, responses, unique, copies, name, template == "chat")
