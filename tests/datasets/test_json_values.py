"""Strict JSON: what other programs could not read is neither read nor written."""

import decimal
import json
import math

import numpy as np
import pytest

import dlc_jax as dlc
from dlc_jax.datasets.instructions import instructions
from dlc_jax.exports.instructions import write_rows_jsonl, write_rows_parquet
from dlc_jax.training.loop import read_metrics, write_metrics
from dlc_jax.workspace import artefacts


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("NaN", "a number that is NaN or infinite"),
        ("-Infinity", "a number that is NaN or infinite"),
        ("1e999", "a number that is NaN or infinite"),
        ('{"deep": [1, [Infinity]]}', "a number that is NaN or infinite"),
        ("18446744073709551616", "an integer beyond 64 bits"),
        ("-9223372036854775809", "an integer beyond 64 bits"),
        ("[1" + "0" * 5000 + "]", "an integer beyond 64 bits"),
        ('"half \\ud800"', "half of a surrogate pair"),
        ('{"\\udc00": 1}', "half of a surrogate pair"),
    ],
)
def test_what_strict_json_has_not_is_refused_by_row(tmp_path, value, says):
    good = '{"prompt": "a", "response": "b", "more": 1}'
    bad = good.replace("1}", f"{value}}}")
    (tmp_path / "x.jsonl").write_text(f"{good}\n\n{bad}\n")
    with pytest.raises(dlc.InputError, match=f"x.jsonl, line 3: column 'more' holds {says}"):
        dlc.load_instructions(f"jsonl:{tmp_path}/x.jsonl")
    (tmp_path / "x.json").write_text(f"[{good}, {bad}]")
    with pytest.raises(dlc.InputError, match=f"x.json, entry 2: column 'more' holds {says}"):
        dlc.load_instructions(f"json:{tmp_path}/x.json")


def test_keys_that_are_there_twice_are_refused_by_row(tmp_path):
    good, bad = (
        '{"prompt": "a", "response": "b"}',
        '{"prompt": "a", "response": "b", "prompt": "c"}',
    )
    (tmp_path / "x.jsonl").write_text(f"{good}\n{bad}\n")
    with pytest.raises(dlc.InputError, match="x.jsonl, line 2 .*the key 'prompt' is there twice"):
        dlc.load_instructions(f"jsonl:{tmp_path}/x.jsonl")
    (tmp_path / "x.json").write_text(f"[{good}, {bad}]")
    with pytest.raises(dlc.InputError, match="x.json: .*the key 'prompt' is there twice"):
        dlc.load_instructions(f"json:{tmp_path}/x.json")


@pytest.mark.parametrize("name", ["jsonl", "json"])
def test_deep_nesting_is_one_line(tmp_path, name):
    def load(depth: int) -> dlc.datasets.instructions.Instructions:
        row = f'{{"prompt": "a", "response": "b", "more": {"[" * depth}{"]" * depth}}}'
        (tmp_path / f"x.{name}").write_text(row if name == "jsonl" else f"[{row}]")
        return dlc.load_instructions(f"{name}:{tmp_path}/x.{name}")

    assert len(load(100)) == 1
    for depth in (900, 5000):
        with pytest.raises(dlc.InputError, match=r"^.*x\.json.*(RecursionError|too many).*$"):
            load(depth)


def test_numbers_of_64_bits_and_whole_pairs_are_read_and_exported(tmp_path):
    more = ["18446744073709551615", "-9223372036854775808", "1e-400", '"\\ud83e\\udd99"', "true"]
    lines = [
        f'{{"id": "{i}", "prompt": "a", "response": "b", "c{i}": {value}}}'
        for i, value in enumerate(more)
    ]
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    data = dlc.load_instructions(f"jsonl:{tmp_path}/x.jsonl")
    expected = [2**64 - 1, -(2**63), 0.0, "🦙", True]
    assert [row[f"c{i}"] for i, row in enumerate(data.rows)] == expected
    write_rows_jsonl(data, tmp_path / "y.jsonl")
    assert dlc.load_instructions(f"jsonl:{tmp_path}/y.jsonl").rows == data.rows
    write_rows_parquet(data, tmp_path / "y.parquet")
    back = dlc.load_instructions(f"parquet:{tmp_path}/y.parquet").rows
    assert [row[f"c{i}"] for i, row in enumerate(back)] == expected


@pytest.mark.parametrize("value", [math.nan, math.inf, b"bytes", decimal.Decimal("1.5"), 10**30])
def test_no_line_is_written_that_is_no_json(tmp_path, value):
    rows = [{"id": "7", "prompt": "a", "response": "b", "more": value}]
    with pytest.raises(dlc.InputError, match="column 'more' of row '7' holds .*perhaps parquet"):
        write_rows_jsonl(instructions(rows), tmp_path / "x.jsonl")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [10**30, [1, "a"], {}, "\ud800", object()])
def test_no_table_is_written_of_what_has_no_type(tmp_path, value):
    rows = [{"id": "7", "prompt": "a", "response": "b", "more": value}]
    with pytest.raises(dlc.InputError, match="does not fit a table"):
        write_rows_parquet(instructions(rows), tmp_path / "x.parquet")
    assert not list(tmp_path.iterdir())


def refuse(name: str):
    raise AssertionError(f"{name} is no JSON")


def test_numbers_that_are_not_finite_are_written_as_null(tmp_path):
    value = {"a": [1.5, math.nan], "b": {"c": (math.inf, np.float32("-inf"))}, "d": np.int64(3)}
    artefacts.write_json(tmp_path / "x.json", value)
    found = json.loads((tmp_path / "x.json").read_text(), parse_constant=refuse)
    assert found == {"a": [1.5, None], "b": {"c": [None, None]}, "d": 3}


def test_a_run_that_diverged_leaves_json_and_is_read_back(tmp_path):
    history = [{"epoch": 1, "train_loss": math.nan}, {"epoch": 2, "train_loss": 0.5}]
    write_metrics(tmp_path, history)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    found = [json.loads(line, parse_constant=refuse) for line in lines]
    assert found == [{"epoch": 1, "train_loss": None}, {"epoch": 2, "train_loss": 0.5}]
    back = read_metrics(tmp_path)
    assert math.isnan(back[0].pop("train_loss"))
    assert back == [{"epoch": 1}, history[1]]
