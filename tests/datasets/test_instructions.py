"""Rows to prompts and responses, and rows that are refused."""

import csv
import datetime
import json
import os
import re

import huggingface_hub
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT, require_shared

import dlc_jax as dlc
from dlc_jax.datasets.instructions import instructions, load_instructions
from dlc_jax.datasets.layouts import Reading
from dlc_jax.exports.instructions import write_rows_jsonl

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


def save(table, folder, **state):
    """Writes what `datasets.save_to_disk` does."""
    folder.mkdir(parents=True)
    with pa.ipc.new_stream(str(folder / "data-00000-of-00001.arrow"), table.schema) as writer:
        writer.write_table(table)
    files = [{"filename": "data-00000-of-00001.arrow"}]
    (folder / "state.json").write_text(json.dumps({"_data_files": files, **state}))


def local_copies(root, rows):
    """Returns sources of every form that a data set of the hub has in a folder."""
    table = pa.Table.from_pylist(rows)
    other = pa.Table.from_pylist([WITH_INPUT])
    (root / "repository" / "data").mkdir(parents=True)
    for part, some in enumerate((table[:2], table[2:])):
        pq.write_table(some, root / f"repository/data/train-0000{part}-of-00002.parquet")
    pq.write_table(other, root / "repository/data/test-00000-of-00001.parquet")
    (root / "converted/default/train").mkdir(parents=True)  # as in refs/convert/parquet
    pq.write_table(table, root / "converted/default/train/0000.parquet")
    save(table, root / "dictionary/train")
    save(other, root / "dictionary/test")
    save(table, root / "saved", _split="train")
    names = ("repository", "converted", "dictionary", "saved")
    return [f"hf:{root}/{name}/train" for name in names]


