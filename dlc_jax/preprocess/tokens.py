"""Instructions as token ids, with the exact place where the response begins."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int32, Int64

from dlc_jax import expect
from dlc_jax.datasets.instructions import Instructions
from dlc_jax.types import Conventions


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenised:
    """Prompts and responses as the model reads them.

    Attributes:
      tokens: [n] arrays of ids: prompt, response, end of sequence; cut at `max_length`.
      num_prompt: [n] tokens that hold nothing of the response; the others are what it is judged by.
      truncated: [n] whether tokens were cut off.
      ids: [n] sample ids.
      skipped: Samples that were left out because the cut leaves nothing of their response, id: why.
      others: [n] places in `tokens` of what others say between two turns of the response; None:
        there are none.
    """

    tokens: tuple[Int32[np.ndarray, " _"], ...] = dataclasses.field(repr=False)
    num_prompt: Int32[np.ndarray, " n"] = dataclasses.field(repr=False)
    truncated: Bool[np.ndarray, " n"] = dataclasses.field(repr=False)
    ids: np.ndarray = dataclasses.field(repr=False)
    skipped: dict[str, str] = dataclasses.field(default_factory=dict)
    others: tuple[Int64[np.ndarray, " _"], ...] | None = dataclasses.field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def named(self) -> Iterator[tuple[str, Int32[np.ndarray, " _"]]]:
        """What messages call each sample, and its tokens."""
        return ((f"sample {name}", row) for name, row in zip(self.ids, self.tokens, strict=True))

    def cut(self, num_tokens: Int64[np.ndarray, " n"]) -> Tokenised:
        """Returns the samples with at most as many tokens each."""
        pairs = list(zip(self.tokens, num_tokens.tolist(), strict=True))
        return dataclasses.replace(
            self,
            tokens=tuple(row[:num] for row, num in pairs),
            truncated=self.truncated | np.array([len(row) > num for row, num in pairs]),
            others=None
            if self.others is None
            else tuple(
                places[places < num] for places, (_, num) in zip(self.others, pairs, strict=True)
            ),
        )

    @classmethod
    def joined(cls, parts: Sequence[Tokenised]) -> Tokenised:
        """Returns the samples of all parts, one part behind the other, none of several turns."""
        num_prompt, truncated, ids = (
            np.concatenate([getattr(part, name) for part in parts])
            for name in ("num_prompt", "truncated", "ids")
        )
        rows = tuple(row for part in parts for row in part.tokens)
        return cls(rows, num_prompt, truncated, ids)

    def counts(self, position: int | np.integer) -> Bool[np.ndarray, " _"]:
        """Returns which tokens of a sample are of its response."""
        counts = np.arange(len(self.tokens[position])) >= self.num_prompt[position]
        if self.others is not None:
            counts[self.others[position]] = False
        return counts

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 over all tokens, in order, and where responses begin."""
        digest = hashlib.sha256(self.num_prompt.tobytes())
        for row in self.tokens:
            digest.update(len(row).to_bytes(8, "little") + row.tobytes())
        for places in self.others or ():
            digest.update(len(places).to_bytes(8, "little") + places.tobytes())
        return digest.hexdigest()

    @property
    def num_response(self) -> Int64[np.ndarray, " n"]:
        """[n] tokens of the response, an end of the sequence included."""
        return np.array([self.counts(position).sum() for position in range(len(self))])


def tokenise(
    data: Instructions,
    tokenizer: Any,
    max_length: int | None,
    *,
    on_corrupt: str = "error",
    mode: str = "default",
) -> Tokenised:
    """Tokenises prompt and response together, once.

    A token that spans the boundary counts as the response's: without the response it would not be
    there. Where the tokenizer cannot tell which characters a token covers, the prompt's tokens are
    those that it shares with the prompt tokenised alone.

    Args:
      data: Prompts and responses.
      tokenizer: A tokenizer of transformers. What it puts in front (begin of sequence) stays,
        unless the prompt begins with one; its end of sequence follows the response, where it has
        one. Texts that hold their special tokens get neither.
      max_length: Longest sequence in tokens; the end of longer ones is cut off. None: any.
      on_corrupt: `error`, or `skip` to leave out samples of whose response nothing is left.
      mode: `default`, or `official` as the released code for instructions, of data read with the
        template `released`: the response begins behind as many tokens as the prompt has alone, no
        end of sequence is added, and nothing is cut: a longer sample is left out as the others.
    Raises:
      ValueError: such samples, by id, unless they are skipped; by id, a text that the tokenizer
        cannot read; in `official`, data of another template.
    Example:
      >>> model = dlc.load_language_model("demo:tiny-llama", dtype="float32")
      >>> data = dlc.load_instructions("demo:dolly/train").subset(np.arange(4))
      >>> tokens = dlc.tokenise(data, model.tokenizer, max_length=64)
      >>> model.tokenizer.decode(tokens.tokens[0][tokens.num_prompt[0] :])[:24]
      'Kangen water is alkaline'
    """
    limit = sys.maxsize if max_length is None else max_length
    expect.at_least("max_length", limit, 2)
    expect.one_of("on_corrupt", on_corrupt, ("error", "skip"))
    as_released = Conventions.of(mode, "instructions").reads_as_released
    if as_released and not data.as_released:
        raise expect.InputError(
            f"{data.name}: mode {mode!r} takes data of the template 'released', got layout "
            f"{data.layout!r} in another; expected load_instructions(..., 'released')."
        )
    rows, num_prompt, truncated, kept, others = [], [], [], [], []
    skipped: dict[str, str] = {}
    for position, (prompt, response) in enumerate(zip(data.prompts, data.responses, strict=True)):
        name = str(data.ids[position])
        with tokenising(f"{data.name}: sample {name}: the tokenizer cannot read it"):
            if as_released:
                found = _joint_as_released(prompt, response, tokenizer)
            else:
                spans = data.others[position] if data.others is not None else ()
                found = _joint(prompt, response, spans, tokenizer, data.has_special_tokens)
        if problem := found.problem(limit, is_cut=not as_released):
            skipped[name] = problem
            continue
        ids, num_before, places = found
        rows.append(np.array(ids[:limit], np.int32))
        num_prompt.append(num_before)
        truncated.append(len(ids) > limit)
        kept.append(position)
        others.append(places[places < limit])
    at = "" if max_length is None else f" at max_length {max_length}"
    if skipped and on_corrupt == "error":
        name, why = next(iter(skipped.items()))
        what = "do not fit" if as_released else "have no response left"
        larger = "" if max_length is None else "a larger one, or "
        raise expect.InputError(
            f"{data.name}: {len(skipped)} samples {what}{at}, such as {name}: {why}; expected "
            f"{larger}on_corrupt='skip'."
        )
    if not rows:
        raise expect.InputError(f"{data.name}: no sample is left{at}.")
    return Tokenised(
        tuple(rows),
        np.array(num_prompt, np.int32),
        np.array(truncated),
        data.ids[kept],
        skipped,
        None if data.others is None else tuple(others),
    )


