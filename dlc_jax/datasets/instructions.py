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
from dlc_jax.datasets.chat import Conversation, Span
from dlc_jax.datasets.labels import content_ids, encode_labels
from dlc_jax.datasets.layouts import RELEASED, Reading, read_rows
from dlc_jax.datasets.row_sources import ROW_SOURCES
from dlc_jax.datasets.rows import Row, Rows


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
      layout: Name of the rows' layout, such as `alpaca`; see `load_instructions`.
      as_released: Whether the prompts are those of the authors' released code.
      others: [n] parts of `responses` that are not the assistant's, between two of its turns, as
        (start, end) in characters; None: there are none.
      conversations: [n] what a chat template wrote, up to the last response; None: text is read.
    """

    prompts: tuple[str, ...] = dataclasses.field(repr=False)
    responses: tuple[str, ...] = dataclasses.field(repr=False)
    ids: np.ndarray = dataclasses.field(repr=False)
    rows: tuple[dict[str, Any], ...] = dataclasses.field(repr=False)
    name: str = "instructions"
    has_special_tokens: bool = False
    layout: str = "prompt"
    as_released: bool = False
    others: tuple[tuple[Span, ...], ...] | None = dataclasses.field(default=None, repr=False)
    conversations: tuple[Conversation, ...] | None = dataclasses.field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def summary(self) -> str:
        """How the rows were read, in one line."""
        how = "in the tokenizer's chat template" if self.has_special_tokens else "as text"
        how += " of the authors' released code" if self.as_released else ""
        return f"{self.name}: {len(self)} rows of layout {self.layout!r}, read {how}"

    def subset(self, positions: Int64[np.ndarray, " k"]) -> Instructions:
        """Returns the samples at these positions."""

        def some(values: tuple[Any, ...] | None) -> Any:
            return None if values is None else tuple(values[i] for i in positions)

        return dataclasses.replace(
            self,
            prompts=some(self.prompts),
            responses=some(self.responses),
            ids=self.ids[positions],
            rows=some(self.rows),
            others=some(self.others),
            conversations=some(self.conversations),
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
        """SHA-256 over ids, prompts, responses, others in them, and who adds special tokens."""
        digest = hashlib.sha256(b"special tokens" if self.has_special_tokens else b"")
        for row in zip(self.ids.tolist(), self.prompts, self.responses, strict=True):
            digest.update(json.dumps(row).encode())
        if self.others is not None:
            digest.update(json.dumps(self.others).encode())
        return digest.hexdigest()


def load_instructions(
    source: str,
    template: str | None = None,
    *,
    tokenizer: Any = None,
    columns: str | None = None,
    turns: str = "last",
    response_marker: str | None = None,
) -> Instructions:
    """Loads instruction data.

    Args:
      source: `jsonl:`, `json:` (a list of objects) or `parquet:`, each of a file, a folder or a
        glob; JSON may be compressed, as the suffix says: `.jsonl.gz`, `.json.zst`;
        `hf:<owner/name or folder>/<split>`, Hugging Face hub or a local copy, see `load_hf`, or
        with JSON of either kind where the split has no Parquet file;
        `demo:dolly/train`, `demo:dolly/test`, the bundled sample.
      template: Layout of the rows; None: the one whose columns are there. In Alpaca's text:
        `alpaca` (columns `instruction`, `input`, `output`; `system` in the place of its first
        sentences), `dolly` (`instruction`, `context`, `response`), `gsm8k` (`question`, `answer`)
        and `openorca` (`system_prompt`, `question`, `response`). As they are: `prompt` (`prompt`,
        `response`), `completion` (`prompt`, `completion`, of TRL) and `text`, a column with the
        response behind `response_marker`. By the tokenizer's chat template: `messages`
        ({role, content}, of OpenAI), `sharegpt` (`conversations` of {from, value}) and `completion`
        of two lists of messages. `chat` puts that template around the others too, and writes
        Alpaca's `history`. `released`: the text of the authors' code for instructions, of rows of
        `alpaca`, `prompt` and `sharegpt` (the first two turns), for mode `official`.
      tokenizer: For chat: a tokenizer of transformers, or a function that returns one, which is
        called if it is needed.
      columns: What the source calls columns, such as `prompt=question,response=answer`.
      turns: Which turns of the assistant are responses: the `last`, the `first` (the rest is left
        out) or `all`. Those of `weight` 0 are none.
      response_marker: What stands before the response in a column `text`, which is read then.
    Returns:
      Ids are the column `id` where it is there and unique; otherwise a hash of prompt and response
      (of the messages, in chat), with a number for repeated ones.
    Raises:
      ValueError: an unknown scheme, nothing there, the hub cannot be reached, a damaged file, no
        rows, no or several layouts that fit, and naming the rows, columns that are missing or no
        text, empty responses, what would change the prompt and is not understood; in chat, see
        also `chat.render`.
    Example:
      >>> data = dlc.load_instructions("demo:dolly/train")
      >>> len(data), data.layout, data.responses[0][:24]
      (400, 'prompt', 'Kangen water is alkaline')
    """
    scheme, separator, where = source.partition(":")
    if not separator:
        raise expect.InputError(f"{source!r}: expected <scheme>:<file>, such as jsonl:train.jsonl.")
    expect.one_of(f"scheme of {source!r}", scheme, ROW_SOURCES)
    reading = Reading(template, columns, turns, response_marker)
    reading.check()  # before anything is read
    rows = ROW_SOURCES[scheme](where)
    if not rows:
        raise expect.InputError(f"{source}: has no rows.")
    how = dataclasses.asdict(reading)
    return instructions(rows, name=source, tokenizer=tokenizer, **how)


def instructions(
    rows: Sequence[Row],
    template: str | None = None,
    name: str = "rows",
    *,
    tokenizer: Any = None,
    **how: Any,
) -> Instructions:
    """Makes instruction data of rows, at least one; see `load_instructions`."""
    reading = Reading(template, **how)
    reading.check()
    found = read_rows(Rows(rows, name), reading, tokenizer)
    own_id = reading.own_names.get("id", "id")
    given = [row.get(own_id) for row in rows]
    ids = [str(i) for i in given]
    if None in given or len(set(ids)) < len(ids):
        ids = content_ids(map(str.encode, found.identities))
    prompts, responses, others, talks = zip(*found.written, strict=True)
    is_chat = talks[0] is not None
    return Instructions(
        prompts,
        responses,
        expect.as_ids(name, ids),
        tuple(map(dict, rows)),
        name,
        has_special_tokens=is_chat,
        layout=found.layout,
        as_released=template == RELEASED,
        others=others if any(others) else None,
        conversations=talks if is_chat else None,
    )
