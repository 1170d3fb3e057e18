"""Conversations as a tokenizer's own chat template writes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dlc_jax import checks
from dlc_jax.datasets.instruction_rows import Row, Rows, is_empty
from dlc_jax.datasets.limits import limited

MESSAGES = "messages"  # column
# Fields of a message besides role and content that a template may know or not.
_FIELDS = ("tool_calls", "function_call", "tools", "documents", "images", "videos", "audios")
Messages = list[dict[str, Any]]
_LONGEST_TEMPLATE = 2**20  # characters that are not of the conversation


def conversations_of(rows: Rows) -> list[Messages]:
    """Returns the column `messages`, of which the last is the response.

    Raises:
      ValueError: by id, no list of {role, content} with text in both; fewer than two; a last one
        that is not the assistant's, or is empty.
    """
    rows.refuse(
        (not _is_conversation(row) for row in rows.rows),
        f"have no two or more {{role, content}} of text in column {MESSAGES!r}",
    )
    last = [row[MESSAGES][-1] for row in rows.rows]
    rows.refuse(
        (message["role"] != "assistant" for message in last),
        "end with a message of another role than 'assistant'",
    )
    rows.refuse((not message["content"].strip() for message in last), "have an empty response")
    # a table gives every message all fields that one of them has
    return [
        [{k: v for k, v in message.items() if v is not None} for message in row[MESSAGES]]
        for row in rows.rows
    ]


def _is_conversation(row: Row) -> bool:
    messages = row.get(MESSAGES)
    return (
        isinstance(messages, list)
        and len(messages) > 1
        and all(isinstance(message, Mapping) for message in messages)
        and all(isinstance(m.get(key), str) for m in messages for key in ("role", "content"))
    )


def render(
    conversations: Sequence[Messages], rows: Rows, tokenizer: Any
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Writes conversations out; prompt and response together are what the template gives.

    The end of the turn belongs to the response, and so does what the template puts behind it, such
    as Gemma's line break: the tokens are then those of `apply_chat_template`, which other programs
    train on.

    Args:
      conversations: One per row, each ending with the response.
      rows: Rows that hold them, for messages.
      tokenizer: A tokenizer of transformers, or a function that returns one; None: there is none.
    Returns:
      Prompts [n], all before the response, and how a response is begun; responses [n], the response
      and all that the template puts behind it. Both hold their special tokens.
    Raises:
      ValueError: no tokenizer, one without a chat template; by id, conversations that it refuses,
        or that begin otherwise once the response is there.
    """
    if tokenizer is None:
        raise checks.InputError(
            f"{rows.name}: template 'chat' is the tokenizer's own; expected tokenizer=... with it."
        )
    if not hasattr(tokenizer, "apply_chat_template"):
        tokenizer = tokenizer()
    if not getattr(tokenizer, "chat_template", None):
        raise checks.InputError(
            f"{rows.name}: the tokenizer {tokenizer.name_or_path!r} has no chat template, as those "
            "of base models; expected one of a model for chat, or another template."
        )
    prompts, wholes = [], []
    for place, messages in zip(rows.places, conversations, strict=True):
        problem = f"{rows.name}: {place}: the tokenizer's chat template refuses it"
        # the template is a program of its own: anything can happen
        with checks.refusing(problem, Exception, shown=checks.first_line):
            prompts.append(written(tokenizer, messages[:-1], add_generation_prompt=True))
            wholes.append(written(tokenizer, messages))
            unused = _unused_field(tokenizer, messages, wholes[-1])
        if unused is not None:
            raise checks.InputError(
                f"{rows.name}: {place}: has messages with {unused!r}, which the tokenizer's chat "
                "template leaves out; expected a template that uses it, or messages without it."
            )
    pairs = list(zip(wholes, prompts, strict=True))
    rows.refuse(
        (not whole.startswith(prompt) or whole == prompt for whole, prompt in pairs),
        "are written otherwise by the tokenizer's chat template once the response is there, so "
        "that prompt and response cannot be told apart",
    )
    return tuple(prompts), tuple(whole[len(prompt) :] for whole, prompt in pairs)


def written(tokenizer: Any, messages: Messages, **options: Any) -> str:
    """Returns what a tokenizer's chat template makes of a conversation.

    Raises:
      ValueError: it is far longer than the conversation.
      Exception: any that the template raises, or its limits; see `limited`.
    """
    with limited():
        text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    size = sum(len(str(message)) for message in messages)
    if len(text) > _LONGEST_TEMPLATE + 10 * size:
        raise ValueError(f"it makes {len(text)} characters of {size}")
    return text


def _unused_field(tokenizer: Any, messages: Messages, text: str) -> str | None:
    """Returns a field of these messages that the text does not depend on."""
    for field in _FIELDS:
        if any(not is_empty(message.get(field)) for message in messages):
            without = [{k: v for k, v in m.items() if k != field} for m in messages]
            if written(tokenizer, without) == text:
                return field
    return None
