"""Conversations written out by a tokenizer's own chat template, and where the responses are.

A template is a program of its own, and may write a turn in another way once a later one follows.
So a response is looked for by comparing two texts: of the conversation up to it, and of all of it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import re
import resource
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np

from dlc_jax import expect
from dlc_jax.datasets.rows import Rows, Unfit, is_empty

TURNS = ("last", "first", "all")
Messages = list[dict[str, Any]]
Span = tuple[int, int]  # characters, the end not included


@dataclasses.dataclass(frozen=True)
class Conversation:
    """Messages, and what else of a row a chat template is given.

    Attributes:
      messages: Each with a `role`, and a `content` of text unless it calls tools.
      completion: Position of the first message of the row's own completion; None: it has none.
      silent: Positions of messages that are not trained on: their `weight` is 0.
      tools: As the template takes them; None: none.
      options: Further arguments of the template, such as `enable_thinking`.
    """

    messages: Messages
    completion: int | None = None
    silent: frozenset[int] = frozenset()
    tools: Any = None
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def answers(self) -> list[int]:
        """Positions of the assistant's messages that may be trained on, ascending."""
        start = self.completion or 0
        numbers = range(start, len(self.messages))
        return [
            i for i in numbers if self.messages[i]["role"] == "assistant" and i not in self.silent
        ]

    def as_row(self, *, with_completion: bool) -> dict[str, Any]:
        """Returns it with the columns that trainers read, as in TRL.

        Args:
          with_completion: Whether the completion has a column of its own.
        """
        messages = [
            {**message, "weight": 0} if i in self.silent else message
            for i, message in enumerate(self.messages)
        ]
        others = {"tools": self.tools, "chat_template_kwargs": dict(self.options)}
        if not with_completion:
            return {"messages": messages, **others}
        start = self.completion
        return {"prompt": messages[:start], "completion": messages[start:], **others}

    def upto(self, end: int) -> Conversation:
        """Returns the first `end` messages."""
        silent = frozenset(i for i in self.silent if i < end)
        return dataclasses.replace(self, messages=self.messages[:end], silent=silent)

    def of_turns(self, turns: str) -> tuple[Conversation, list[Span]]:
        """Returns the messages up to the last response, and which of them each response is.

        What follows the last response does not change how well a causal model predicts it.

        Args:
          turns: `last`: the last answer, or all of a completion; `first`; or `all` answers.
        Raises:
          Unfit: there is no answer.
        """
        answers = self.answers
        if not answers:
            raise Unfit("have no turn of the assistant, or none but of weight 0")
        start, end = self.completion, len(self.messages)
        if turns == "last" and start is not None and self.silent.isdisjoint(range(start, end)):
            return self, [(start, end)]
        chosen = {"last": answers[-1:], "first": answers[:1], "all": answers}[turns]
        return self.upto(chosen[-1] + 1), [(i, i + 1) for i in chosen]


class Rendered(NamedTuple):
    """A conversation in text.

    Attributes:
      prompt: All before the first response, and how a response is begun.
      response: From there to the end of the last response, and what the template puts behind it.
      others: Parts of `response` that are not the assistant's, between two of its turns.
      conversation: Messages up to the last response; None: the text is of no chat template.
    """

    prompt: str
    response: str
    others: tuple[Span, ...] = ()
    conversation: Conversation | None = None


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


_LONGEST_TEMPLATE = 2**20  # characters that are not of the conversation
# Fields of a message besides role and content that a template may know or not.
_FIELDS = (
    *("tool_calls", "function_call", "tools", "documents"),
    *("images", "videos", "audio", "audios"),
)
_THOUGHTS = ("reasoning_content", "reasoning", "thinking")  # templates leave out earlier ones
_MARKS = re.compile(r"\{%-?\s*generation\b")


def written(tokenizer: Any, messages: Messages, **options: Any) -> str:
    """Returns what a tokenizer's chat template makes of a conversation.

    Raises:
      ValueError: it is far longer than the conversation.
      Exception: any that the template raises, or its limits; see `limited`.
    """
    with limited():
        text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    size = sum(len(str(part)) for part in (*messages, *options.values()))
    if len(text) > _LONGEST_TEMPLATE + 10 * size:
        raise ValueError(f"it makes {len(text)} characters of {size}")
    return text


