"""The columns that rows of instruction data have, and what a model reads of each kind of row."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from dlc_jax import expect
from dlc_jax.datasets.chat import TURNS, Conversation, Messages, Rendered, render
from dlc_jax.datasets.released_prompts import scored_as_released
from dlc_jax.datasets.rows import Row, Rows, Unfit, is_empty, on_one_line

CHAT = "chat"  # the tokenizer's own template, around any of the layouts
RELEASED = "released"  # the text of the authors' code, around those of `_RELEASED`
# Columns of what a model is to see besides the prompt, as common formats call them.
_CONTEXT = (
    *(
        "input",
        "context",
        "system",
        "system_prompt",
        "system_message",
        "history",
        "documents",
        "choices",
    ),
    *("tools", "functions", "image", "images", "video", "videos", "audio", "audios"),
)
_TOOLS, _OPTIONS = "tools", "chat_template_kwargs"  # columns that any chat template takes
_RESERVED = (  # arguments that say what is done with the text, and are no business of a row
    *("self", "tokenizer", "messages", "conversation", "conversations", "tools"),
    *("documents", "chat_template", "add_generation_prompt", "tokenize"),
    *("continue_final_message", "sanitize_control_tokens", "padding", "truncation", "max_length"),
    *("return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs"),
)


class RowSample(NamedTuple):
    """What a row asks for, and the answer.

    Attributes:
      conversation: It as messages.
      texts: Prompt and response as a base model reads them; None: only a chat template writes it.
      same_as: Identity of the sample that it is in another text; None: it is none.
    """

    conversation: Conversation
    texts: tuple[str, str] | None = None
    same_as: str | None = None

    @property
    def identity(self) -> str:
        """What says which sample it is, for ids that are hashes: not of a tokenizer."""
        if self.same_as is not None:
            return self.same_as
        messages = self.conversation.messages
        talk = [[message["role"], message.get("content")] for message in messages]
        return json.dumps(talk if self.texts is None else self.texts)


class RowLayout(NamedTuple):
    """A kind of rows.

    Attributes:
      columns: Columns that every row has; the last one holds the response.
      optional: Columns that are read too where they are not empty.
      read: Row -> sample; `Unfit` says what is wrong with the row.
      may_be_chat: Whether its rows may be conversations, for which no template has to be asked for.
    """

    columns: tuple[str, ...]
    optional: tuple[str, ...]
    read: Callable[[Row], RowSample]
    may_be_chat: bool = False


def _text(row: Row, column: str, *, optional: bool = False) -> str:
    value = row.get(column)
    if isinstance(value, str):
        return value
    if optional and value is None:
        return ""
    raise Unfit(f"have no text in column {column!r}")


def _response(row: Row, column: str) -> str:
    return _not_blank(_text(row, column))


def _not_blank(response: str) -> str:
    if not response.strip():
        raise Unfit("have an empty response")
    return response


def _asked(request: str, response: str, before: Sequence[dict[str, Any]] = ()) -> Conversation:
    question = {"role": "user", "content": request}
    return Conversation([*before, question, {"role": "assistant", "content": response}])


def _system_of(row: Row, column: str) -> str:
    return "" if is_empty(row.get(column)) else _text(row, column)


def _system(text: str) -> Messages:
    return [{"role": "system", "content": text}] if text else []


def _alpaca(row: Row) -> RowSample:
    """Sources: Taori et al. 2023, Stanford Alpaca; `system` and `history` as in LLaMA-Factory.

    A system prompt stands in the place of the template's first sentences.
    """
    response = _response(row, "output")
    instruction = _text(row, "instruction")
    given, system = _text(row, "input", optional=True), _system_of(row, "system")
    history = [] if is_empty(row.get("history")) else row["history"]
    if not isinstance(history, list) or not all(map(_is_pair, history)):
        raise Unfit("have no list of [question, answer], of text, in column 'history'")
    paired, context = "", ""
    if given:
        paired = ", paired with an input that provides further context"
        context = f"### Input:\n{given}\n\n"
    opening = (
        f"Below is an instruction that describes a task{paired}. Write a response that "
        "appropriately completes the request."
    )
    prompt = f"{system or opening}\n\n### Instruction:\n{instruction}\n\n{context}### Response:\n"
    turns = [message for pair in history for message in _asked(*pair).messages]
    request = f"{instruction}\n\n{given}" if given else instruction
    talk = _asked(request, response, _system(system) + turns)
    return RowSample(talk, None if turns else (prompt, response))


def _is_pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(v, str) for v in value)


def _like_alpaca(**columns: str) -> RowLayout:
    """Returns the layout whose columns hold what Alpaca's of these names do."""

    def read(row: Row) -> RowSample:
        for name, column in columns.items():  # a message is to name the column that is there
            _text(row, column, optional=name in _ALPACA_OPTIONAL)
        return _alpaca({name: row.get(column) for name, column in columns.items()})

    needed = [column for name, column in columns.items() if name not in _ALPACA_OPTIONAL]
    optional = [column for name, column in columns.items() if name in _ALPACA_OPTIONAL]
    return RowLayout((*needed,), (*optional,), read)


