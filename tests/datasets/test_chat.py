"""A tokenizer's own chat template: the tokens it gives, and where the response begins in them."""

import dataclasses
import json
import resource
import signal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

import dlc_jax as dlc
from dlc_jax.datasets.instructions import instructions
from dlc_jax.exports.instructions import write_trl
from dlc_jax.preprocess.tokens import tokenise

# written for these tests, with what matters of the real ones
LLAMA = (
    "{{ bos_token }}{% for message in messages %}"
    "<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
    "{{ message['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "<start_of_turn>{{ 'model' if message['role'] == 'assistant' else message['role'] }}\n"
    "{{ message['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
# what a prompt ends with, and what follows the response
KINDS = {
    "llama": (LLAMA, "<|start_header_id|>assistant<|end_header_id|>\n\n", "<|eot_id|>"),
    "gemma": (GEMMA, "<start_of_turn>model\n", "<end_of_turn>\n"),
}
SPECIAL = [
    *("<unk>", "<bos>", "<eos>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"),
    *("<start_of_turn>", "<end_of_turn>"),
]


def said(*contents, first="user"):
    roles = {"user": "assistant", "assistant": "user", "system": "user"}
    messages, role = [], first
    for content in contents:
        messages.append({"role": role, "content": content})
        role = roles[role]
    return messages


TALKS = [
    said("Name a river.", "The Nile."),
    said(" Hi!\n", "\n Hello, naïve 日本語.\n\n", "Again?", "  Yes:\n\n- one\n- two "),
    said("a", "b"),
]


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(timm, request):
    """Byte-level pairs; it puts a begin of sequence in front of all that it is given."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [message["content"] for messages in TALKS for message in messages]
    tokenizer.train_from_iterator(texts * 20, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", tokenizer.token_to_id("<bos>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<|eot_id|>" if request.param == "llama" else "<eos>",
        chat_template=KINDS[request.param][0],
    )


def kind_of(tokenizer):
    return next(kind for kind in KINDS.values() if kind[0] == tokenizer.chat_template)


def test_tokens_are_the_tokenizers_own_and_the_boundary_is_exact(tokenizer):
    _, before, after = kind_of(tokenizer)
    talks = list(TALKS)
    if after == "<|eot_id|>":  # the other template has no such role
        talks.append(said("Be brief.", "Hi!", "Hello.", first="system"))
    data = instructions([{"messages": talk} for talk in talks], tokenizer=tokenizer)
    assert data.has_special_tokens
    found = tokenise(data, tokenizer, 512)
    for i, talk in enumerate(talks):
        whole = tokenizer.apply_chat_template(talk, tokenize=True, return_dict=False)
        assert found.tokens[i].tolist() == whole
        assert whole.count(tokenizer.bos_token_id) == 1
        assert data.prompts[i].endswith(before)
        assert data.responses[i] == talk[-1]["content"].strip() + after
        num_prompt = int(found.num_prompt[i])
        assert tokenizer.decode(whole[:num_prompt]) == data.prompts[i]
        assert tokenizer.decode(whole[num_prompt:]) == data.responses[i]
    assert not found.truncated.any()


def test_responses_alone_begin_as_sequences_do(tokenizer):
    data = instructions([{"messages": talk} for talk in TALKS], tokenizer=tokenizer)
    alone = tokenise(data.without_prompts("<bos>"), tokenizer, 512)
    assert alone.num_prompt.tolist() == [1] * len(TALKS)
    whole = tokenise(data, tokenizer, 512)
    for row, tokens, num_prompt in zip(alone.tokens, whole.tokens, whole.num_prompt, strict=True):
        assert row.tolist() == [tokenizer.bos_token_id, *tokens[num_prompt:]]


def test_columns_of_text_are_one_question_and_its_answer(tokenizer):
    rows = [
        {"instruction": "Translate.", "input": "Fluss", "output": "river"},
        {"instruction": "Name a river.", "input": "", "output": "The Nile."},
    ]
    asked = ("Translate.\n\nFluss", "Name a river.")
    talks = [said(request, row["output"]) for request, row in zip(asked, rows, strict=True)]
    expected = instructions([{"messages": talk} for talk in talks], tokenizer=tokenizer)
    found = instructions(rows, "chat", tokenizer=tokenizer)
    assert (found.prompts, found.responses) == (expected.prompts, expected.responses)
    assert found.ids.tolist() == expected.ids.tolist()
    plain = [
        {"prompt": request, "response": row["output"]}
        for request, row in zip(asked, rows, strict=True)
    ]
    assert instructions(plain, "chat", tokenizer=tokenizer).fingerprint == expected.fingerprint
    assert not instructions(rows).has_special_tokens


def test_ids_do_not_depend_on_the_tokenizer_but_the_fingerprint_does(tokenizer):
    row = {"messages": TALKS[0]}
    found = instructions([row, row], tokenizer=tokenizer)
    assert found.ids.tolist() == ["57d931fb922a9cf4", "57d931fb922a9cf4-1"]  # of every tokenizer
    as_text = dataclasses.replace(found, has_special_tokens=False)
    assert as_text.fingerprint != found.fingerprint
    assert found.subset(np.array([1])).has_special_tokens


def test_a_tokenizer_is_asked_for_when_it_is_needed(tokenizer, tmp_path):
    asked = []

    def load():
        asked.append(tokenizer)
        return tokenizer

    # as tables have it: every message has all fields
    talks = [[message | {"name": None} for message in talk] for talk in TALKS]
    table = pa.table({"messages": talks, "prompt": ["a"] * len(TALKS)})
    pq.write_table(table, tmp_path / "train.parquet")
    data = dlc.load_instructions(f"hf:{tmp_path}/train", tokenizer=load)
    assert asked == [tokenizer]
    expected = instructions([{"messages": talk} for talk in TALKS], tokenizer=tokenizer)
    assert data.prompts == expected.prompts
    assert data.ids.tolist() == expected.ids.tolist()
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": "a", "response": "b"}))
    dlc.load_instructions(f"jsonl:{tmp_path}/a.jsonl", tokenizer=load)
    assert asked == [tokenizer]


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        (said("a", "b", "c"), "1 end with a message of another role than 'assistant': x"),
        (said("a", " \n"), "1 have an empty response: x"),
        (said("b", first="assistant"), "1 have no two or more {role, content}"),
        ("a", "1 have no two or more {role, content} of text in column 'messages': x"),
        ([*said("a"), {"role": "assistant", "content": ["b"]}], "have no two or more"),
        ([*said("a"), {"role": "assistant"}], "have no two or more"),
    ],
)
def test_conversations_that_cannot_be_used_are_named(tokenizer, messages, says):
    rows = [{"id": "w", "messages": TALKS[0]}, {"id": "x", "messages": messages}]
    with pytest.raises(ValueError, match=says):
        instructions(rows, tokenizer=tokenizer)


def test_templates_that_cannot_be_used_say_why(timm, tokenizer):
    from copy import deepcopy

    row = {"messages": TALKS[0]}
    with pytest.raises(ValueError, match="expected tokenizer=... with it"):
        instructions([row])
    other = deepcopy(tokenizer)
    other.chat_template = None
    with pytest.raises(ValueError, match="has no chat template, as those of base models"):
        instructions([row], tokenizer=lambda: other)
    # the last question is written in another way while there is no answer to it
    other.chat_template = "{% for m in messages %}{{ loop.last }}{{ m['content'] }}{% endfor %}"
    with pytest.raises(ValueError, match="2 are written otherwise .*: row 1, row 2"):
        instructions([row, row], tokenizer=other)
    other.chat_template = GEMMA
    with pytest.raises(
        ValueError, match="row 2: the tokenizer's chat template refuses it: .*no sy"
    ):
        instructions([row, {"messages": said("a", "b", "c", first="system")}], tokenizer=other)
    with pytest.raises(ValueError, match="fit no template; .*prompt: prompt, response"):
        instructions([{"text": "a"}], "chat", tokenizer=tokenizer)
    with pytest.raises(ValueError, match="fit prompt and messages"):
        instructions([row | {"prompt": "a", "response": "b"}], tokenizer=tokenizer)


def wide(num):
    """Returns a template that doubles a text so often."""
    return "{% set n = namespace(x='aa') %}" + "{% set n.x = n.x ~ n.x %}" * num + "{{ n.x }}"


LOOP = "{% for i in range(99999) %}"


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{{ 'a' * 10**9 }}", "MemoryError"),
        ("{{ messages[0]['role'] * 10**6 }}", "it makes 4000000 characters of"),
        ("{{ 'a' * 10**12 }}", "MemoryError"),
        ("{{ 'a' | center(10**12) }}", "MemoryError"),
        ("{{ '%1000000000000d' % 1 }}", "Error"),
        (wide(50), "MemoryError|TimeoutError"),
        ("{% for i in range(10**9) %}{{ i }}{% endfor %}", "Range too big"),
        (LOOP + "aaaaaaaaaaaaaaaaaaaa{% endfor %}", "it makes 1999980 characters of"),
        (LOOP + LOOP + LOOP + "{% endfor %}" * 3, "TimeoutError: took more than 0.3 s"),
        ("{{ 10**(10**9) }}", "TimeoutError: took more than 0.3 s|MemoryError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "Error"),
        ("{% if %}", "TemplateSyntaxError"),
    ],
)
def test_templates_that_would_take_everything_are_refused(tokenizer, monkeypatch, template, says):
    from copy import deepcopy

    monkeypatch.setattr("dlc_jax.datasets.chat._SECONDS", 0.3)
    before = resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGALRM)
    other = deepcopy(tokenizer)
    other.chat_template = template
    with pytest.raises(
        ValueError, match=f"row 1: the tokenizer's chat template refuses it: .*{says}"
    ):
        instructions([{"messages": TALKS[0]}], tokenizer=other)
    assert before == (resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGALRM))
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("documents", [{"name": "search"}]),
        ("functions", [{"name": "search"}]),
        ("System", "Be brief."),
        ("history", [["a", "b"]]),
        ("images", ["a.png"]),
    ],
)
def test_context_beside_messages_is_refused_by_name(tokenizer, column, value):
    rows = [{"id": name, "messages": TALKS[0], column: None} for name in "vwx"]
    for empty in (None, "", " ", [], {}, [[]], "[]"):
        rows[2][column] = empty
        assert len(instructions(rows, tokenizer=tokenizer)) == 3
    rows[1][column] = value
    with pytest.raises(ValueError, match=f"1 have '{column}', which template 'chat' .*: w"):
        instructions(rows, tokenizer=tokenizer)


def test_calls_in_messages_are_used_by_the_template_or_refused(tokenizer):
    from copy import deepcopy

    talk = [dict(message) for message in TALKS[1]]
    talk[1]["tool_calls"] = [{"function": {"name": "search"}}]
    row = {"id": "x", "messages": talk}
    with pytest.raises(
        ValueError, match="1 have messages with 'tool_calls', which .* leaves out.*: x"
    ):
        instructions([row], tokenizer=tokenizer)
    other = deepcopy(tokenizer)
    content = "{{ message['content'] | trim }}"
    other.chat_template = other.chat_template.replace(content, content + "{{ message.tool_calls }}")
    assert "search" in instructions([row], tokenizer=other).prompts[0]


def test_calls_without_content_that_the_template_needs_are_used(tokenizer):
    """A message with neither is refused by a template; that shows that the calls are used."""
    from copy import deepcopy

    other = deepcopy(tokenizer)
    other.chat_template = LLAMA.replace(
        "message['content'] | trim",
        "message['tool_calls'] | string if message['tool_calls'] else message['content'] + ''",
    )
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
    talk = [said("a")[0], call, {"role": "tool", "content": "b"}, *said("c", first="assistant")]
    data = instructions([{"messages": talk}], tokenizer=other)
    assert "[{'function': {'name': 'f'}}]" in data.prompts[0]
    every = instructions([{"messages": talk}], tokenizer=other, turns="all")
    assert every.responses[0].startswith("[{'function': {'name': 'f'}}]<|eot_id|>")


def test_tools_that_the_template_leaves_out_are_refused(tokenizer):
    rows = [{"id": name, "messages": TALKS[0], "tools": [{"name": "search"}]} for name in "vw"]
    with pytest.raises(ValueError, match="2 have 'tools', which .* leaves out.*: v, w"):
        instructions(rows, tokenizer=tokenizer)


BAD = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0.5}]
PICTURE = [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "x"}}]


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"tools": "search"}, "1 have no list of objects, or JSON of one, in column 'tools'"),
        ({"tools": {"a": "b"}}, "1 have no list of objects, or JSON of one, in column 'tools'"),
        ({"chat_template_kwargs": "a"}, "1 have no object in column 'chat_template_kwargs'"),
        ({"chat_template_kwargs": {"tokenize": True}}, "1 have tokenize in column 'chat_templ"),
        ({"chat_template_kwargs": {"messages": []}}, "1 have messages in column 'chat_templ"),
        ({"chat_template_kwargs": {"chat_template": "a"}}, "1 have chat_template in column"),
        ({"messages": BAD}, "1 have a message of weight 0.5 in column 'messages'; expected 0 or 1"),
        ({"messages": said(PICTURE, "b")}, "1 have content of type 'image_url' in column 'mess"),
        ({"messages": said(None, "b")}, "1 have no two or more {role, content} of text"),
        (
            {"messages": [*said("a"), {"role": "assistant", "content": "b", "weight": 0}]},
            "1 have no turn of the assistant, or none but of weight 0",
        ),
        ({"messages": said("s", "a", "b", first="system"), "system": "t"}, "'system' and another"),
        ({"system": 3}, "1 have no text in column 'system'"),
        ({"system_prompt": ["s"]}, "1 have no text in column 'system_prompt'"),
    ],
)
def test_what_a_conversation_cannot_hold_is_refused_by_name(tokenizer, row, says):
    rows = [{"id": "w", "messages": TALKS[0]}, {"id": "x", "messages": TALKS[0], **row}]
    with pytest.raises(ValueError, match=f"{says}.*: x") as refused:
        instructions(rows, tokenizer=tokenizer)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("talk", "says"),
    [
        ([{"from": "human", "value": "a"}, {"from": "alien", "value": "b"}], "turn of 'alien' in"),
        ([{"from": "human", "value": "a"}, {"from": "function_call", "value": "b"}], "turn of 'fu"),
        ([{"from": [1], "value": "a"}, {"from": "gpt", "value": "b"}], r"turn of \[1\] in"),
        ([{"from": "human", "value": "a"}, {"from": "gpt"}], "have no two or more"),
        ([{"from": "human", "value": "a"}, {"from": "human", "value": "b"}], "another role than"),
        ([{"from": "gpt", "value": "a"}], "have no two or more"),
        ([], "have no two or more"),
    ],
)
def test_talks_of_sharegpt_that_cannot_be_used_are_named(tokenizer, talk, says):
    with pytest.raises(ValueError, match=f"1 .*{says}.*: row 1"):
        instructions([{"conversations": talk}], tokenizer=tokenizer)


def test_turns_of_weight_0_are_not_learnt(tokenizer):
    """They stay in the prompt; those behind the last one that counts do not change its loss."""
    talk = said("a", "b", "c", "d", "e", "f")
    silent = [dict(message) for message in talk]
    silent[5]["weight"], silent[1]["weight"], silent[3]["weight"] = 0, 0.0, 1
    found = instructions([{"messages": silent}], tokenizer=tokenizer)
    assert found.prompts == instructions([{"messages": talk[:4]}], tokenizer=tokenizer).prompts
    assert found.responses == instructions([{"messages": talk[:4]}], tokenizer=tokenizer).responses
    for turns in ("first", "all"):
        only = instructions([{"messages": silent}], tokenizer=tokenizer, turns=turns)
        assert (only.prompts, only.responses) == (found.prompts, found.responses)
    silent[1].pop("weight")
    both = instructions([{"messages": silent}], tokenizer=tokenizer, turns="all")
    ((start, end),) = both.others[0]
    _, before, after = kind_of(tokenizer)
    assert both.responses[0][:start] == f"b{after}"
    assert both.responses[0][start:end].endswith(before)
    assert both.responses[0][end:] == f"d{after}"


def test_system_prompts_in_a_column_come_first(tokenizer):
    if kind_of(tokenizer)[0] == GEMMA:
        pytest.skip("this template has no such role")
    talk = said("Be brief.", "Hi!", "Hello.", first="system")
    expected = instructions([{"messages": talk}], tokenizer=tokenizer)
    for row in ({"messages": talk[1:]}, {"messages": talk}):
        for name in ("system", "system_prompt"):
            found = instructions([{**row, name: "Be brief."}], tokenizer=tokenizer)
            assert (found.prompts, found.responses) == (expected.prompts, expected.responses)


def test_responses_that_lose_their_thoughts_are_refused(tokenizer):
    """As by DeepSeek R1's template, which leaves out all before the end of the thoughts."""
    from copy import deepcopy

    other = deepcopy(tokenizer)
    other.chat_template = LLAMA.replace(
        "message['content'] | trim", "message['content'].split('</think>')[-1] | trim"
    )
    talk = said("a", "<think>hm</think>b")
    with pytest.raises(
        ValueError, match="1 have a response of which .* leaves out a part.*: row 1"
    ):
        instructions([{"messages": talk}], tokenizer=other)
    # of earlier turns it does so when the model is used, too
    found = instructions([{"messages": talk + said("c", "d")}], tokenizer=other)
    assert "hm" not in found.prompts[0]


def test_a_template_that_opens_thoughts_leaves_them_to_the_response(tokenizer):
    from copy import deepcopy

    other = deepcopy(tokenizer)
    other.chat_template += "{% if add_generation_prompt %}<think>{% endif %}"
    found = instructions([{"messages": talk} for talk in TALKS], tokenizer=other)
    plain = instructions([{"messages": talk} for talk in TALKS], tokenizer=tokenizer)
    assert (found.prompts, found.responses) == (plain.prompts, plain.responses)


def test_greetings_are_no_responses(tokenizer):
    talk = said("Hi!", "Who are you?", "A model.", first="assistant")
    if kind_of(tokenizer)[0] == LLAMA:
        assert instructions([{"messages": talk}], tokenizer=tokenizer).prompts
    for turns in ("first", "all"):
        with pytest.raises(ValueError, match="1 begin with a response.*: row 1"):
            instructions([{"messages": talk}], tokenizer=tokenizer, turns=turns)


def test_messages_of_which_a_template_writes_nothing_are_refused(tokenizer):
    from copy import deepcopy

    other = deepcopy(tokenizer)
    other.chat_template = (
        "{% for m in messages %}{% if m['role'] in ('user', 'assistant') %}{{ m['content'] }}|"
        "{% elif m['role'] == 'tool' %}{{ m['content'] | tojson }}|{% endif %}{% endfor %}"
    )
    talk = said("Find.", "I did.")
    for role in ("developer", "system", "function"):
        lost = [{"role": role, "content": "Be brief."}, *talk]
        with pytest.raises(ValueError, match=f"1 have a message of '{role}' of which .*: row 1"):
            instructions([{"messages": lost}], tokenizer=other)
    tool = {"role": "tool", "content": 'the "Nile"\n'}
    found = instructions([{"messages": [talk[0], tool, talk[1]]}], tokenizer=other)
    assert found.prompts == ('Find.|"the \\"Nile\\"\\n"|',)


def test_answers_that_marks_leave_out_are_refused(tokenizer):
    """A template that marks its last turn alone would have the others not learnt."""
    from copy import deepcopy

    other = deepcopy(tokenizer)
    other.chat_template = (
        "{% for m in messages %}{% if loop.last %}{% generation %}{{ m['content'] }}|"
        "{% endgeneration %}{% else %}{{ m['content'] }}|{% endif %}{% endfor %}"
    )
    talk = said("a", "bb", "c", "dd")
    with pytest.raises(ValueError, match="1 have a response of which .*: row 1"):
        instructions([{"messages": talk}], tokenizer=other, turns="all")
    found = instructions([{"messages": talk[:2]}], tokenizer=other, turns="all")
    assert (found.prompts, found.responses) == (("a|",), ("bb|",))


def test_weights_in_a_prompt_change_nothing(tokenizer):
    talk = said("a", "b", "c", "d")
    row = {"prompt": talk[:3], "completion": talk[3:] + said("e", "f")}
    silent = {**row, "prompt": [talk[0], {**talk[1], "weight": 0}, talk[2]]}
    found, other = (instructions([some], tokenizer=tokenizer) for some in (row, silent))
    assert (found.prompts, found.responses) == (other.prompts, other.responses)
    assert "d" in found.responses[0]
    assert "f" in found.responses[0]


def test_options_that_a_table_fills_up_are_none(tokenizer, tmp_path):
    from copy import deepcopy

    other = deepcopy(tokenizer)
    thinks = "{% set t = enable_thinking | default(true) %}{{ t }}"
    other.chat_template = thinks + tokenizer.chat_template
    rows = [
        {"messages": TALKS[0], "chat_template_kwargs": options}
        for options in ({"enable_thinking": False}, {"other": "x"})
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    found = dlc.load_instructions(f"parquet:{tmp_path}/rows.parquet", tokenizer=other)
    expected = instructions(rows, tokenizer=other)
    assert (found.prompts, found.responses) == (expected.prompts, expected.responses)
    assert found.prompts[0].startswith("False")
    assert found.prompts[1].startswith("True")


@pytest.mark.parametrize("reverse", [False, True])
def test_trainers_get_one_form_for_all_rows(tokenizer, tmp_path, reverse):
    rows = [
        {"prompt": "a", "completion": "b"},
        {"prompt": said("c"), "completion": said("d", first="assistant")},
    ]
    data = instructions(rows[::-1] if reverse else rows, "chat", tokenizer=tokenizer)
    write_trl(data, tmp_path / "rows.jsonl")
    again = dlc.load_instructions(f"jsonl:{tmp_path}/rows.jsonl", tokenizer=tokenizer)
    assert (again.prompts, again.responses) == (data.prompts, data.responses)
