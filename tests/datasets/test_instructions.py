"""Rows to prompts and responses, and rows that are refused."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import require_shared

import dlc_jax as dlc
from dlc_jax.datasets.instructions import instructions

PLAIN = {"instruction": "Name a river.", "input": "", "output": "The Nile."}
WITH_INPUT = {"instruction": "Translate.", "input": "Fluss", "output": "river"}
WRAPPED = {"prompt": "### Instruction:\nHi\n\n### Response:\n", "response": "Hello."}


def test_prompts_are_alpacas():
    data = instructions([PLAIN, WITH_INPUT])
    assert data.prompts == (
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\nName a river.\n\n### Response:\n",
        "Below is an instruction that describes a task, paired with an input that provides further "
        "context. Write a response that appropriately completes the request.\n\n### Instruction:\n"
        "Translate.\n\n### Input:\nFluss\n\n### Response:\n",
    )
    assert data.responses == ("The Nile.", "river")
    assert data.rows == (PLAIN, WITH_INPUT)
    without = {key: PLAIN[key] for key in ("instruction", "output")}
    assert instructions([without]).prompts == data.prompts[:1]


def test_prompts_that_are_wrapped_are_left_alone():
    data = instructions([WRAPPED])
    assert (data.prompts, data.responses) == ((WRAPPED["prompt"],), (WRAPPED["response"],))
    assert data.without_prompts().prompts == ("",)


def test_every_source_gives_the_same(tmp_path):
    rows = [PLAIN, WITH_INPUT, PLAIN]
    (tmp_path / "a.jsonl").write_text("".join(f"{json.dumps(row)}\n\n" for row in rows))
    (tmp_path / "a.json").write_text(json.dumps(rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    found = [dlc.load_instructions(f"{kind}:{tmp_path}") for kind in ("jsonl", "json", "parquet")]
    for data in found:
        assert data.rows == tuple(rows)
        assert data.fingerprint == found[0].fingerprint
        np.testing.assert_array_equal(data.ids, found[0].ids)
    # a repeated row has an id of its own, and ids do not depend on the other rows
    assert len(set(found[0].ids)) == 3
    assert found[0].ids[2] == f"{found[0].ids[0]}-1"
    assert instructions([WITH_INPUT]).ids[0] == found[0].ids[1]
    assert instructions([{**PLAIN, "id": 7}]).ids.tolist() == ["7"]
    assert instructions([{**PLAIN, "id": 7}, {**WITH_INPUT, "id": 7}]).ids[1] == found[0].ids[1]


def test_categories_are_classes():
    rows = [{**PLAIN, "topic": topic} for topic in ("b", "a", "b")]
    labels, names = instructions(rows).categories("topic")
    assert (labels.tolist(), names) == ([1, 0, 1], ("a", "b"))
    with pytest.raises(ValueError, match=r"1 have no text in column 'topic'"):
        instructions([*rows, PLAIN]).categories("topic")


@pytest.mark.parametrize(
    ("rows", "template", "says"),
    [
        ([{"text": "a"}], None, r"columns text fit no template; .*alpaca: instruction, output"),
        ([{**PLAIN, **WRAPPED}], None, "fit alpaca and prompt"),
        ([PLAIN], "prompt", "1 have no text in column 'prompt': row 1"),
        ([PLAIN, {**PLAIN, "output": " \n"}], None, "1 have an empty response: row 2"),
        ([{**PLAIN, "id": "x", "output": ""}], None, "1 have an empty response: x"),
        ([PLAIN, {**PLAIN, "output": None}], None, "no text in column 'output': row 2"),
        ([{**PLAIN, "input": 3}], None, "no text in column 'input': row 1"),
        ([PLAIN], "alpacca", "Did you mean 'alpaca'"),
    ],
)
def test_rows_that_do_not_fit_are_named(rows, template, says):
    with pytest.raises(ValueError, match=says):
        instructions(rows, template)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.jsonl", b'{"prompt": "a", "response": "b"}\n{"prompt', "line 2"),
        ("a.jsonl", b"[1]\n", "line 1: expected an object, found list"),
        ("a.jsonl", b"\xff\xfe", "line 1"),
        ("a.jsonl", b"\n", "has no rows"),
        ("a.json", b"{}", "expected a list of objects, found dict"),
        ("a.json", b"[", "not JSON"),
        ("a.parquet", b"PAR1", "not Parquet"),
    ],
)
def test_damaged_files_are_refused(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=says):
        dlc.load_instructions(f"{name.partition('.')[2]}:{tmp_path / name}")


def test_sources_that_are_not_there():
    with pytest.raises(ValueError, match="expected <scheme>:<file>"):
        dlc.load_instructions("train.jsonl")
    with pytest.raises(ValueError, match="scheme of"):
        dlc.load_instructions("csv:train.csv")
    with pytest.raises(ValueError, match="no such file"):
        dlc.load_instructions("jsonl:/there/is/none.jsonl")


@pytest.mark.parametrize(
    ("name", "num", "start"),
    [
        ("dolly_hhrlhf_1000", 1000, "Below is an instruction that describes a task. Write"),
        ("gsm8k_2473", 2473, "Below is an instruction that describes a task. Write"),
        ("roleplay_1546", 1546, "Below is an instruction that describes a task"),
    ],
)
def test_real_data(name, num, start):
    data = dlc.load_instructions(f"jsonl:{require_shared(f'instructions/{name}.jsonl')}")
    assert len(data) == len(set(data.ids)) == num
    assert all(prompt.startswith(start) for prompt in data.prompts)
    assert all(prompt.count("### Response:") == 1 for prompt in data.prompts[:50])