def test_every_source_gives_the_same(tmp_path):
    rows = [PLAIN, WITH_INPUT, PLAIN]
    (tmp_path / "a.jsonl").write_text("".join(f"{json.dumps(row)}\n\n" for row in rows))
    (tmp_path / "a.json").write_text(json.dumps(rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    sources = [f"{kind}:{tmp_path}" for kind in ("jsonl", "json", "parquet")]
    found = [dlc.load_instructions(source) for source in [*sources, *local_copies(tmp_path, rows)]]
    assert len(found) == 7
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


@pytest.mark.parametrize("revision", [None, "refs/convert/parquet"])
def test_the_hub_is_asked_for_the_files_of_a_split(tmp_path, monkeypatch, revision):
    """A repository with Parquet files, and one of other files, which the hub converted."""
    local_copies(tmp_path, [PLAIN, WITH_INPUT])
    folder = tmp_path / ("repository" if revision is None else "converted")
    asked = []

    def list_repo_files(repository, *, repo_type, revision):
        asked.append((repository, repo_type, revision))
        if asked[-1][2] != wanted:
            return ["README.md", "train.json", "train/0001.json", "train/README.md"]
        return [
            "train/README.md",
            *(path.relative_to(folder).as_posix() for path in folder.rglob("*.parquet")),
        ]

    def hf_hub_download(repository, name, *, repo_type, revision):
        asked.append((repository, repo_type, revision))
        return str(folder / name)

    wanted = revision
    monkeypatch.setattr(huggingface_hub, "list_repo_files", list_repo_files)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    data = dlc.load_instructions("hf:owner/name/train")
    assert data.rows == (PLAIN, WITH_INPUT)
    assert data.name == "hf:owner/name/train"
    assert asked[-1] == ("owner/name", "dataset", revision)


def test_a_hub_that_cannot_be_reached_says_what_to_do(monkeypatch):
    def list_repo_files(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(huggingface_hub, "list_repo_files", list_repo_files)
    with pytest.raises(ValueError, match=r"could it be fetched .*no route.* give hf:<folder>/<spl"):
        dlc.load_instructions("hf:yahma/alpaca-cleaned/train")


def test_the_bundled_rows_are_two_parts():
    train, test = (dlc.load_instructions(f"demo:dolly/{part}") for part in ("train", "test"))
    assert (len(train), len(test)) == (400, 100)
    assert not set(train.ids) & set(test.ids)
    assert all("### Response:\n" in prompt for prompt in train.prompts + test.prompts)
    with pytest.raises(ValueError, match="valid: dolly/train, dolly/test"):
        dlc.load_instructions("demo:dolly")


def test_the_bundled_files_fit_and_are_readable():
    folder = ROOT / "dlc_jax" / "datasets" / "instructions_sample"
    files = [file for file in folder.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 8e6
    assert all(file.stat().st_mode & 0o044 == 0o044 for file in files)
    for part, num in (("dev", 5), ("test", 25)):
        tables = sorted((folder / "mmlu" / part).glob(f"*_{part}.csv"))
        assert len(tables) == 8
        for table in tables:
            with open(table, newline="") as file:
                rows = list(csv.DictReader(file))
            assert len(rows) == num
            assert all(row["answer"] in "0123" and row["choice3"] for row in rows)


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
        ("a.parquet", b"PAR1", "not a readable Parquet file"),
    ],
)
def test_damaged_files_are_refused(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=says):
        dlc.load_instructions(f"{name.partition('.')[2]}:{tmp_path / name}")


def test_tables_with_two_columns_of_a_name_are_refused(tmp_path):
    table = pa.table([["a"], ["b"]], names=["prompt", "prompt"])
    pq.write_table(table, tmp_path / "train.parquet")
    for source in (f"parquet:{tmp_path}", f"hf:{tmp_path}/train"):
        with pytest.raises(ValueError, match="different names, found prompt, prompt"):
            dlc.load_instructions(source)


def test_dates_of_a_table_are_text_in_lines(tmp_path):
    rows = [{"prompt": "a", "response": "b", "when": datetime.date(2024, 2, 1)}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    data = load_instructions(f"parquet:{tmp_path}/rows.parquet")
    write_rows_jsonl(data, tmp_path / "rows.jsonl")
    assert json.loads((tmp_path / "rows.jsonl").read_text())["when"] == "2024-02-01"


def test_sources_that_are_not_there():
    with pytest.raises(ValueError, match="expected hf:<owner/name or folder>/<split>"):
        dlc.load_instructions("hf:train")
    with pytest.raises(ValueError, match="no folder '/absent/folder', and that is no hub id"):
        dlc.load_instructions("hf:/absent/folder/train")
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


@pytest.mark.parametrize("row", [PLAIN, WRAPPED])
@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("System", "Be brief."),
        ("documents", ["Egypt"]),
        ("context", "Egypt"),
        ("functions", '[{"name": "search"}]'),
        ("images", [b"png"]),
    ],
)
@pytest.mark.parametrize("template", [None, "chat"])
def test_context_that_a_template_leaves_out_is_refused_by_name(row, column, value, template):
    if template is None:
        empty = [{**row, column: none} for none in (None, "", [], "[]")]
        assert instructions(empty).prompts == instructions([row]).prompts * 4
    with pytest.raises(ValueError, match=f"1 have '{column}', which template .*: row 2"):
        instructions([row, {**row, column: value}], template)


@pytest.mark.parametrize(
    ("row", "column", "value"),
    [
        (WRAPPED, "system", "Be brief."),
        (WRAPPED, "history", [["Hi", "Hello"]]),
        (PLAIN, "tools", '[{"name": "search"}]'),
        (WRAPPED, "tools", [{"name": "search"}]),
    ],
)
def test_context_that_text_has_no_place_for_is_refused(row, column, value):
    with pytest.raises(ValueError, match=f"1 have '{column}', which template .*: row 2"):
        instructions([row, {**row, column: value}])


def test_a_system_prompt_opens_alpacas_template():
    data = instructions([{**WITH_INPUT, "system": "Be brief."}, {**PLAIN, "system": None}])
    assert data.prompts[0] == (
        "Be brief.\n\n### Instruction:\nTranslate.\n\n### Input:\nFluss\n\n### Response:\n"
    )
    assert data.prompts[1] == instructions([PLAIN]).prompts[0]
    assert data.rows[0]["system"] == "Be brief."
    row = {"system_prompt": "Be brief.", "question": "Fluss?", "response": "river"}
    assert instructions([row]).prompts[0].startswith("Be brief.\n\n### Instruction:\nFluss?")
    with pytest.raises(ValueError, match=r"1 have several turns, .*=chat: row 2"):
        instructions([PLAIN, {**PLAIN, "history": [["Hi", "Hello."]]}])


def test_context_of_dolly_is_the_input():
    row = {"instruction": "Translate.", "context": "Fluss", "response": "river"}
    data = instructions([row])
    assert (data.layout, data.prompts) == ("dolly", instructions([WITH_INPUT]).prompts)


def test_columns_are_called_by_the_names_of_layouts():
    rows = [{"q": "Name a river.", "a": "The Nile.", "uid": "x", "prompt": 3}]
    data = instructions(rows, columns="prompt=q,response=a,id=uid")
    assert (data.prompts, data.responses) == (("Name a river.",), ("The Nile.",))
    assert (data.ids.tolist(), data.rows, data.layout) == (["x"], tuple(rows), "prompt")
    named = instructions(rows, columns="instruction=q, output=a")
    assert named.prompts == instructions([PLAIN]).prompts
    # a name that is used otherwise is not read, and tools of another name are found
    taken = [{"prompt": "Name a river.", "response": "a", "tools": ["x"]}]
    with pytest.raises(ValueError, match="1 have 'tools', which"):
        instructions(taken, columns="completion=response,prompt=prompt")


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ("prompt=q,response=b", "1 have no text in column 'response': row 2"),
        ("prompt=q,response=c", "no row has column 'c'; found q, a, b"),
        ("prompt=q,response=q", "columns: expected different names, such as 'prompt=question,"),
        ("prompt=q,prompt=a", "expected different names"),
        ("prompt", "expected different names"),
        ("prompt=", "expected different names"),
        ("", "expected different names"),
        ("promt=q,response=a", "columns: name: unknown value 'promt'; .*'prompt'"),
    ],
)
def test_columns_that_are_no_list_of_names_are_refused(columns, says):
    rows = [{"q": "a", "a": "b", "b": "c"}, {"q": "a", "a": "b"}]
    with pytest.raises(ValueError, match=says):
        instructions(rows, columns=columns)


