"""How rows of instruction data become prompts and responses, by name."""

from __future__ import annotations

import dataclasses
import json
import operator
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from dlc_jax import checks
from dlc_jax.datasets.chat import MESSAGES, conversations_of, render
from dlc_jax.datasets.instruction_rows import Row, Rows


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
      columns: Those that a row must have, the last of which is the response.
      optional: Columns of the prompt that may be missing or empty.
      prompt: Row -> everything before the response.
      request: Row -> what is asked for, with nothing around it.
    """

    name: str
    columns: tuple[str, ...]
    optional: tuple[str, ...]
    prompt: Callable[[Row], str]
    request: Callable[[Row], str]

    def responses(self, rows: Rows) -> tuple[str, ...]:
        """Returns the responses.

        Raises:
          ValueError: by id, a column without text, an empty response, unused context.
        """
        for column in (*self.columns, *self.optional):
            kinds = (str, type(None)) if column in self.optional else (str,)
            rows.refuse(
                (not isinstance(row.get(column), kinds) for row in rows.rows),
                f"have no text in column {column!r}",
            )
        responses = tuple(row[self.columns[-1]] for row in rows.rows)
        rows.refuse((not response.strip() for response in responses), "have an empty response")
        rows.refuse_context(self.name)
        return responses

    def texts(self, rows: Rows, _: Any = None) -> Texts:
        responses = self.responses(rows)
        prompts = tuple(map(self.prompt, rows.rows))
        pairs = zip(prompts, responses, strict=True)
        return Texts(prompts, responses, False, tuple(map(json.dumps, pairs)))


def _alpaca(row: Row) -> str:
    """Source: Taori et al. 2023, Stanford Alpaca."""
    paired, context = "", ""
    if row.get("input"):
        paired = ", paired with an input that provides further context"
        context = f"### Input:\n{row['input']}\n\n"
    return (
        f"Below is an instruction that describes a task{paired}. Write a response that "
        "appropriately completes the request.\n\n"
        f"### Instruction:\n{row['instruction']}\n\n{context}### Response:\n"
    )


def _instruction_and_input(row: Row) -> str:
    more = row.get("input")
    return f"{row['instruction']}\n\n{more}" if more else row["instruction"]


_prompt = operator.itemgetter("prompt")
_ALPACA = TextColumns(
    "alpaca", ("instruction", "output"), ("input",), _alpaca, _instruction_and_input
)
_PROMPT = TextColumns("prompt", ("prompt", "response"), (), _prompt, _prompt)
_COLUMNS = {"alpaca": _ALPACA, "prompt": _PROMPT}


def _chat(rows: Rows, tokenizer: Any) -> Texts:
    """Makes texts of messages where there are some, and of the columns of texts otherwise."""
    if MESSAGES in rows.rows[0]:
        conversations = conversations_of(rows)
        rows.refuse_context("chat")
    else:
        columns = _COLUMNS[told_by_columns(rows, _COLUMNS)]
        pairs = zip(map(columns.request, rows.rows), columns.responses(rows), strict=True)
        conversations = [
            [{"role": "user", "content": request}, {"role": "assistant", "content": response}]
            for request, response in pairs
        ]
    prompts, responses = render(conversations, rows, tokenizer)
    # not the texts: a sample has the same id whichever model reads it
    identities = tuple(
        json.dumps([[message["role"], message["content"]] for message in messages])
        for messages in conversations
    )
    return Texts(prompts, responses, True, identities)


# "prompt" is for data whose prompts were put into a template already, as in Dolly+HH-RLHF.
TEMPLATES: Mapping[str, Template | TextColumns] = {
    **_COLUMNS,
    "chat": Template((MESSAGES,), _chat),
}


def told_by_columns(rows: Rows, choices: Mapping[str, Template | TextColumns]) -> str:
    """Returns the one name whose columns the first row has; ValueError if it is not one."""
    first = rows.rows[0]
    columns = {name: template.columns for name, template in choices.items()}
    fitting = [name for name in columns if all(column in first for column in columns[name])]
    if len(fitting) != 1:
        expected = "; ".join(f"{name}: {', '.join(columns[name])}" for name in columns)
        raise checks.InputError(
            f"{rows.name}: columns {checks.listed(first)} fit "
            f"{' and '.join(fitting) or 'no template'}; expected those of one ({expected}), or "
            "template=... that says which."
        )
    return fitting[0]
