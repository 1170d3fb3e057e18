"""How rows of instruction data become prompts and responses, by columns or by a chat template."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import operator
import resource
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from dlc_jax import expect

Row = Mapping[str, Any]
# Columns of what a model is to see besides the prompt, as common formats call them.
_CONTEXT = (
    *("system", "system_prompt", "history", "context", "documents"),
    *("tools", "functions", "image", "images", "videos", "audios"),
)


@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows of one source, in its order.

    Attributes:
      rows: At least one.
      name: Name of the source.
    """

    rows: Sequence[Row] = dataclasses.field(repr=False)
    name: str

    @functools.cached_property
    def places(self) -> list[str]:
        """What messages call each row: its `id`, or its number counted from 1."""
        return [str(row["id"]) if "id" in row else f"row {i}" for i, row in enumerate(self.rows, 1)]

    def refuse(self, is_bad: Iterable[bool], problem: str) -> None:
        """Raises ValueError, naming the rows, if there are any for which `is_bad` holds."""
        bad = [place for place, value in zip(self.places, is_bad, strict=True) if value]
        if bad:
            raise expect.InputError(f"{self.name}: {len(bad)} {problem}: {expect.listed(bad)}.")

    def refuse_context(self, template: str) -> None:
        """Raises ValueError, naming column and rows, for context that a template leaves out."""
        for column in sorted({name for row in self.rows for name in row}):
            if column.lower() in _CONTEXT:
                self.refuse(
                    (not is_empty(row.get(column)) for row in self.rows),
                    f"have {column!r}, which template {template!r} does not use; expected it in "
                    "'messages' or the prompt, and the column left out or empty",
                )


def is_empty(value: Any) -> bool:
    """Whether a value of a row holds nothing: null, blank text, or nothing but such values."""
    if isinstance(value, str):
        return value.strip() in ("", "[]", "{}", "null")
    if isinstance(value, Mapping):
        value = list(value.values())
    return all(map(is_empty, value)) if isinstance(value, list | tuple) else value is None


_SECONDS, _BYTES = 10.0, 2**29


@contextlib.contextmanager
def limited() -> Iterator[None]:
    """Ends a block that takes more than 10 seconds, or 512 MiB more than the process has.

    Time is limited in the main thread, where signals arrive; memory where /proc gives its size.

    Raises:
      TimeoutError, MemoryError: in the block.
    """
    with contextlib.ExitStack() as after:
        if (memory := Path("/proc/self/statm")).exists():  # not on another system
            used = int(memory.read_text().split()[0]) * resource.getpagesize()
            soft, hard = resource.getrlimit(resource.RLIMIT_AS)
            known = (limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY)
            after.callback(resource.setrlimit, resource.RLIMIT_AS, (soft, hard))
            resource.setrlimit(resource.RLIMIT_AS, (min([used + _BYTES, *known]), hard))
        if threading.current_thread() is threading.main_thread():
            after.callback(signal.signal, signal.SIGALRM, signal.signal(signal.SIGALRM, _stop))
            # again and again: a template that is compiled swallows what its constants raise
            timer = signal.setitimer(signal.ITIMER_REAL, _SECONDS, _SECONDS)
            after.callback(signal.setitimer, signal.ITIMER_REAL, *timer)
        yield


