"""The model class `dlc_jax` of lm_eval: log-likelihoods and greedy answers by a decoder in JAX.

Importing this module registers the class. It needs the extra `eval`.
"""

from __future__ import annotations

import itertools
import json
import logging
from typing import Any

from dlc_jax import expect
from dlc_jax.datasets.chat import written
from dlc_jax.encoders.language_model import LanguageModel, load_language_model, transformers_library
from dlc_jax.evaluation.generation import (
    NEUTRAL,
    Ending,
    Greedy,
    answers,
    check_is_greedy,
    check_prompts,
    generation_settings,
)
from dlc_jax.evaluation.likelihoods import continuation_log_likelihoods, longest_input
from dlc_jax.preprocess.token_batches import TOKENS_PER_BATCH
from dlc_jax.preprocess.tokens import tokenising

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise ImportError(
        f"lm_eval cannot be imported ({expect.first_line(error)}). It comes with the extra `eval`: "
        "pip install 'dlc_jax[eval]'."
    ) from error

_log = logging.getLogger(__name__)
# Settings of a task that greedy answers do not depend on; of others check_is_greedy decides
_WITHOUT_EFFECT = (
    *("temperature", "top_k", "top_p", "min_p", "typical_p", "top_h"),
    *("use_cache", "pad_token_id"),
)


