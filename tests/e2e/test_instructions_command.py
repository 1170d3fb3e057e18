"""Instructions by the command, in its own process: score, select, export."""

import json
import os
import subprocess
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import ROOT
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

import dlc_jax as dlc

ROWS = [
    {
        "instruction": f"Add {i} to {i}.",
        "input": "" if i % 3 else "Be brief.",
        "output": f"It is {2 * i}.",
    }
    | {"kind": "odd" if i % 2 else "even"}
    for i in range(24)
]


@pytest.fixture(scope="module")
def place(timm, tmp_path_factory):
    """A folder with rows, and a small random model with its tokenizer."""
    import torch
    import transformers

    folder = tmp_path_factory.mktemp("instructions")
    (folder / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in ROWS))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([row["instruction"] for row in ROWS], trainer)
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>"
    )
    wrapped.save_pretrained(folder / "model")
    torch.manual_seed(0)
    config = transformers.MistralConfig(
        vocab_size=len(wrapped),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=16,
        max_position_embeddings=512,
    )
    transformers.MistralForCausalLM(config).save_pretrained(folder / "model")
    # a torchvision that does not fit torch stops transformers; the command needs neither
    (folder / "path").mkdir()
    (folder / "path" / "sitecustomize.py").write_text(
        "import sys; sys.modules['torchvision'] = None"
    )
    return folder


def run(place, workdir, *arguments, code=0):
    command = [sys.executable, "-m", "dlc_jax.main", "--config=configs/instructions.py"]
    command += [f"--workdir={workdir}", f"--config.encoder.weights={place}/model"]
    command += [f"--config.dataset.train=jsonl:{place}/rows.jsonl", "--config.probe.num_probes=3"]
    command += ["--config.probe.dtype=float32"]
    environment = os.environ | {"PYTHONPATH": str(place / "path")}
    done = subprocess.run(
        [*command, *arguments], cwd=ROOT, capture_output=True, text=True, env=environment
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_what_the_command_leaves_is_what_the_functions_give(place, tmp_path):
    said = run(place, tmp_path)
    assert "24 instructions" in said
    assert "(scores/scores.parquet, scores/easiest_hardest.md, selections/)" in said
    data = dlc.load_instructions(f"jsonl:{place}/rows.jsonl")
    model = dlc.load_language_model(str(place / "model"), dtype="float32")
    tokens = dlc.tokenise(data, model.tokenizer, 512)
    probes = dlc.probe_responses(model, tokens, num_probes=3)
    responses = dlc.measure_responses(model, data)
    table = pq.read_table(tmp_path / "scores" / "scores.parquet")
    assert table["id"].to_pylist() == data.ids.tolist()
    np.testing.assert_allclose(table["dlc"].to_numpy(), dlc.score(probes), rtol=1e-6)
    for name, variant in (
        ("perplexity", "published"),
        ("ifd", "published"),
        ("length", "published"),
    ):
        expected = dlc.score(responses, method=name, variant=variant)
        np.testing.assert_allclose(table[name].to_numpy(), expected, rtol=1e-5, err_msg=name)
    np.testing.assert_allclose(
        table["ifd_superfiltering"].to_numpy(),
        np.exp(responses.losses - responses.alone),
        rtol=1e-5,
    )
    kept = dlc.select(dlc.score(probes), probes.labels, method="easiest", keep_fraction=0.5)
    lines = (tmp_path / "exports/easiest/keep_0.50-seed_0/kept.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [ROWS[i] for i in kept.indices]
    text = (tmp_path / "scores" / "easiest_hardest.md").read_text()
    easiest = ROWS[int(np.argmin(dlc.score(probes)))]
    assert text.index(easiest["output"]) < text.index("# Hardest")
    again = run(place, tmp_path)
    assert "score: unchanged" in again


def test_categories_are_classes_and_other_scores_select(place, tmp_path):
    run(
        place,
        tmp_path,
        "--config.dataset.category=kind",
        "--config.selection.score=length",
        "--config.selection.allocation=nucs",
        "--config.export.forms=parquet",
    )
    manifest = json.loads((tmp_path / "selections/hardest/keep_0.50-seed_0.json").read_text())
    assert manifest["how"]["score"] == "length"
    assert {name: part["samples"] for name, part in manifest["per_class"].items()} == {
        "even": 12,
        "odd": 12,
    }
    rows = pq.read_table(tmp_path / "exports/hardest/keep_0.50-seed_0/kept.parquet").to_pylist()
    assert len(rows) == 12
    assert all(row in ROWS for row in rows)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--config.selection.methods=herding",), "neither features nor a record"),
        (("--config.stages=finetune",), "stages: unknown value 'finetune'"),
        (("--config.dataset.category=topic",), "no text in column 'topic'"),
        (("--config.dataset.template=prompt",), "no text in column 'prompt'"),
        (("--config.encoder.max_length=513",), "max_length"),
        (("--config.encoder.max_length=20",), "have no response left at max_length 20"),
        (("--config.encoder.weights=/there/is/none",), "no folder"),
        (("--config.encoder.name=resnet18", "--config.selection.score=ifd"), "is of instructions"),
    ],
)
def test_mistakes_end_in_one_clear_line(place, tmp_path, arguments, says):
    said = run(place, tmp_path, *arguments, code=2)
    assert says in said
    assert len([line for line in said.splitlines() if line.startswith("error: ")]) == 1
