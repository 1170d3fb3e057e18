"""Every layout of rows gives the tokens, and the boundary, that TRL's SFTTrainer prepares."""

import json
import types
from pathlib import Path

import pytest
from conftest import require_shared
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

import dlc_jax as dlc
from dlc_jax.datasets.instructions import instructions
from dlc_jax.exports.instructions import write_trl
from dlc_jax.preprocess.tokens import tokenise

ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n{}\n\n### Response:\n"
)
SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
SPECIAL += [
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<\uff5cUser\uff5c>",
    "<\uff5cAssistant\uff5c>",
]


def rows_of(source, num):
    """Returns a question and an answer of every row."""
    data = dlc.load_instructions(source)
    found = []
    for prompt, response in zip(data.prompts[:num], data.responses[:num], strict=True):
        body = prompt.partition("### Instruction:\n")[2]
        found.append((body.removesuffix("\n\n### Response:\n"), response))
    return found


ROWS = rows_of("demo:dolly/train", 40)


@pytest.fixture(scope="module", params=["bpe", "sentencepiece", "r1"])
def tokenizer(timm, request):
    """Byte-level pairs with Llama 3's template, SentencePiece's with Qwen's, and DeepSeek R1's."""
    import trl
    from transformers import PreTrainedTokenizerFast

    unigram = request.param == "sentencepiece"
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=unigram))
    if unigram:  # as fast tokenizers hold a SentencePiece model of pairs
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        tokenizer.decoder = decoders.Metaspace()
        alphabet = []
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([" ".join(row) for row in ROWS], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    names = {"bpe": "llama3", "sentencepiece": "qwen2_5", "r1": "deepseek_r1_distill"}
    file = Path(trl.__file__).parent / "chat_templates" / f"{names[request.param]}.jinja"
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        chat_template=file.read_text(encoding="utf-8"),
    )


def with_marks(tokenizer):
    """Returns the tokenizer with what TRL trains on all turns with."""
    from copy import deepcopy

    from trl.chat_template_utils import get_training_chat_template

    other = deepcopy(tokenizer)
    other.chat_template = get_training_chat_template(tokenizer)
    return other


def prepared(rows, tokenizer, *, all_turns=False):
    """Returns ids, and whether each counts, as TRL's trainer is fed."""
    import datasets
    from trl import SFTConfig, SFTTrainer

    datasets.disable_progress_bars()
    rows = rows if isinstance(rows, datasets.Dataset) else datasets.Dataset.from_list(rows)
    trainer = types.SimpleNamespace(
        _tokenizer=tokenizer, chat_template=None, completion_only_loss="messages" not in rows[0]
    )
    settings = SFTConfig(
        output_dir="unused",
        max_length=None,
        assistant_only_loss=all_turns,
        shuffle_dataset=False,
        report_to=[],
        use_cpu=True,
        bf16=False,
    )
    found = SFTTrainer._prepare_dataset(trainer, rows, tokenizer, settings, False, None, "train")
    return [(row["input_ids"], [label != -100 for label in row["labels"]]) for row in found]


def assert_same(data, tokenizer, expected):
    """Compares ids and boundary of every row; BOS or EOS that TRL writes twice is there once."""
    found = tokenise(data, tokenizer, 10**6)
    assert len(found) == len(expected)
    for i, (ids, counts) in enumerate(expected):
        assert found.tokens[i].tolist() == ids
        assert found.counts(i).tolist() == counts
        assert 0 < found.num_response[i] == sum(counts)


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


def system(text):
    return {"role": "system", "content": text}


def in_parts(text):
    return [{"type": "text", "text": text[:5]}, {"type": "text", "text": text[5:]}]


# layout -> row of a question and its answer, in the form of this layout
IN_CHAT = {
    "messages": lambda q, a: {"messages": [user(q), assistant(a)]},
    "messages-parts": lambda q, a: {"messages": [user(in_parts(q)), assistant(in_parts(a))]},
    "completion": lambda q, a: {"prompt": [user(q)], "completion": [assistant(a)]},
    "sharegpt": lambda q, a: {
        "conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]
    },
    "sharegpt-roles": lambda q, a: {"conversations": [user(q), assistant(a)]},
}
IN_TEXT = {
    "alpaca": lambda q, a: {"instruction": q, "input": "", "output": a},
    "dolly": lambda q, a: {"instruction": q, "context": "", "response": a, "category": "open_qa"},
    "gsm8k": lambda q, a: {"question": q, "answer": a},
    "openorca": lambda q, a: {"id": q, "system_prompt": "", "question": q, "response": a},
    "prompt": lambda q, a: {"prompt": ALPACA.format(q), "response": a},
    "completion": lambda q, a: {"prompt": ALPACA.format(q), "completion": a},
    "text": lambda q, a: {"text": ALPACA.format(q) + a},
}


