"""The model class `dlc_jax` of lm_eval: log-likelihoods by a decoder in JAX.

Importing this module registers the class. It needs the extra `eval`.
"""

from __future__ import annotations

import itertools
import logging
from typing import Any

from dlc_jax import expect
from dlc_jax.datasets.chat import written
from dlc_jax.encoders.language_model import LanguageModel, load_language_model, transformers_library
from dlc_jax.evaluation.likelihoods import continuation_log_likelihoods, longest_input
from dlc_jax.preprocess.token_batches import TOKENS_PER_BATCH
from dlc_jax.preprocess.tokens import tokenising

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise ImportError(
        f"lm_eval cannot be imported ({expect.first_line(error)}). It comes with the extra `eval`: "
        "pip install 'dlc_jax[eval]'."
    ) from error

_log = logging.getLogger(__name__)


@register_model("dlc_jax")
class JaxLM(TemplateLM):
    """A language model, as lm_eval asks it.

    Requests that generate text are refused; log-likelihoods are what it gives, those of multiple
    choice included. Where the begin of sequence goes is decided as for `--model hf`.
    """

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
        """Refuses: there is no decoding loop."""
        tasks = sorted({str(request.task_name) for request in requests})
        raise NotImplementedError(
            f"dlc_jax does not generate text, which {expect.listed(tasks)} asks for "
            "(generate_until). Supported are tasks of output_type multiple_choice, loglikelihood "
            "and loglikelihood_rolling; for others, export the merged model and use --model hf."
        )
