"""How rows of instruction data become prompts and responses, by name."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from dlc_jax import checks
from dlc_jax.datasets.chat import MESSAGES, conversation, conversations_of, render
from dlc_jax.datasets.instruction_rows import Row, Rows

_INTRODUCTION = "Below is an instruction that describes a task"
_REQUEST = "Write a response that appropriately completes the request.\n\n"


class Texts(NamedTuple):
    """What a model reads.

    Attributes:
      prompts: [n] everything before the response.
      responses: [n] never empty.
      has_special_tokens: Whether begin and end of sequence are in the texts.
      identities: [n] what says which sample it is, for ids that are hashes.
    """

    prompts: tuple[str, ...]
    responses: tuple[str, ...]
    has_special_tokens: bool
    identities: tuple[str, ...]


class Template(NamedTuple):
    """A way to make texts.

    Attributes:
      columns: A row that has all of these is taken to be of this template.
      texts: (rows, tokenizer or None) -> texts; ValueError names rows that do not fit.
    """

    columns: tuple[str, ...]
    texts: Callable[[Rows, Any], Texts]


@dataclasses.dataclass(frozen=True)
class TextColumns:
    """Rows with the prompt and the response in columns of text.

    Attributes:
      name: Name of the template.
      needed: Columns of the prompt that a row must have.
      response: Column of the response.
      optional: Columns of the prompt that may be missing or empty.
      prompt: Row -> everything before the response.
      request: Row -> what is asked for, with nothing around it.
    """

    name: str
    needed: tuple[str, ...]
    response: str
    optional: tuple[str, ...]
    prompt: Callable[[Row], str]
    request: Callable[[Row], str]

    @property
    def all_needed(self) -> tuple[str, ...]:
        return (*self.needed, self.response)

    def check(self, rows: Rows) -> None:
        """Raises ValueError, by id: a column without text, an empty response, unused context."""
        for column in (*self.all_needed, *self.optional):
            kinds = (str, type(None)) if column in self.optional else (str,)
            rows.refuse(
                (not isinstance(row.get(column), kinds) for row in rows.rows),
                f"have no text in column {column!r}",
            )
        rows.refuse((not row[self.response].strip() for row in rows.rows), "have an empty response")
        rows.refuse_context(self.name)

    def texts(self, rows: Rows, _: Any = None) -> Texts:
        self.check(rows)
        prompts = tuple(self.prompt(row) for row in rows.rows)
        responses = tuple(row[self.response] for row in rows.rows)
        pairs = zip(prompts, responses, strict=True)
        return Texts(prompts, responses, False, tuple(json.dumps(pair) for pair in pairs))


def _alpaca(row: Row) -> str:
    """Source: Taori et al. 2023, Stanford Alpaca."""
    instruction = f"### Instruction:\n{row['instruction']}\n\n"
    if not row.get("input"):
        return f"{_INTRODUCTION}. {_REQUEST}{instruction}### Response:\n"
    context = ", paired with an input that provides further context. "
    return (
        f"{_INTRODUCTION}{context}{_REQUEST}{instruction}### Input:\n{row['input']}\n\n"
        "### Response:\n"
    )


def _instruction_and_input(row: Row) -> str:
    more = row.get("input")
    return f"{row['instruction']}\n\n{more}" if more else row["instruction"]


def _as_it_is(row: Row) -> str:
    return row["prompt"]


_ALPACA = TextColumns(
    "alpaca", ("instruction",), "output", ("input",), _alpaca, _instruction_and_input
)
_PROMPT = TextColumns("prompt", ("prompt",), "response", (), _as_it_is, _as_it_is)


def _chat(rows: Rows, tokenizer: Any) -> Texts:
    """Makes texts of messages where there are some, and of the columns of texts otherwise."""
    if MESSAGES in rows.rows[0]:
        conversations = conversations_of(rows)
        rows.refuse_context("chat")
    else:
        columns = _COLUMNS[told_by_columns(rows, {k: v.all_needed for k, v in _COLUMNS.items()})]
        columns.check(rows)
        conversations = [
            conversation(columns.request(row), row[columns.response]) for row in rows.rows
        ]
    prompts, responses = render(conversations, rows, tokenizer)
    # not the texts: a sample has the same id whichever model reads it
    identities = tuple(
        json.dumps([[message["role"], message["content"]] for message in messages])
        for messages in conversations
    )
    return Texts(prompts, responses, True, identities)


_COLUMNS = {columns.name: columns for columns in (_ALPACA, _PROMPT)}

# "prompt" is for data whose prompts were put into a template already, as in Dolly+HH-RLHF.
TEMPLATES: Mapping[str, Template] = {
    **{name: Template(columns.all_needed, columns.texts) for name, columns in _COLUMNS.items()},
    "chat": Template((MESSAGES,), _chat),
}


def told_by_columns(rows: Rows, choices: Mapping[str, tuple[str, ...]]) -> str:
    """Returns the one name whose columns the first row has; ValueError if it is not one."""
    first = rows.rows[0]
    fitting = [name for name, columns in choices.items() if all(c in first for c in columns)]
    if len(fitting) != 1:
        expected = "; ".join(f"{name}: {', '.join(columns)}" for name, columns in choices.items())
        raise checks.InputError(
            f"{rows.name}: columns {checks.listed(first)} fit "
            f"{' and '.join(fitting) or 'no template'}; expected those of one ({expected}), or "
            "template=... that says which."
        )
    return fitting[0]