@pytest.mark.parametrize("layout", IN_CHAT)
def test_conversations_are_trls(tokenizer, layout):
    data = instructions([IN_CHAT[layout](*row) for row in ROWS], tokenizer=tokenizer)
    assert data.layout == layout.partition("-")[0]
    rows = [{"prompt": [user(q)], "completion": [assistant(a)]} for q, a in ROWS]
    assert_same(data, tokenizer, prepared(rows, tokenizer))


@pytest.mark.parametrize("layout", IN_TEXT)
def test_texts_are_trls(tokenizer, layout):
    how = {"response_marker": "### Response:\n"} if layout == "text" else {}
    rows = [IN_TEXT[layout](*row) for row in ROWS]
    data = instructions(rows, tokenizer=tokenizer, **how)
    assert data.layout == layout
    assert data.rows == tuple(rows)
    expected = [{"prompt": ALPACA.format(q), "completion": a} for q, a in ROWS]
    assert_same(data, tokenizer, prepared(expected, tokenizer))
    assert instructions(rows, layout, tokenizer=tokenizer, **how).fingerprint == data.fingerprint


@pytest.mark.parametrize("layout", ["alpaca", "dolly", "gsm8k", "openorca"])
def test_texts_in_the_chat_template_are_trls(tokenizer, layout):
    rows = [IN_TEXT[layout](*row) for row in ROWS]
    talks = [[user(q)] for q, _ in ROWS]
    if layout in ("alpaca", "openorca"):
        column = "system" if layout == "alpaca" else "system_prompt"
        rows[0][column], talks[0] = "Be brief.", [system("Be brief."), *talks[0]]
    if layout == "alpaca":
        rows[1]["history"] = [["Hi", "Hello."], ["And?", "So."]]
        before = [user("Hi"), assistant("Hello."), user("And?"), assistant("So.")]
        talks[1] = before + talks[1]
    data = instructions(rows, "chat", tokenizer=tokenizer)
    expected = [
        {"prompt": talk, "completion": [assistant(a)]}
        for talk, (_, a) in zip(talks, ROWS, strict=True)
    ]
    assert_same(data, tokenizer, prepared(expected, tokenizer))


TALKS = [
    [user(a[0]), assistant(a[1]), user(b[0]), assistant(b[1])]
    for a, b in zip(ROWS[::2], ROWS[1::2], strict=True)
]


def test_all_turns_are_trls(tokenizer):
    """With the marks of the templates that TRL trains with."""
    other = with_marks(tokenizer)
    rows = [{"messages": talk} for talk in TALKS]
    data = instructions(rows, tokenizer=other, turns="all")
    assert_same(data, other, prepared(rows, other, all_turns=True))
    # of a completion, those in it
    rows = [{"prompt": talk[:2], "completion": talk[2:]} for talk in TALKS]
    completions = instructions(rows, tokenizer=other, turns="all")
    assert_same(completions, other, prepared(rows, other, all_turns=True))


def test_turns_without_marks_are_told_apart(tokenizer):
    """The tokens that count are the answers and what ends each, as those behind one prompt."""
    rows = [{"messages": talk} for talk in TALKS]
    found = tokenise(instructions(rows, tokenizer=tokenizer, turns="all"), tokenizer, 10**6)
    last = tokenise(instructions(rows, tokenizer=tokenizer), tokenizer, 10**6)
    first = tokenise(instructions(rows, tokenizer=tokenizer, turns="first"), tokenizer, 10**6)
    for i in range(len(rows)):
        assert found.tokens[i].tolist() == last.tokens[i].tolist()
        whole = len(found.tokens[i])
        tail = (found.counts(i) & (range(whole) >= last.num_prompt[i])).sum()
        assert tail == last.num_response[i]
        assert found.num_response[i] - tail == first.num_response[i]
        assert found.num_prompt[i] == first.num_prompt[i]
        assert first.tokens[i].tolist() == found.tokens[i][: len(first.tokens[i])].tolist()


def test_what_trl_writes_twice_is_written_once(tokenizer):
    """Begin and end of sequence that are in the text already."""
    rows = [{"prompt": f"<s>{ALPACA.format(q)}", "completion": f"{a}</s>"} for q, a in ROWS]
    found = tokenise(instructions(rows), tokenizer, 10**6)
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    twice = 0
    for i, (ids, counts) in enumerate(prepared(rows, tokenizer)):
        assert ids[:2] == [begin, begin]
        twice += 1
        assert found.tokens[i].tolist() == ids[1:]
        assert found.counts(i).tolist() == counts[1:]
        assert ids.count(end) == found.tokens[i].tolist().count(end) == 1
    assert twice == len(ROWS)