_ALPACA_OPTIONAL = ("input", "system", "history")


def _texts(response_column: str) -> Callable[[Row], RowSample]:
    """Returns what reads prompts that are to be read as they are."""

    def read(row: Row) -> RowSample:
        prompt, response = _text(row, "prompt"), _response(row, response_column)
        return RowSample(_asked(prompt, response), (prompt, response))

    return read


def _completion(row: Row) -> RowSample:
    """Source: TRL's prompt and completion, texts or lists of messages both."""
    prompt, completion = row.get("prompt"), row.get("completion")
    if not isinstance(prompt, list) and not isinstance(completion, list):
        return _texts("completion")(row)
    before, silent = _messages(prompt, "prompt")
    after, more = _messages(completion, "completion")
    silent |= {len(before) + i for i in more}
    _ends_well(after)
    return RowSample(Conversation(before + after, len(before), frozenset(silent)))


def _conversation_in(column: str) -> Callable[[Row], RowSample]:
    """Returns what reads a column of messages, of which the last is the response."""

    def read(row: Row) -> RowSample:
        found, silent = _messages(row.get(column), column)
        if len(found) < 2:
            raise Unfit(f"have no two or more {_MESSAGE} of text in column {column!r}")
        _ends_well(found)
        for name in _SYSTEM_COLUMNS:
            text = _system_of(row, name)
            if text and found[0]["role"] != "system":
                found, silent = [*_system(text), *found], {i + 1 for i in silent}
            elif text and found[0].get("content") != text:
                raise Unfit(f"have {name!r} and another system prompt in column {column!r}")
        return RowSample(Conversation(found, silent=frozenset(silent)))

    return read


_SYSTEM_COLUMNS = ("system", "system_prompt")
_MESSAGE = "{role, content}"
# Who speaks, where messages are {from, value}; Source: FastChat's and LLaMA-Factory's readers.
_SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bard": "assistant",
    "bing": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}


def _messages(value: Any, column: str) -> tuple[Messages, set[int]]:
    """Returns messages as chat templates take them, and the numbers of those of weight 0."""
    if not isinstance(value, list) or not value:
        raise Unfit(f"have no two or more {_MESSAGE} of text in column {column!r}")
    found = [_message(message, column) for message in value]
    silent = {i for i, message in enumerate(found) if message.pop("weight", None) == 0}
    return found, silent