@pytest.mark.parametrize("row", [WRAPPED, {"question": "a", "answer": "b"}])
def test_an_input_that_a_layout_has_no_place_for_is_refused(row):
    with pytest.raises(ValueError, match="1 have 'input', which template .*: row 1"):
        instructions([{**row, "input": "Bonjour"}])


def test_a_column_in_the_place_of_one_that_is_filled_is_refused():
    rows = [{**PLAIN, "bg": "Egypt"}, {**WITH_INPUT, "bg": "Rhine"}, PLAIN]
    assert "Egypt" in instructions(rows[:1] + rows[2:], columns="input=bg").prompts[0]
    with pytest.raises(ValueError, match="1 have 'input', in the place of which 'bg' .*: row 2"):
        instructions(rows, columns="input=bg")


def test_columns_that_a_layout_does_not_read_are_refused():
    rows = [{"q": "a", "r": "b", "inp": "c"}]
    with pytest.raises(ValueError, match="template 'prompt' has no column input; expected names"):
        instructions(rows, columns="prompt=q,response=r,input=inp")
    reading = Reading()
    object.__setattr__(reading, "columns", 5)  # which the tests' check of types lets nobody give
    with pytest.raises(ValueError, match=r"columns: expected text or None, got 5"):
        reading.check()


def test_rows_are_named_on_one_line():
    for name, place in (("x\ny", r"x\\ny"), ("", "row 1"), (None, "row 1")):
        with pytest.raises(ValueError, match=f"empty response: {place}.$"):
            instructions([{"id": name, **PLAIN, "output": ""}])
    with pytest.raises(ValueError, match=r"^rows \(columns prompt=q,response=r\): 1 have no text"):
        instructions([{"q": None, "r": "x"}], columns="prompt=q,response=r")


def test_unknown_columns_are_answered_with_a_line_to_paste():
    rows = [{"id": "1", "topic": 3, "query": "Name a river.", "reply": "The Nile."}]
    with pytest.raises(ValueError, match="columns id, topic, query, reply fit no") as refused:
        instructions(rows)
    (line,) = re.findall(r'--config\.dataset\.columns="(.*)"', str(refused.value))
    assert instructions(rows, columns=line).prompts == ("Name a river.",)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("Q: a", "1 have no response marker 'A:' in column 'text': row 2"),
        ("Q: a A: b A: c", "1 have the response marker 'A:' more than once .*: row 2"),
        ("Q: a A: \n", "1 have an empty response: row 2"),
        (3, "1 have no text in column 'text': row 2"),
    ],
)
def test_texts_whose_response_cannot_be_told_are_refused(text, says):
    good = {"text": "Q: a A: b", "prompt": "unused"}
    data = instructions([good], response_marker="A:")
    assert (data.prompts, data.responses) == (("Q: a A:",), (" b",))
    with pytest.raises(ValueError, match=says):
        instructions([good, {"text": text}], response_marker="A:")


def test_a_marker_goes_with_a_column_of_text():
    with pytest.raises(ValueError, match="response_marker: missing; template 'text' needs"):
        instructions([{"text": "a"}], "text")
    with pytest.raises(ValueError, match="response_marker: missing"):
        instructions([{"text": "a"}], response_marker="")
    with pytest.raises(ValueError, match="response_marker: is of the column 'text'"):
        instructions([PLAIN], "alpaca", response_marker="A:")
    with pytest.raises(ValueError, match="turns: unknown value 'final'"):
        instructions([PLAIN], turns="final")


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("a.jsonl", "jsonl:{}/a.jsonl"),
        ("a.json", "json:{}/a.json"),
        ("a.parquet", "parquet:{}/a.parquet"),
        ("train-0.parquet", "hf:{}/train"),
        ("data.arrow", "hf:{}/train"),
    ],
)
def test_files_without_an_end_are_refused(tmp_path, name, source):
    os.mkfifo(tmp_path / name)
    if name == "data.arrow":
        (tmp_path / "state.json").write_text('{"_data_files": [{"filename": "data.arrow"}]}')
    with pytest.raises(ValueError, match=f"{name}.*: not a regular file"):
        dlc.load_instructions(source.format(tmp_path))