@register_model("dlc_jax")
class JaxLM(TemplateLM):
    """A language model, as lm_eval asks it.

    It gives log-likelihoods, those of multiple choice included, and greedy answers; requests that
    sample are refused. Where the begin of sequence goes and where an answer ends is decided as for
    `--model hf` with batches of one; in half precision, rounding may choose between two tokens that
    are as likely.
    """

    max_gen_toks = 256  # most tokens of an answer where a task does not say

    def __init__(
        self,
        pretrained: str | LanguageModel,
        dtype: str | None = None,
        peft: str | None = None,
        max_length: int | None = None,
        add_bos_token: bool | None = None,
        tokens_per_batch: int = TOKENS_PER_BATCH,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
        converted: bool = False,
    ) -> None:
        """Loads the model.

        Args:
          pretrained: Folder in Hugging Face format, hub id, or what `load_language_model` gives.
          dtype: `bfloat16` (if None), `float16` or `float32`; of a loaded model, its own.
          peft: Folder of an adapter in PEFT's format, which is applied to the model.
          max_length: Most tokens read at once; None: the model's limit.
          add_bos_token: Whether texts get a begin of sequence; None: the tokenizer decides.
          tokens_per_batch: Inputs times padded length of a program call.
          batch_size, max_batch_size: Not used: `tokens_per_batch` bounds the memory taken.
          device: Not used: JAX runs where JAX_PLATFORMS says; lm_eval's command gives its own
            default, `cuda:0`, on every machine.
          converted: As for `load_language_model`.
        Raises:
          ValueError: see `load_language_model`; a value out of range.
        """
        super().__init__()
        expect.at_least("tokens_per_batch", tokens_per_batch, 1)
        if not isinstance(pretrained, LanguageModel):
            model = load_language_model(pretrained, dtype=dtype or "bfloat16", converted=converted)
            _log.info("model: %s", model.door)
        elif dtype is None:
            model = pretrained
        else:
            raise expect.InputError(
                f"dtype: got {dtype!r} for a loaded model, which has one: "
                f"{pretrained.architecture.dtype}."
            )
        if peft is not None:
            from dlc_jax.exports.peft import load_adapter

            model = load_adapter(model, peft)
        self.model = model
        self.tokenizer = model.tokenizer
        if add_bos_token is not None:  # some tokenizers have to be told when they are made
            self.tokenizer = transformers_library().AutoTokenizer.from_pretrained(
                model.folder, add_bos_token=add_bos_token, trust_remote_code=False
            )
        self.max_length = longest_input(model, max_length)
        self.add_bos_token = add_bos_token
        self.tokens_per_batch = tokens_per_batch

    @property
    def eot_token_id(self) -> int:
        """The tokenizer's end of sequence."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What an empty context is replaced by: begin of sequence, or its end if there is none."""
        begin = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else begin

    @property
    def tokenizer_name(self) -> str:
        """The name by which lm_eval keeps caches of requests apart."""
        return self.tokenizer.name_or_path.replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Returns ids; a text that begins with the begin of sequence gets no second one."""
        special = self.add_bos_token if add_special_tokens is None else add_special_tokens
        begin = self.tokenizer.decode(self.prefix_token_id)
        if add_special_tokens is None and string.startswith(begin):
            special = False
        return self._ids(string, special)

    def _ids(self, string: str, special: bool | None) -> list[int]:
        """Returns ids, with special tokens or without; None: as the tokenizer decides."""
        options = {} if special is None else {"add_special_tokens": special}
        with tokenising(f"{string[-60:]!r}: the tokenizer cannot read it"):
            return self.tokenizer.encode(string, verbose=False, **options)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Returns the text of a conversation, by the tokenizer's template."""
        return written(
            self.tokenizer,
            chat_history,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs
    ) -> list[tuple[float, bool]]:
        found = continuation_log_likelihoods(
            self.model,
            [(context, continuation) for _, context, continuation in requests],
            max_length=self.max_length,
            tokens_per_batch=self.tokens_per_batch,
            progress=not disable_tqdm,
        )
        if num_cut := int((found.num_cut > 0).sum()):
            _log.warning(
                "%d of %d requests are longer than %d tokens and were cut from the left.",
                num_cut,
                len(requests),
                self.max_length,
            )
        answers = list(zip(found.sums.tolist(), found.is_greedy.tolist(), strict=True))
        for (text, *_), answer in zip(requests, answers, strict=True):
            if text is not None:  # the parts of a rolling request have none
                self.cache_hook.add_partial("loglikelihood", text, answer)
        return answers

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Returns each whole text's log-likelihood in nats; long ones are judged by windows."""
        parts_of = []
        for request in requests:
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            parts_of.append([(None, *make_disjoint_window(window)) for window in windows])
        parts = list(itertools.chain.from_iterable(parts_of))
        answers = iter(self._loglikelihood_tokens(parts, disable_tqdm=disable_tqdm))
        totals = []
        for request, own in zip(requests, parts_of, strict=True):
            totals.append(sum(next(answers)[0] for _ in own))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, totals[-1])
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Returns greedy answers, which end before a task's stop strings or an end of sequence.

        Contexts are cut from the left, so that `max_gen_toks` have room behind them.

        Raises:
          ValueError: a task that samples or has another setting that is not supported, by name;
            a context without a token.
        """
        greedy = Greedy.of(self.model, self.tokenizer)
        if most := generation_settings(self.model).get("max_new_tokens"):
            _log.warning(
                "generation_config.json has max_new_tokens %s, which --model hf takes instead of "
                "a task's max_gen_toks; it is not used here.",
                most,
            )
        groups: dict[str, list[int]] = {}
        for position, request in enumerate(requests):
            key = json.dumps(request.args[1], sort_keys=True, default=repr)
            groups.setdefault(key, []).append(position)
        # what is wrong with any of them is said before the first is answered
        asked = [
            (positions, self._asked([requests[position] for position in positions], greedy))
            for positions in groups.values()
        ]
        found = [""] * len(requests)
        for positions, (rows, how) in asked:
            own = answers(
                self.model,
                rows,
                **how,
                tokens_per_batch=self.tokens_per_batch,
                progress=not disable_tqdm,
            )
            for position, answer in zip(positions, own, strict=True):
                found[position] = answer
                self.cache_hook.add_partial("generate_until", requests[position].args, answer)
        return found

    def _asked(self, requests: list[Any], greedy: Greedy) -> tuple[list[list[int]], dict[str, Any]]:
        """Returns contexts of requests of the same settings, and what `answers` takes besides."""
        where = f"{requests[0].task_name}: generation_kwargs"
        until, most, penalty = self._settings(where, requests[0].args[1])
        if penalty is not None:
            greedy = greedy._replace(repetition_penalty=penalty)
        room = self.max_length - most
        if room < 1:
            raise expect.InputError(
                f"{where}: max_gen_toks {most} leaves no room for a context; expected at most "
                f"{self.max_length - 1}, of a longest sequence of {self.max_length} tokens."
            )
        rows = [self._context(request.args[0]) for request in requests]
        if num_cut := sum(len(row) > room for row in rows):
            _log.warning(
                "%d of %d contexts are longer than %d tokens and were cut from the left.",
                num_cut,
                len(rows),
                room,
            )
        rows = [row[-room:] for row in rows]
        check_prompts(self.model, rows)
        ending = Ending(self.tokenizer, greedy, until)
        return rows, {"ending": ending, "max_new_tokens": most, "longest": room}

    def _settings(self, where: str, given: dict[str, Any]) -> tuple[list[str], int, float | None]:
        """Returns stop strings, most tokens, and a repetition penalty if there is one.

        Raises:
          ValueError: see `generate_until`.
        """
        settings = dict(normalize_gen_kwargs(given, self.max_gen_toks))
        end = self.eot_token_id
        until = handle_stop_sequences(
            settings.pop("until"), eos=None if end is None else self.tokenizer.decode(end)
        )
        most, penalty = settings.pop("max_gen_toks"), settings.pop("repetition_penalty", None)
        expect.integer(f"{where}: max_gen_toks", most, 1)
        if penalty is not None:
            expect.at_least(f"{where}: repetition_penalty", penalty, 0, exclusive=True)
        if settings.pop("do_sample"):
            raise expect.InputError(
                f"{where}: do_sample {given.get('do_sample')}, temperature "
                f"{given.get('temperature')} draws answers at random; expected do_sample: false, "
                "since answers are greedy here."
            )
        check_is_greedy(where, settings)
        known = (*_WITHOUT_EFFECT, *NEUTRAL)
        if unknown := sorted(settings.keys() - set(known)):
            raise expect.InputError(
                f"{where}: {expect.listed(unknown)} is not supported; expected until, "
                "max_gen_toks and do_sample: false."
            )
        return until, most, penalty

    def _context(self, text: str) -> list[int]:
        """Returns ids as `--model hf` does where it generates: an end is no begin of sequence."""
        begin = self.tokenizer.bos_token
        is_begun = begin is not None and text.startswith(begin)
        return self._ids(text, False if is_begun else self.add_bos_token)