@pytest.mark.parametrize("turns", ["last", "first", "all"])
@pytest.mark.parametrize("layout", ["messages", "sharegpt", "completion", "alpaca"])
def test_what_is_written_for_trl_is_what_was_scored(tokenizer, tmp_path, layout, turns):
    from datasets import load_dataset

    how = {"turns": turns} if layout != "alpaca" else {}
    tokenizer = with_marks(tokenizer) if turns == "all" else tokenizer
    if layout == "alpaca":
        rows = [IN_TEXT[layout](*row) for row in ROWS]
    elif layout == "completion":
        rows = [{"prompt": talk[:3], "completion": talk[3:]} for talk in TALKS]
    elif layout == "messages":
        rows = [{"messages": talk} for talk in TALKS]
    else:
        names = {"user": "human", "assistant": "gpt"}
        rows = [
            {"conversations": [{"from": names[m["role"]], "value": m["content"]} for m in talk]}
            for talk in TALKS
        ]
    data = instructions(rows, tokenizer=tokenizer, **how)
    write_trl(data, tmp_path / "kept.trl.jsonl")
    read = load_dataset(
        "json", data_files=str(tmp_path / "kept.trl.jsonl"), split="train", cache_dir=str(tmp_path)
    )
    written = prepared(read, tokenizer, all_turns=turns == "all")
    found = tokenise(data, tokenizer, 10**6)
    for i, (ids, counts) in enumerate(written):
        assert found.tokens[i].tolist() == ids
        if turns == "all" or layout in ("completion", "alpaca"):
            assert found.counts(i).tolist() == counts
    # and what is read again is the same
    again = dlc.load_instructions(
        f"jsonl:{tmp_path / 'kept.trl.jsonl'}", tokenizer=tokenizer, **how
    )
    assert (again.prompts, again.responses) == (data.prompts, data.responses)
    assert again.others == data.others


@pytest.mark.long
@pytest.mark.parametrize("name", ["dolly_hhrlhf_1000", "gsm8k_2473", "roleplay_1546"])
def test_real_rows_are_trls(tokenizer, name):
    source = f"jsonl:{require_shared(f'instructions/{name}.jsonl')}"
    rows = rows_of(source, 150)
    for layout in ("messages", "sharegpt"):
        data = instructions([IN_CHAT[layout](*row) for row in rows], tokenizer=tokenizer)
        expected = [{"prompt": [user(q)], "completion": [assistant(a)]} for q, a in rows]
        assert_same(data, tokenizer, prepared(expected, tokenizer))
    for layout in ("dolly", "gsm8k", "completion"):
        data = instructions([IN_TEXT[layout](*row) for row in rows])
        expected = [{"prompt": ALPACA.format(q), "completion": a} for q, a in rows]
        assert_same(data, tokenizer, prepared(expected, tokenizer))


def test_tools_and_options_reach_the_template(timm):
    """Qwen 3's own template, which knows both, and TRL's preparation of it."""
    import trl
    from transformers import PreTrainedTokenizerFast

    base = Tokenizer(models.BPE(unk_token="<unk>"))
    base.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    base.train_from_iterator(
        [], trainers.BpeTrainer(special_tokens=SPECIAL, initial_alphabet=alphabet)
    )
    file = Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja"
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=base, eos_token="<|im_end|>", chat_template=file.read_text()
    )
    tool = {
        "type": "function",
        "function": {
            "name": "search",
            "description": "Finds.",
            "parameters": {"type": "object", "properties": {"q": {"type": "string"}}},
        },
    }
    call = {"type": "function", "function": {"name": "search", "arguments": '{"q": "Nile"}'}}
    asked = [user("Name a river."), {"role": "assistant", "content": None, "tool_calls": [call]}]
    found = [{"role": "tool", "content": "the Nile"}]
    rows = [
        {"prompt": asked + found, "completion": [assistant("The Nile.")], "tools": [tool]},
        {"prompt": asked[:1], "completion": asked[1:], "tools": json.dumps([tool])},
        {
            "prompt": asked[:1],
            "completion": [assistant("The Nile.")],
            "chat_template_kwargs": {"enable_thinking": False},
        },
        {
            "prompt": asked[:1],
            "completion": [assistant("<think>\nAh.\n</think>\n\nThe Nile.")],
            "tools": "",
        },
        {"prompt": asked[:1], "completion": [*asked[1:], *found, assistant("The Nile.")]},
    ]
    for row in rows:
        plain = {k: v for k, v in row.items() if v != ""}
        expected = prepared([plain], tokenizer)
        assert_same(instructions([row], tokenizer=tokenizer), tokenizer, expected)
    texts = instructions(rows, tokenizer=tokenizer)
    assert '"description": "Finds."' in texts.prompts[0]
    assert "<tool_call>" in texts.responses[1]
    assert texts.prompts[2].endswith("<think>\n\n</think>\n\n")
    assert texts.responses[3].startswith("<think>\nAh.")
    assert "<tool_response>" in texts.responses[4]
    with pytest.raises(ValueError, match="1 are written otherwise .* another turn follows"):
        # earlier turns lose the block of thoughts that the last one gets
        instructions([{"messages": TALKS[0]}], tokenizer=tokenizer, turns="all")