def _message(value: Any, column: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise Unfit(f"have no two or more {_MESSAGE} of text in column {column!r}")
    # a table gives every message all fields that one of them has
    message = {name: field for name, field in value.items() if field is not None}
    if "role" not in message and "from" in message:
        speaker = message.pop("from")
        if not isinstance(speaker, str) or speaker not in _SPEAKERS:
            raise Unfit(
                f"have a turn of {speaker!r} in column {column!r}; expected one of "
                f"{', '.join(_SPEAKERS)}"
            )
        message = {"role": _SPEAKERS[speaker], "content": message.pop("value", None), **message}
    content = message.get("content")
    if isinstance(content, list):
        message["content"] = content = _joined(content, column)
    calls = not is_empty(message.get("tool_calls"))
    if not isinstance(message.get("role"), str) or not (
        isinstance(content, str) or (content is None and calls)
    ):
        raise Unfit(f"have no two or more {_MESSAGE} of text in column {column!r}")
    if content is None:
        message.pop("content", None)
    weight = message.get("weight", 1)
    if weight not in (0, 1):
        raise Unfit(f"have a message of weight {weight!r} in column {column!r}; expected 0 or 1")
    return message


def _joined(content: Sequence[Any], column: str) -> str:
    """Returns the text of content that is in parts, as OpenAI has it."""
    parts = [part if isinstance(part, Mapping) else {} for part in content]
    if kind := next((part["type"] for part in parts if part.get("type", TEXT) != TEXT), None):
        raise Unfit(f"have content of type {kind!r} in column {column!r}; expected text alone")
    texts = [text for part in parts if isinstance(text := part.get("text"), str)]
    if len(texts) < len(parts):
        raise Unfit(f"have no two or more {_MESSAGE} of text in column {column!r}")
    return "".join(texts)


def _ends_well(messages: Messages) -> None:
    if messages[-1]["role"] != "assistant":
        raise Unfit("end with a message of another role than 'assistant'")
    said = messages[-1].get("content", "").strip()
    if not said and is_empty(messages[-1].get("tool_calls")):
        raise Unfit("have an empty response")


LAYOUTS: Mapping[str, RowLayout] = {
    "alpaca": RowLayout(("instruction", "output"), _ALPACA_OPTIONAL, _alpaca),
    # of prompts that were put into a template already, as in Dolly+HH-RLHF
    "prompt": RowLayout(("prompt", "response"), (), _texts("response")),
    "completion": RowLayout(("prompt", "completion"), (), _completion, True),
    "messages": RowLayout(("messages",), _SYSTEM_COLUMNS, _conversation_in("messages"), True),
    "sharegpt": RowLayout(
        ("conversations",), _SYSTEM_COLUMNS, _conversation_in("conversations"), True
    ),
    "dolly": _like_alpaca(instruction="instruction", input="context", output="response"),
    "gsm8k": _like_alpaca(instruction="question", output="answer"),
    "openorca": _like_alpaca(system="system_prompt", instruction="question", output="response"),
}


def _as_released(name: str, *apart: str) -> RowLayout:
    """Returns a layout with the text of the authors' released code.

    Args:
      name: The layout that reads the columns.
      apart: Columns of which the released code makes its own prompt.
    """
    columns, _, read, _ = LAYOUTS[name]

    def read_as_released(row: Row) -> RowSample:
        sample = read({key: row.get(key) for key in (*columns, *apart)})
        _not_blank(sample.conversation.messages[1].get("content") or "")
        fields = {key: row.get(key) for key in apart}
        texts = scored_as_released(sample.conversation, fields)
        return RowSample(sample.conversation, texts, same_as=sample.identity)

    return RowLayout(columns, tuple({*apart} - {*columns}), read_as_released)


_RELEASED: Mapping[str, RowLayout] = {
    "alpaca": _as_released("alpaca", "instruction", "input"),
    "prompt": _as_released("prompt"),
    "sharegpt": _as_released("sharegpt"),
}
TEXT = "text"  # the layout of a column in which a marker stands before the response
TEMPLATES = (*LAYOUTS, TEXT, CHAT, RELEASED)
_COLUMNS = tuple(  # that can be named in another way
    dict.fromkeys(
        [
            "id",
            TEXT,
            _TOOLS,
            _OPTIONS,
            *(c for k in LAYOUTS.values() for c in (*k.columns, *k.optional)),
        ]
    )
)


def _marked_text(marker: str) -> RowLayout:
    def read(row: Row) -> RowSample:
        before, found, response = _text(row, TEXT).partition(marker)
        if not found:
            raise Unfit(f"have no response marker {marker!r} in column {TEXT!r}")
        if marker in response:
            raise Unfit(f"have the response marker {marker!r} more than once in column {TEXT!r}")
        return RowSample(_asked(before, _not_blank(response)), (before + marker, response))

    return RowLayout((TEXT,), (), read)


@dataclasses.dataclass(frozen=True)
class Reading:
    """How rows are read.

    Attributes:
      template: In `TEMPLATES`; None: the layout whose columns are there.
      columns: `prompt=question,response=answer`: what a layout calls a column, and what the source
        does. None: the same.
      turns: In `TURNS`: which turns of a conversation are responses.
      response_marker: What stands before the response in the column `text`.
    """

    template: str | None = None
    columns: str | None = None
    turns: str = "last"
    response_marker: str | None = None

    def check(self, where: str = "") -> None:
        """Raises ValueError for an unknown name, or values that do not fit each other.

        Args:
          where: Before names in messages: `dataset.` for a configuration's.
        """
        for name in ("columns", "response_marker"):
            if not isinstance(value := getattr(self, name), str | None):
                raise expect.InputError(f"{where}{name}: expected text or None, got {value!r}.")
        if self.template is not None:
            expect.one_of(f"{where}template", self.template, TEMPLATES)
        expect.one_of(f"{where}turns", self.turns, TURNS)
        if self.response_marker == "" or (self.template == TEXT and not self.response_marker):
            raise expect.InputError(
                f"{where}response_marker: missing; template {TEXT!r} needs what stands before the "
                "response, such as '### Response:'."
            )
        if self.template == RELEASED and self.turns == "all":
            raise expect.InputError(
                f"{where}turns: the released code reads the first two turns; expected 'first' with "
                f"template {RELEASED!r}, got 'all'."
            )
        if self.response_marker is not None and self.template not in (None, TEXT, CHAT):
            raise expect.InputError(
                f"{where}response_marker: is of the column {TEXT!r}; expected None with template "
                f"{self.template!r}, got {self.response_marker!r}."
            )
        pairs = self._pairs
        if any(len(pair) != 2 or not all(pair) for pair in pairs) or any(
            len({*names}) < len(pairs) for names in zip(*pairs, strict=True)
        ):
            raise expect.InputError(
                f"{where}columns: expected different names, such as "
                f"'prompt=question,response=answer', got {self.columns!r}."
            )
        for name in self.own_names:
            expect.one_of(f"{where}columns: name", name, _COLUMNS)

    @property
    def _pairs(self) -> list[list[str]]:
        given = [] if self.columns is None else self.columns.split(",")
        return [pair.strip().split("=") for pair in given]

    @property
    def own_names(self) -> dict[str, str]:
        """What a layout calls a column -> what the source does."""
        return {name: own for name, own in self._pairs}

    def renamed(self, rows: Rows) -> Rows:
        """Returns the rows with the names of layouts; ValueError for a column that none has."""
        names = self.own_names
        for own in names.values():
            if not any(own in row for row in rows.rows):
                found = expect.listed(dict.fromkeys(c for row in rows.rows for c in row))
                raise expect.InputError(f"{rows.name}: no row has column {own!r}; found {found}.")
        for name in sorted({*names} & {*_CONTEXT} - {*names.values()}):
            rows.refuse(
                (not is_empty(row.get(name)) for row in rows.rows),
                f"have {name!r}, in the place of which {names[name]!r} is read; expected it empty",
            )
        away = {*names, *names.values()}

        def row_of(row: Row) -> Row:
            others = {name: value for name, value in row.items() if name not in away}
            return others | {name: row[own] for name, own in names.items() if own in row}

        if not names:
            return rows
        return Rows([*map(row_of, rows.rows)], f"{rows.name} (columns {self.columns})")

    def layout_of(self, rows: Rows) -> tuple[str, RowLayout]:
        """Returns the one layout whose columns the first row has; ValueError if it is not one."""
        if self.response_marker is not None:
            return TEXT, _marked_text(self.response_marker)
        if self.template not in (None, CHAT, RELEASED):
            return self.template, LAYOUTS[self.template]
        first = rows.rows[0]
        if self.template == CHAT and "messages" in first:
            return "messages", LAYOUTS["messages"]
        layouts = _RELEASED if self.template == RELEASED else LAYOUTS
        fitting = [name for name, kind in layouts.items() if all(c in first for c in kind.columns)]
        if len(fitting) == 1 or (fitting and self.template == RELEASED):
            return fitting[0], layouts[fitting[0]]
        known = "; ".join(f"{name}: {', '.join(kind.columns)}" for name, kind in layouts.items())
        texts = [name for name, value in first.items() if isinstance(value, str) and name != "id"]
        prompt, response = (*texts, "<column>", "<column>")[:2]
        which = "--config.dataset.template=<name>, which says which, "
        if self.template == RELEASED:
            prompt, response, which = "<column>", "<column>", ""
        raise expect.InputError(
            f"{rows.name}: columns {expect.listed(map(on_one_line, first))} fit "
            f"{' and '.join(fitting) or 'no template'}; expected those of one ({known}), "
            f"{which}or the columns by name, such as "
            f'--config.dataset.columns="prompt={prompt},response={response}".'
        )


def _with_tools(pair: tuple[RowSample, Row]) -> Conversation:
    """Returns the conversation with what else of the row its template takes."""
    sample, row = pair
    tools, options = row.get(_TOOLS), row.get(_OPTIONS)
    if isinstance(tools, str):
        with contextlib.suppress(ValueError, RecursionError):  # what is no JSON is refused below
            tools = json.loads(tools)
    if not is_empty(tools) and not (
        isinstance(tools, list) and all(isinstance(tool, Mapping) for tool in tools)
    ):
        raise Unfit(f"have no list of objects, or JSON of one, in column {_TOOLS!r}")
    if not isinstance(options, Mapping | None):
        raise Unfit(f"have no object in column {_OPTIONS!r}")
    if taken := {*(options or {})} & {*_RESERVED}:
        raise Unfit(
            f"have {expect.listed(sorted(taken))} in column {_OPTIONS!r}, not of a template"
        )
    # a table gives every row all options that one of them has
    given = {name: value for name, value in (options or {}).items() if value is not None}
    tools = None if is_empty(tools) else tools
    return dataclasses.replace(sample.conversation, tools=tools, options=given)


class ReadRows(NamedTuple):
    """Rows as a model reads them.

    Attributes:
      written: [n] prompts and responses.
      identities: [n] what says which sample each is, for ids that are hashes: not of a tokenizer.
      layout: Name of the layout.
    """

    written: list[Rendered]
    identities: tuple[str, ...]
    layout: str


def read_rows(rows: Rows, reading: Reading, tokenizer: Any) -> ReadRows:
    """Reads rows; conversations are written by the tokenizer's chat template.

    Args:
      rows: As the source has them.
      reading: How they are read, checked.
      tokenizer: See `render`; used if there is a conversation, or with template `chat`.
    Raises:
      ValueError: naming rows that do not fit; see `render`.
    """
    rows = reading.renamed(rows)
    name, layout = reading.layout_of(rows)
    samples = rows.each(rows.rows, layout.read)
    has_no_text = [sample.texts is None for sample in samples]
    as_chat = reading.template == CHAT or (layout.may_be_chat and all(has_no_text))
    used = {*layout.columns, *layout.optional, *((_TOOLS, _OPTIONS) if as_chat else ())}
    if unused := {*reading.own_names} - used - {"id"}:
        raise expect.InputError(
            f"{rows.name}: template {CHAT if as_chat else name!r} has no column "
            f"{expect.listed(sorted(unused))}; expected names of {expect.listed(sorted(used))}."
        )
    for column in sorted({name for row in rows.rows for name in row} - used):
        if column.lower() in _CONTEXT:
            rows.refuse(
                (not is_empty(row.get(column)) for row in rows.rows),
                f"have {column!r}, which template {CHAT if as_chat else name!r} does not use; "
                "expected it in 'messages' or the prompt, and the column left out or empty",
            )
    if not as_chat:
        rows.refuse(
            has_no_text,
            "have several turns, which only a chat template writes; expected "
            "--config.dataset.template=chat",
        )
        texts = [sample.texts for sample in samples if sample.texts is not None]
        identities = tuple(sample.identity for sample in samples)
        return ReadRows([Rendered(*pair) for pair in texts], identities, name)
    talks = rows.each(zip(samples, rows.rows, strict=True), _with_tools)
    identities = tuple(sample._replace(texts=None).identity for sample in samples)
    return ReadRows(render(talks, rows, tokenizer, reading.turns), identities, name)
