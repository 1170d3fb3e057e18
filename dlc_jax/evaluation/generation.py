"""Greedy answers of a language model: after each token comes the likeliest one.

Prompts of similar length are read together, padded on the left to one of a few lengths; all rows
then go on token by token, a chunk at a time on the device. Between chunks the host looks for
strings that end an answer.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Int32
from tqdm import tqdm

from dlc_jax import expect, signals
from dlc_jax.distributed import fetch, hides_bar, on_every_device, over_devices, whole_rows
from dlc_jax.encoders.causal_model import CausalModel, RowsRead
from dlc_jax.encoders.language_model import LanguageModel, transformers_library
from dlc_jax.evaluation.likelihoods import longest_input
from dlc_jax.preprocess.token_batches import TOKENS_PER_BATCH, bucket_length
from dlc_jax.preprocess.tokens import tokenising
from dlc_jax.types import Params

_STEPS = 16  # tokens of a chunk: fewer wait for the host more often, more are computed in vain
_MOST_LENGTHS, _SHORTEST = 4, 32  # of prompts as they are padded, in tokens
# Settings of transformers' generation that would change greedy answers -> values that do not
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "assistant_early_exit": (),
    "bad_words_ids": ([],),
    "begin_suppress_tokens": ([],),
    "constraints": ([],),
    "dola_layers": (),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1,),
    "exponential_decay_length_penalty": (),
    "force_words_ids": ([],),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "guidance_scale": (1,),
    "max_time": (),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "no_repeat_ngram_size": (0,),
    "num_beams": (1,),
    "num_return_sequences": (1,),
    "penalty_alpha": (0,),
    "prompt_lookup_num_tokens": (),
    "sequence_bias": ([], {}),
    "stop_strings": ([],),
    "suppress_tokens": ([],),
    "token_healing": (False,),
    "use_mtp": (False,),
    "watermarking_config": (),
}


class Greedy(NamedTuple):
    """How a model answers.

    Attributes:
      ends: Tokens that end an answer.
      repetition_penalty: Logits of tokens that a row has are divided by it, or multiplied where
        they are negative; 1: they are as they are.
    """

    ends: tuple[int, ...]
    repetition_penalty: float = 1.0

    @classmethod
    def of(cls, model: LanguageModel, tokenizer: Any) -> Greedy:
        """Reads what `generate(do_sample=False)` of transformers reads beside a model.

        The tokenizer's end of sequence ends answers too.

        Raises:
          ValueError: a setting that changes greedy answers, and is not known here.
        """
        settings = generation_settings(model)
        where = f"{model.folder}: generation_config.json"
        check_is_greedy(where, settings)
        found = settings.get("eos_token_id", ())
        some = [found] if isinstance(found, int) else found
        if not isinstance(some, list | tuple) or not all(isinstance(end, int) for end in some):
            raise expect.InputError(f"{where}: eos_token_id {found!r}, expected ids.")
        ends = set(some)
        if tokenizer.eos_token_id is not None:
            ends.add(tokenizer.eos_token_id)
        penalty = settings.get("repetition_penalty", 1.0)
        expect.at_least(f"{where}: repetition_penalty", penalty, 0, exclusive=True)
        return cls(tuple(sorted(ends)), float(penalty))


def generation_settings(model: LanguageModel) -> dict[str, Any]:
    """Returns the settings of `generation_config.json`, or `config.json` if there is none."""
    config_class = transformers_library().GenerationConfig
    with expect.refusing(f"{model.folder}: generation_config.json", Exception):
        try:
            config = config_class.from_pretrained(model.folder)
        except OSError:
            config = config_class.from_pretrained(
                model.folder, config_file_name="config.json", _from_model_config=True
            )
    return {name: value for name, value in config.to_dict().items() if value is not None}


def check_is_greedy(where: str, settings: Mapping[str, Any]) -> None:
    """Raises ValueError for a setting that makes greedy answers of transformers others than ours.

    Args:
      where: Where they are from, for messages.
      settings: By the names that transformers has for them.
    """
    for name, neutral in NEUTRAL.items():
        value = settings.get(name)
        if value is not None and value not in neutral:
            expected = " or ".join(map(repr, (*neutral, None)))
            raise expect.InputError(
                f"{where}: {name} {value!r} changes greedy answers, which is not supported; "
                f"expected {expected}."
            )


def generate(
    model: LanguageModel,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 256,
    stop: Sequence[str] = (),
    max_length: int | None = None,
    tokens_per_batch: int = TOKENS_PER_BATCH,
    progress: bool = False,
) -> tuple[str, ...]:
    """Answers prompts, each with the likeliest token after the other.

    As transformers' `generate(do_sample=False)` does: an answer ends with an end of sequence of
    `generation_config.json`, whose `repetition_penalty` counts too, or of the tokenizer. A prompt
    is read as it is; `model.tokenizer.apply_chat_template` writes that of a conversation.

    Args:
      model: From `load_language_model`, `load_adapter` or `finetune_lora`.
      prompts: Texts; the tokenizer decides which special tokens they get. One that begins with a
        begin of sequence gets no second one.
      max_new_tokens: Most tokens of an answer.
      stop: Texts that end an answer, of which they are no part.
      max_length: Most tokens of prompt and answer together; None: the model's limit.
      tokens_per_batch: Prompts times padded length, answers included, of a program call; changes
        speed and memory. In half precision the likeliest token can be another one where two are
        nearly as likely, since sums are rounded otherwise.
      progress: Whether to show a bar.
    Returns:
      The answers, without special tokens.
    Raises:
      ValueError: a prompt without a token, with tokens out of the vocabulary or too long for
        `max_length`, by its number; an empty `stop`; settings of `generation_config.json` that
        change greedy answers and are not known here.
    Example:
      >>> model = dlc.load_language_model("demo:tiny-llama", dtype="float32")
      >>> answers = dlc.generate(model, ["Name a fruit."], max_new_tokens=8, stop=["\\n"])
      >>> len(answers), "\\n" in answers[0]
      (1, False)
    """
    for name, texts in (("prompts", prompts), ("stop", stop)):
        if isinstance(texts, str) or not isinstance(texts, Sequence):
            raise expect.InputError(f"{name}: got {texts!r}, expected a list of texts.")
    if "" in stop:
        raise expect.InputError("stop: got an empty text, expected texts that can be found.")
    expect.integer("max_new_tokens", max_new_tokens, 1)
    expect.at_least("tokens_per_batch", tokens_per_batch, 1)
    limit = longest_input(model, max_length)
    expect.at_least("max_length, for a prompt and an answer", limit, 2)
    expect.at_most(f"max_new_tokens, of max_length {limit}", max_new_tokens, limit - 1)
    rows = [_encoded(model.tokenizer, *prompt) for prompt in enumerate(prompts)]
    for number, row in enumerate(rows):
        if (room := limit - max_new_tokens) < len(row):
            raise expect.InputError(
                f"prompt {number}: has {len(row)} tokens, {len(row) - room} too many; expected at "
                f"most {room}, which are max_length {limit} less max_new_tokens {max_new_tokens}."
            )
    check_prompts(model, rows)
    ending = Ending(model.tokenizer, Greedy.of(model, model.tokenizer), stop)
    found = answers(
        model,
        rows,
        ending,
        max_new_tokens=max_new_tokens,
        longest=limit - max_new_tokens,
        tokens_per_batch=tokens_per_batch,
        progress=progress,
    )
    return tuple(found)


def _encoded(tokenizer: Any, number: int, prompt: str) -> list[int]:
    with tokenising(f"prompt {number}: the tokenizer cannot read it"):
        prompt.encode()  # half a surrogate pair is no text; tokenizers name no reason
        ids = list(tokenizer(prompt, verbose=False)["input_ids"])
    begin = getattr(tokenizer, "bos_token_id", None)
    return ids[1:] if begin is not None and ids[:2] == [begin, begin] else ids


def check_prompts(model: LanguageModel, prompts: Sequence[Sequence[int]]) -> None:
    """Raises ValueError for a prompt without a token, or with one that has no embedding."""
    for number, row in enumerate(prompts):
        if not row:
            raise expect.InputError(f"prompt {number}: has no token, expected at least one.")
    model.check_tokens((f"prompt {number}", row) for number, row in enumerate(prompts))


class Ending:
    """Where answers end, and their text up to there; strings as lm_eval's `hf` model finds them.

    Args:
      tokenizer: The model's.
      greedy: Its tokens end an answer, which they are part of.
      strings: So does the token with which one of them is complete among the last tokens: as many
        as the tokenizer makes of it, and two. What is before it in the whole answer is its text.
    """

    def __init__(self, tokenizer: Any, greedy: Greedy, strings: Sequence[str]):
        self.tokenizer, self.greedy, self.strings = tokenizer, greedy, strings
        self.by_num_tokens: dict[int, list[str]] = {}
        for string in strings:
            num = len(tokenizer.encode(string, add_special_tokens=False)) + 2
            self.by_num_tokens.setdefault(num, []).append(string)

    def is_reached(self, answer: Sequence[int]) -> bool:
        """Whether an answer ends with its last token."""
        if answer[-1] in self.greedy.ends:
            return True
        return any(
            string in text
            for num, strings in self.by_num_tokens.items()
            for text in [self.tokenizer.decode(answer[-num:])]
            for string in strings
        )

    def text_of(self, answer: Sequence[int]) -> str:
        """Returns the text before all strings, without special tokens."""
        text = self.tokenizer.decode(answer, skip_special_tokens=True)
        for string in filter(None, self.strings):
            text = text.split(string)[0]
        return text


def answers(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    ending: Ending,
    *,
    max_new_tokens: int,
    longest: int,
    tokens_per_batch: int,
    progress: bool,
) -> list[str]:
    """Answers prompts of ids that `check_prompts` has seen, in their order.

    Args:
      model, ending: What answers, and where that ends.
      prompts: Ids of each.
      max_new_tokens: Most tokens of an answer.
      longest: No prompt has more tokens.
      tokens_per_batch, progress: See `generate`.
    """
    found = [""] * len(prompts)
    with tqdm(
        total=len(prompts), desc="answers", unit="prompt", disable=hides_bar(progress)
    ) as bar:
        lengths = list(map(len, prompts))
        for batch in _batches(lengths, longest, max_new_tokens, tokens_per_batch):
            rows = [prompts[position] for position in batch.positions]
            num_rows = whole_rows(model.params, batch.num_rows)
            tokens, segments = _padded_left(rows, num_rows, batch.length)
            answered = _answered(model, tokens, segments, len(rows), ending, max_new_tokens)
            for position, answer in zip(batch.positions, answered, strict=True):
                found[position] = ending.text_of(answer)
            bar.update(len(rows))
    return found


class _Batch(NamedTuple):
    """Prompts that are answered together.

    Attributes:
      positions: Which ones.
      num_rows: At least as many.
      length: What they are padded to, in tokens.
    """

    positions: list[int]
    num_rows: int
    length: int


def _batches(
    lengths: Sequence[int], longest: int, max_new_tokens: int, tokens_per_batch: int
) -> Iterator[_Batch]:
    """Yields batches of prompts, the longest first.

    Each length is a program to compile, so that there are four at most, each half the next. A batch
    of few rows takes as long as one of many: it is filled up with shorter prompts.
    """
    if not lengths:
        return
    most = bucket_length(max(lengths), longest)
    rooms = sorted({min(most, max(most >> i, _SHORTEST)) for i in range(_MOST_LENGTHS)})
    rows_of: dict[int, int] = {}
    order = sorted(range(len(lengths)), key=lambda position: -lengths[position])
    while order:
        room = next(room for room in rooms if room >= lengths[order[0]])
        most_rows = max(1, tokens_per_batch // (room + max_new_tokens))
        enough = 1 << (len(order) - 1).bit_length()  # a few shapes, whatever the number
        num_rows = rows_of.setdefault(room, min(most_rows, enough))
        yield _Batch(order[:num_rows], num_rows, room)
        order = order[num_rows:]


def _padded_left(
    rows: Sequence[Sequence[int]], num_rows: int, length: int
) -> tuple[Int32[np.ndarray, "b t"], Int32[np.ndarray, "b t"]]:
    """Returns ids, and 1 where there are some; rows that are missing are as the first one."""
    tokens, segments = np.zeros((2, num_rows, length), np.int32)
    for number in range(num_rows):
        row = rows[number if number < len(rows) else 0]
        tokens[number, length - len(row) :], segments[number, length - len(row) :] = row, 1
    return tokens, segments


class _State(NamedTuple):
    """A batch of rows between two tokens.

    Attributes:
      tokens: The last one of each row, which is not read yet.
      reading: What was read.
      seen: Tokens that each row has; no columns where they do not matter.
    """

    tokens: Int32[Array, " b"]
    reading: RowsRead
    seen: Bool[Array, "b v"]


def _answered(
    model: LanguageModel,
    tokens: Int32[np.ndarray, "b t"],
    segments: Int32[np.ndarray, "b t"],
    num: int,
    ending: Ending,
    max_new_tokens: int,
) -> list[list[int]]:
    """Returns the answers to the first rows of a batch, with the token or string that ends them."""
    run = (model.architecture, ending.greedy.repetition_penalty)
    params = model.params
    ends = on_every_device(params, jnp.asarray(ending.greedy.ends, jnp.int32))
    found: list[list[int]] = [[] for _ in range(num)]
    is_done = np.arange(len(tokens)) >= num
    signals.poll()
    placed = over_devices(params, (tokens, segments))
    state = _begun(*run, max_new_tokens - 1, params, *placed)
    new, num_tokens = fetch(state.tokens)[:, None], 1
    while True:
        for number in np.flatnonzero(~is_done):
            for token in new[number].tolist():
                found[number].append(token)
                if ending.is_reached(found[number]):
                    is_done[number] = True
                    break
        if is_done.all() or num_tokens == max_new_tokens:
            return found
        signals.poll()
        num_steps = min(_STEPS, max_new_tokens - num_tokens)
        steps = on_every_device(params, jnp.asarray(num_steps, jnp.int32))
        state, chunk = _continued(*run, params, state, over_devices(params, is_done), ends, steps)
        new, num_tokens = fetch(chunk)[:, :num_steps], num_tokens + num_steps


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _begun(
    architecture: CausalModel,
    penalty: float,
    num_more: int,
    params: Params,
    tokens: Int[Array, "b t"],
    segments: Int[Array, "b t"],
) -> _State:
    """Reads prompts; returns them with the first token of each answer."""
    last, reading = architecture.read(params, tokens, segments, num_more)
    logits = architecture.logits(params, last)
    num_rows = len(tokens)
    seen = jnp.zeros((num_rows, 0 if penalty == 1 else logits.shape[-1]), bool)
    if penalty != 1:
        seen = seen.at[jnp.arange(num_rows)[:, None], tokens].max(segments > 0)
    return _with_likeliest(logits, reading, seen, penalty)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def _continued(
    architecture: CausalModel,
    penalty: float,
    params: Params,
    state: _State,
    is_done: Bool[Array, " b"],
    ends: Int[Array, " e"],
    num_steps: Int[Array, ""],
) -> tuple[_State, Int[Array, "b s"]]:
    """Goes on by some tokens, or until all rows have ended; returns these tokens too."""

    def goes_on(carry: tuple[Array, _State, Array, Array]) -> Array:
        step, _, is_done, _ = carry
        return (step < num_steps) & ~is_done.all()

    def after(carry: tuple[Array, _State, Array, Array]) -> tuple[Array, _State, Array, Array]:
        step, state, is_done, found = carry
        last, reading = architecture.read_next(params, state.tokens, state.reading)
        logits = architecture.logits(params, last)
        state = _with_likeliest(logits, reading, state.seen, penalty)
        is_done = is_done | jnp.isin(state.tokens, ends)
        return step + 1, state, is_done, found.at[:, step].set(state.tokens)

    found = jnp.zeros((len(is_done), _STEPS), jnp.int32)
    carry = (jnp.asarray(0, jnp.int32), state, is_done, found)
    _, state, _, found = jax.lax.while_loop(goes_on, after, carry)
    return state, found


def _with_likeliest(
    logits: Float[Array, "b v"], reading: RowsRead, seen: Bool[Array, "b w"], penalty: float
) -> _State:
    """Returns rows with the likeliest token of each."""
    logits = logits.astype(jnp.float32)
    if penalty != 1:
        logits = jnp.where(seen, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)
    tokens = logits.argmax(axis=-1).astype(jnp.int32)
    if penalty != 1:
        seen = seen.at[jnp.arange(len(tokens)), tokens].set(True)
    return _State(tokens, reading, seen)