def _stop(*_: object) -> NoReturn:
    raise TimeoutError(f"took more than {_SECONDS:g} s")


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
        raise expect.InputError(
            f"{rows.name}: template 'chat' is the tokenizer's own; expected tokenizer=... with it."
        )
    if not hasattr(tokenizer, "apply_chat_template"):
        tokenizer = tokenizer()
    if not getattr(tokenizer, "chat_template", None):
        raise expect.InputError(
            f"{rows.name}: the tokenizer {tokenizer.name_or_path!r} has no chat template, as those "
            "of base models; expected one of a model for chat, or another template."
        )
    prompts, wholes = [], []
    for place, messages in zip(rows.places, conversations, strict=True):
        problem = f"{rows.name}: {place}: the tokenizer's chat template refuses it"
        # the template is a program of its own: anything can happen
        with expect.refusing(problem, Exception, shown=expect.first_line):
            prompts.append(written(tokenizer, messages[:-1], add_generation_prompt=True))
            wholes.append(written(tokenizer, messages))
            unused = _unused_field(tokenizer, messages, wholes[-1])
        if unused is not None:
            raise expect.InputError(
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


class TextColumns(NamedTuple):
    """Rows with the prompt and the response in columns of text.

    Attributes:
      optional: Columns of the prompt that may be missing or empty.
      prompt: Row -> everything before the response.
      request: Row -> what is asked for, with nothing around it.
    """

    optional: tuple[str, ...]
    prompt: Callable[[Row], str]
    request: Callable[[Row], str]


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
_COLUMNS = {
    "alpaca": TextColumns(("input",), _alpaca, _instruction_and_input),
    "prompt": TextColumns((), _prompt, _prompt),
}
# Template -> the columns that its rows have; the last one holds the response.
# "prompt" is for data whose prompts were put into a template already, as in Dolly+HH-RLHF.
TEMPLATES: Mapping[str, tuple[str, ...]] = {
    "alpaca": ("instruction", "output"),
    "prompt": ("prompt", "response"),
    "chat": (MESSAGES,),
}


def texts_of(
    rows: Rows, template: str, tokenizer: Any
) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """Returns what a model reads.

    Messages are what `chat` writes where there are some, and otherwise the columns of texts.

    Returns:
      Prompts [n], everything before the responses; responses [n], never empty; and what says which
      sample each is [n], for ids that are hashes.
    Raises:
      ValueError: naming rows that do not fit; see `render`.
    """
    if template != "chat":
        responses = _responses(rows, template)
        prompts = tuple(map(_COLUMNS[template].prompt, rows.rows))
        pairs = zip(prompts, responses, strict=True)
        return prompts, responses, tuple(map(json.dumps, pairs))
    if MESSAGES in rows.rows[0]:
        conversations = conversations_of(rows)
        rows.refuse_context(template)
    else:
        template = told_by_columns(rows, _COLUMNS)
        requests, responses = map(_COLUMNS[template].request, rows.rows), _responses(rows, template)
        conversations = [
            [{"role": "user", "content": request}, {"role": "assistant", "content": response}]
            for request, response in zip(requests, responses, strict=True)
        ]
    # not of the texts: a sample has the same id whichever model reads it
    identities = tuple(
        json.dumps([[message["role"], message["content"]] for message in messages])
        for messages in conversations
    )
    return *render(conversations, rows, tokenizer), identities


def _responses(rows: Rows, template: str) -> tuple[str, ...]:
    """Returns the column of responses.

    Raises:
      ValueError: by id, a column without text, an empty response, unused context.
    """
    columns, optional = TEMPLATES[template], _COLUMNS[template].optional
    for column in (*columns, *optional):
        kinds = (str, type(None)) if column in optional else str
        rows.refuse(
            (not isinstance(row.get(column), kinds) for row in rows.rows),
            f"have no text in column {column!r}",
        )
    responses = tuple(row[columns[-1]] for row in rows.rows)
    rows.refuse((not response.strip() for response in responses), "have an empty response")
    rows.refuse_context(template)
    return responses


def told_by_columns(rows: Rows, templates: Iterable[str]) -> str:
    """Returns the one name whose columns the first row has; ValueError if it is not one."""
    first = rows.rows[0]
    columns = {name: TEMPLATES[name] for name in templates}
    fitting = [name for name in columns if all(column in first for column in columns[name])]
    if len(fitting) != 1:
        expected = "; ".join(f"{name}: {', '.join(columns[name])}" for name in columns)
        raise expect.InputError(
            f"{rows.name}: columns {expect.listed(first)} fit "
            f"{' and '.join(fitting) or 'no template'}; expected those of one ({expected}), or "
            "template=... that says which."
        )
    return fitting[0]