def render(
    conversations: Sequence[Conversation], rows: Rows, tokenizer: Any, turns: str = "last"
) -> list[Rendered]:
    """Writes conversations out; prompt and response together are what the template gives.

    The end of the turn belongs to the response, and so does what the template puts behind the last
    one, such as Gemma's line break: the tokens are then those of `apply_chat_template`, which other
    programs train on. Where a template begins a response otherwise than it writes one, as those
    that open a block of thoughts, the response begins with the first token that differs.

    Args:
      conversations: One per row, each with a response.
      rows: Rows that hold them, for messages.
      tokenizer: A tokenizer of transformers, or a function that returns one; None: there is none.
      turns: See `Conversation.of_turns`. For `all`, the template's own `{% generation %}` marks say
        what is of a response, where it has some.
    Returns:
      [n]; the texts hold their special tokens.
    Raises:
      ValueError: no tokenizer, one without a chat template; by row, conversations that it refuses,
        that it writes otherwise once more follows, or of which it leaves out a field, the tools or
        a part of a response.
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

    def write(named: tuple[str, Conversation]) -> Rendered:
        place, conversation = named
        problem = f"{rows.name}: {place}: the tokenizer's chat template refuses it"
        cut, parts = conversation.of_turns(turns)
        return _Writer(tokenizer, cut, problem).written(parts, by_turn=turns == "all")

    return rows.each(zip(rows.places, conversations, strict=True), write)


@dataclasses.dataclass(frozen=True)
class _Writer:
    """One conversation, and the template that writes it; `problem` begins its errors."""

    tokenizer: Any
    conversation: Conversation
    problem: str

    def written(self, parts: Sequence[Span], *, by_turn: bool) -> Rendered:
        """Returns the text with these messages as responses; `Unfit` where it cannot tell them."""
        whole = self._text()
        self._check_is_used(whole, parts)
        if by_turn and _MARKS.search(str(self.tokenizer.chat_template)):
            spans = self._marked(parts)
            if (first := self.conversation.completion) is not None:  # marks may begin before it
                begin, _ = self._span(whole, first, len(self.conversation.messages))
                spans = [(max(start, begin), end) for start, end in spans]
        else:
            spans = [self._span(whole, *part) for part in parts]
        texts = [whole[start:end] for start, end in spans]
        if len(texts) != len(parts):  # marks that are several of a turn, or one of several
            texts = ["".join(texts)] * len(parts)
        if not all(
            text and self._holds(text, *part) for text, part in zip(texts, parts, strict=True)
        ):
            raise Unfit(
                "have a response of which the tokenizer's chat template leaves out a part, such as "
                "its thoughts; expected one that writes all of it"
            )
        begin, (*starts, end) = spans[0][0], [*(start for start, _ in spans[1:]), len(whole)]
        between = zip((end for _, end in spans), [*starts, end], strict=True)
        others = tuple((a - begin, b - begin) for a, b in between if a < b)
        return Rendered(whole[:begin], whole[begin:], others, self.conversation)

    def _text(self, end: int | None = None, **options: Any) -> str:
        """Returns the first `end` messages in text; none are nothing."""
        talk = self.conversation if end is None else self.conversation.upto(end)
        if not talk.messages:
            return ""
        # the template is a program of its own: anything can happen
        with expect.refusing(self.problem, Exception, shown=expect.first_line):
            options = {"tools": talk.tools, **talk.options, **options}
            return written(self.tokenizer, talk.messages, **options)

    def _gives(self, text: str, talk: Conversation) -> bool:
        """Whether another conversation has the same text; one that is refused has not."""
        try:
            return dataclasses.replace(self, conversation=talk)._text() == text
        except expect.InputError:
            return False

    def _span(self, whole: str, start: int, end: int) -> Span:
        """Returns where the messages start .. end - 1 are in the text, how they begin left out."""
        if not start:
            raise Unfit("begin with a response; expected what it answers before it")
        upto = whole if end == len(self.conversation.messages) else self._text(end)
        asked = self._text(start, add_generation_prompt=True)
        if whole.startswith(asked):
            begin = len(asked)
        elif whole.startswith(self._text(start)):
            begin = self._first_difference(asked, whole)
        else:
            raise Unfit(f"{_OTHERWISE} once the response is there, {_CANNOT}")
        # some end the last turn with more
        stop = len(upto) if whole.startswith(upto) else self._first_difference(upto, whole)
        if stop < len(upto) and not self._holds(whole[begin:stop], start, end):
            raise Unfit(
                f"{_OTHERWISE} once another turn follows, {_CANNOT}; expected dataset.turns last "
                "or first, or a template with {% generation %} marks"
            )
        return begin, stop

    def _holds(self, text: str, start: int, end: int) -> bool:
        """Whether these messages are in the text, blanks aside, which templates trim."""
        said = (message.get("content", "") for message in self.conversation.messages[start:end])
        bare = _bare(text)
        return all(_bare(part) in bare for part in said)

    def _first_difference(self, other: str, whole: str) -> int:
        """Returns where the first token of `whole` begins that the other text does not share."""
        if not self.tokenizer.is_fast:
            return _num_shared(other, whole)
        read = functools.partial(self.tokenizer, add_special_tokens=False, verbose=False)
        found = read(whole, return_offsets_mapping=True)
        ids, offsets = found["input_ids"], found["offset_mapping"]
        shared = _num_shared(read(other)["input_ids"], ids)
        return offsets[shared][0] if shared < len(ids) else len(whole)

    def _marked(self, parts: Sequence[Span]) -> list[Span]:
        """Returns what the template marks as these messages."""
        talk = self.conversation
        with expect.refusing(self.problem, Exception, shown=expect.first_line), limited():
            found = self.tokenizer.apply_chat_template(
                talk.messages,
                tools=talk.tools,
                return_dict=True,
                return_assistant_tokens_mask=True,
                tokenizer_kwargs={"return_offsets_mapping": True},
                **talk.options,
            )
        steps = np.diff([0, *found["assistant_masks"], 0])
        runs = zip(np.flatnonzero(steps > 0), np.flatnonzero(steps < 0), strict=True)
        offsets = found["offset_mapping"]
        spans = [(offsets[first][0], offsets[end - 1][1]) for first, end in runs]
        answers = [i for i, m in enumerate(talk.messages) if m["role"] == "assistant"]
        if spans and len(parts) == len(answers):  # all of them, however they are marked
            return spans
        if len(spans) != len(answers):
            raise Unfit(
                f"have {len(answers)} turns of the assistant, where the marks of the tokenizer's "
                f"chat template are {len(spans)}, {_CANNOT}"
            )
        return [spans[answers.index(start)] for start, _ in parts]

    def _check_is_used(self, whole: str, parts: Sequence[Span]) -> None:
        """Raises `Unfit` for a field of the messages, or tools, that the text does not need."""
        talk = self.conversation
        learnt = {i for start, end in parts for i in range(start, end)}
        bare = _bare(whole)
        for message in talk.messages:
            # of thoughts in earlier turns, which templates leave out, what follows counts
            said = message.get("content", "").rpartition("</think>")[2]
            quoted = json.dumps(said, ensure_ascii=False)[1:-1]  # as some write what tools return
            if not any(_bare(text) in bare for text in (said, quoted)):
                raise Unfit(
                    f"have a message of {message['role']!r} of which the tokenizer's chat template "
                    "leaves out a part; expected a template that writes all of it"
                )
        for field in (*_FIELDS, *_THOUGHTS):
            numbers = learnt if field in _THOUGHTS else range(len(talk.messages))
            if any(not is_empty(talk.messages[i].get(field)) for i in numbers):
                without = [{k: v for k, v in m.items() if k != field} for m in talk.messages]
                if self._gives(whole, dataclasses.replace(talk, messages=without)):
                    raise Unfit(f"have messages with {field!r}, {_UNUSED}, or messages without it")
        if talk.tools and self._gives(whole, dataclasses.replace(talk, tools=None)):
            raise Unfit(f"have 'tools', {_UNUSED}, or no tools")


_OTHERWISE = "are written otherwise by the tokenizer's chat template"
_CANNOT = "so that prompt and response cannot be told apart"
_UNUSED = "which the tokenizer's chat template leaves out; expected one that uses it"


def _bare(text: str) -> str:
    return "".join(text.split())


def _num_shared(a: Sequence[Any], b: Sequence[Any]) -> int:
    """Returns how many of the first entries are the same in both."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))