@contextlib.contextmanager
def tokenising(failure: str) -> Iterator[None]:
    """Turns what a tokenizer raises into a ValueError that begins with this text."""
    try:
        yield
    except BaseException as error:
        # a panic of the tokenizer, which is written in Rust, is no Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise expect.InputError(f"{failure}: {expect.first_line(error)}") from error


def check_vocabulary(
    named: Iterable[tuple[str, Sequence[int] | np.ndarray]],
    vocab_size: int,
    text_of: Callable[[int], str | None],
) -> None:
    """Raises ValueError unless a model has an embedding of every token.

    Args:
      named: What messages call a row, and its ids.
      vocab_size: Rows of the embedding.
      text_of: Id -> the token it stands for, for the message.
    """
    for name, ids in named:
        row = np.asarray(ids)
        outside = row[(row < 0) | (row >= vocab_size)]
        if outside.size:
            token = int(outside[0])
            raise expect.InputError(
                f"{name}: token {token} ({text_of(token)!r}) has no row in the model's embedding, "
                f"expected ids of 0 to {vocab_size - 1}. Does the tokenizer belong to the model? "
                "After a token was added, the embedding has to be resized."
            )


class _Joint(NamedTuple):
    """Prompt and response together.

    Attributes:
      ids: One per token.
      num_prompt: How many, from the first on, hold nothing of the response.
      others: Places of those that hold nothing but what others say in the response.
    """

    ids: list[int]
    num_prompt: int
    others: Int64[np.ndarray, " _"]

    def problem(self, limit: int, *, is_cut: bool) -> str | None:
        """Returns why nothing of the response is left, or it does not fit; None: it does."""
        num, alone = len(self.ids), f"its prompt alone has {self.num_prompt} tokens"
        if self.num_prompt >= limit:
            return f"{alone}, of at most {limit}"
        if self.num_prompt >= num:
            return f"{alone}, of {num} in all"
        if num > limit and not is_cut:
            return f"it has {num} tokens, of at most {limit}, and is not cut"
        return None


def _joint(
    prompt: str,
    response: str,
    others: Sequence[tuple[int, int]],
    tokenizer: Any,
    has_special_tokens: bool,
) -> _Joint:
    """Reads both together; `others` are parts of the response, in characters."""
    (prompt + response).encode()  # half a surrogate pair is no text; tokenizers name no reason
    read = functools.partial(tokenizer, add_special_tokens=not has_special_tokens, verbose=False)
    places = np.empty(0, np.int64)
    if tokenizer.is_fast:
        found = read(prompt + response, return_offsets_mapping=True)
        ids, offsets = list(found["input_ids"]), found["offset_mapping"]
        # an end of sequence that the tokenizer put there covers no characters
        num_before = next((i for i, (_, e) in enumerate(offsets) if e > len(prompt)), len(ids))
        if others:
            starts, ends = np.array(offsets).T - len(prompt)
            of_others = [(starts >= start) & (ends <= end) for start, end in others]
            places = np.flatnonzero(np.logical_or.reduce(of_others))
    elif others:
        raise ValueError("it does not say which characters a token covers, as several turns need")
    else:
        ids, alone = list(read(prompt + response)["input_ids"]), read(prompt)["input_ids"]
        pairs = zip(alone, ids, strict=False)
        num_before = next((i for i, (a, b) in enumerate(pairs) if a != b), len(alone))
    begin, end = getattr(tokenizer, "bos_token_id", None), tokenizer.eos_token_id
    if has_special_tokens:
        return _Joint(ids, num_before, places)
    if begin is not None and ids[:2] == [begin, begin]:  # put before one that the text has
        ids, num_before, places = ids[1:], max(num_before - 1, 0), places - 1
    if end is not None and (not ids or ids[-1] != end):
        ids.append(end)
    return _Joint(ids, num_before, places)


def _joint_as_released(prompt: str, response: str, tokenizer: Any) -> _Joint:
    (prompt + response).encode()  # see `_joint`
    read = functools.partial(tokenizer, verbose=False)
    ids, alone = (list(read(text)["input_ids"]) for text in (prompt + response, prompt))
    return _Joint(ids, len(alone), np.empty(0, np.int64))
