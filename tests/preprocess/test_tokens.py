"""Where the response begins, and what is cut off."""

import dataclasses

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from dlc_jax.datasets.instructions import instructions
from dlc_jax.preprocess.tokens import Tokenised, check_vocabulary, tokenise

TEXTS = (
    "### Instruction:\nName a river.\n\n### Response:\nThe Nile.",
    "Question:\n\nwhat is a  café?\n Answer:\n\n\nA place; naïve 日本語 text\n\n",
    "one two  three\n\n\n\nfour",
)


def wrapped(tokenizer):
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.fixture(scope="module", params=["bytes", "pieces"])
def tokenizer(timm, request):
    """Byte-level pairs as in Llama 3, and pieces that carry the space in front as in Mistral."""
    special = ["<unk>", "<s>", "</s>"]
    if request.param == "bytes":
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
    else:
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=200, special_tokens=special, unk_token="<unk>", show_progress=False
        )
    tokenizer.train_from_iterator(TEXTS * 20, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return wrapped(tokenizer)


def rows_of(*pairs):
    return instructions([{"prompt": prompt, "response": response} for prompt, response in pairs])


def test_every_boundary_is_exact(tokenizer):
    """Each text, cut at every place: the prompt's tokens cover nothing of the response."""
    for text in TEXTS:
        for cut in range(1, len(text)):
            prompt, response = text[:cut], text[cut:]
            if not response.strip():
                continue
            found = tokenise(rows_of((prompt, response)), tokenizer, 512)
            whole = tokenizer(text, return_offsets_mapping=True)
            tokens, num_prompt = found.tokens[0].tolist(), int(found.num_prompt[0])
            assert tokens == [*whole["input_ids"], tokenizer.eos_token_id]
            assert not found.truncated[0]
            for place, (_, end) in enumerate(whole["offset_mapping"]):
                assert (end > cut) == (place >= num_prompt), (text, cut, place)


def test_what_a_tokenizer_without_offsets_shares_with_the_prompt(tokenizer):
    class Slow:
        is_fast = False
        eos_token_id = tokenizer.eos_token_id

        def __call__(self, text, add_special_tokens, verbose):
            found = tokenizer(text, add_special_tokens=add_special_tokens, verbose=verbose)
            return {"input_ids": found["input_ids"]}

    for text in TEXTS:
        for cut in range(1, len(text) - 3):
            if not text[cut:].strip():
                continue
            data = rows_of((text[:cut], text[cut:]))
            slow, fast = tokenise(data, Slow(), 512), tokenise(data, tokenizer, 512)
            np.testing.assert_array_equal(slow.tokens[0], fast.tokens[0])
            # never more than the prompt; fewer only where it was split up otherwise
            assert slow.num_prompt[0] <= fast.num_prompt[0]
            with_tokens = dataclasses.replace(data, has_special_tokens=True)
            bare = tokenise(with_tokens, Slow(), 512).tokens[0].tolist()
            assert bare == tokenise(with_tokens, tokenizer, 512).tokens[0].tolist()
            assert bare == slow.tokens[0][1:-1].tolist()


def test_long_samples_are_cut_and_counted(tokenizer):
    data = rows_of(("one two", "three\n\n\n\nfour"), ("one", "two"), ("one two three " * 9, "four"))
    whole = tokenise(data, tokenizer, 512)
    assert whole.truncated.tolist() == [False] * 3
    limit = len(whole.tokens[0]) - 1
    with pytest.raises(ValueError, match=rf"1 samples have no response left.*{data.ids[2]}"):
        tokenise(data, tokenizer, limit)
    cut = tokenise(data, tokenizer, limit, on_corrupt="skip")
    assert list(cut.skipped) == [data.ids[2]]
    assert cut.ids.tolist() == data.ids[:2].tolist()
    assert cut.truncated.tolist() == [True, False]
    np.testing.assert_array_equal(cut.tokens[0], whole.tokens[0][:limit])
    assert cut.num_response.tolist() == [whole.num_response[0] - 1, whole.num_response[1]]
    with pytest.raises(ValueError, match="no sample is left"):
        tokenise(
            data.__class__(data.prompts[2:], data.responses[2:], data.ids[2:], data.rows[2:]),
            tokenizer,
            limit,
            on_corrupt="skip",
        )


def test_samples_can_be_cut_shorter(tokenizer):
    whole = tokenise(rows_of(("one two", "three\n\nfour"), ("one", "two")), tokenizer, 512)
    lengths = np.array([len(row) for row in whole.tokens])
    cut = whole.cut(lengths - [1, 0])
    assert cut.truncated.tolist() == [True, False]
    np.testing.assert_array_equal(cut.tokens[0], whole.tokens[0][:-1])
    np.testing.assert_array_equal(cut.tokens[1], whole.tokens[1])
    assert cut.num_response.tolist() == (whole.num_response - [1, 0]).tolist()


def test_tokens_without_an_embedding_are_named_with_their_row():
    rows = (np.array([0, 96], np.int32), np.array([3, 97, 98], np.int32))
    data = Tokenised(rows, np.ones(2, np.int32), np.zeros(2, bool), np.array(["a", "b"]))
    check_vocabulary(data.named, 99, str)
    with pytest.raises(ValueError, match=r"^sample b: token 97 \('97'\) has no row .* 0 to 96\."):
        check_vocabulary(data.named, 97, str)
    with pytest.raises(ValueError, match=r"^x: token -1 "):
        check_vocabulary([("x", [5, -1])], 97, str)


def test_a_prompt_that_begins_a_sequence_gets_no_second_begin(tokenizer):
    class Slow:
        is_fast = False
        eos_token_id, bos_token_id = tokenizer.eos_token_id, tokenizer.bos_token_id

        def __call__(self, text, **options):
            return {"input_ids": tokenizer(text, **options)["input_ids"]}

    begin = tokenizer.bos_token_id
    plain = tokenise(rows_of(("one two", " three")), tokenizer, 64)
    for some in (tokenizer, Slow()):
        found = tokenise(rows_of(("<s>one two", " three"), ("<s><s>one", " two")), some, 64)
        assert [row.tolist().count(begin) for row in found.tokens] == [1, 2]
        assert found.tokens[0].tolist()[0] == begin
        assert found.num_response[0] == plain.num_response[0]
        assert tokenizer.decode(found.tokens[0][: found.num_prompt[0]]).startswith("<s>")
    assert plain.tokens[0].tolist().count(begin) == 1


def test_what_is_no_text_is_named_with_its_row(tokenizer):
    for pair in (("one\ud800", "two"), ("one", "two\udfff")):
        data = rows_of(("one", "two"), pair)
        with pytest.raises(
            ValueError, match=f"rows: sample {data.ids[1]}: the tokenizer cannot .*surrogates not"
        ):
            tokenise(data, tokenizer, 64)


def test_a_regular_expression_that_explodes_is_an_error_of_its_row(timm):
    exploding = Tokenizer(models.BPE())
    exploding.pre_tokenizer = pre_tokenizers.Split(Regex(r"(x+x+)+y"), "isolated")
    data = rows_of(("one", "two"), ("x" * 60, "two"))
    with pytest.raises(ValueError, match=f"sample {data.ids[1]}: .* PanicException: .*retry-limit"):
        tokenise(data, wrapped(exploding), 512)
