"""Instructions by the command, in its own process, beside a torchvision that is broken."""

import csv
import gzip
import json
import os
import re
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
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        chat_template="<s>{% for message in messages %}{{ message['role'] }}: "
        "{{ message['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}",
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
    # one that was built for another torch stops transformers unless it is hidden
    broken = folder / "path" / "torchvision"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise RuntimeError('operator torchvision::nms')")
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


@pytest.mark.slow
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


@pytest.mark.long
def test_mode_official_scores_selects_and_trains_as_the_functions_do(place, tmp_path):
    official = ["--config.mode=official", "--config.selection.methods=('flexrand', 'random')"]
    official += ["--config.selection.keep_fractions=0.5", "--config.selection.splits=0.25,0.75"]
    said = run(place, tmp_path, *official, code=2)
    official += re.search("expected the defaults, (.*)[.]", said)[1].split()
    said = run(place, tmp_path, *official)
    assert "24 rows of layout 'alpaca', read as text of the authors' released code" in said
    assert "score: masks 15 linear layers" in said  # 7 of each block, and the head
    data = dlc.load_instructions(f"jsonl:{place}/rows.jsonl", "released")
    model = dlc.load_language_model(str(place / "model"), dtype="float32")
    tokens = dlc.tokenise(data, model.tokenizer, 512, mode="official")
    probes = dlc.probe_responses(model, tokens, mode="official")
    table = pq.read_table(tmp_path / "scores" / "scores.parquet")
    assert table.column_names == ["id", "label", "class_name", "dlc"]
    np.testing.assert_allclose(table["dlc"].to_numpy(), dlc.score(probes), rtol=1e-6)
    cell = {"keep_fraction": 0.5, "split": 0.75, "mode": "official", "kind": "instructions"}
    kept = dlc.selection.Candidates(dlc.score(probes), probes.labels).select(**cell)
    lines = (tmp_path / "exports/flexrand/keep_0.50-split_0.75-seed_0/kept.jsonl").read_text()
    assert [json.loads(line) for line in lines.splitlines()] == [ROWS[i] for i in kept.indices]
    tuned = ["--config.stages=finetune", "--config.lora.batch_size=4", "--config.lora.dropout=0.05"]
    tuned += ["--config.lora.optimiser=adamw", "--config.lora.learning_rate=1e-3"]
    tuned += ["--config.lora.warmup_steps=1", "--config.lora.epochs=1", "--config.lora.rank=2"]
    tuned += ["--config.lora.full_set=False", f"--config.dataset.test=jsonl:{place}/rows.jsonl"]
    lengths = [len(row) for row in tokens.tokens]
    tuned += [f"--config.encoder.max_length={max(lengths)}"]  # which cuts the ends behind them
    assert "score: unchanged" in run(place, tmp_path, *official, "--config.seed=5")
    assert not (tmp_path / "scores/certificate.json").exists()
    assert "lora.loss_on: mode 'official'" in run(place, tmp_path, *official, *tuned, code=2)
    whole = ["--config.lora.loss_on=text", "--config.lora.drop_last=True"]
    said = run(place, tmp_path, *official, *tuned, *whole)
    assert re.search(r"note: \d+ of 24 training samples are cut off", said)
    config = (tmp_path / "finetune/random/keep_0.50-seed_0/adapter/adapter_config.json").read_text()
    assert json.loads(config)["lora_dropout"] == 0.05
    short = f"--config.encoder.max_length={max(lengths) - 1}"
    said = run(place, tmp_path, *official, *tuned, *whole, short, code=2)
    assert "samples do not fit at max_length" in said
    said = run(place, tmp_path, *official, "--config.stages=plan,score")
    assert "losses, unmasked and masked" in said


@pytest.mark.slow
def test_chat_templates_and_variants_of_scores_select(place, tmp_path):
    run(
        place,
        tmp_path,
        "--config.dataset.template=chat",
        "--config.selection.score=ifd",
        "--config.selection.variant=superfiltering",
        "--config.selection.keep_fractions=0.5",
    )
    text = (tmp_path / "scores" / "easiest_hardest.md").read_text()
    assert "> assistant:\n" in text
    assert "### Response" not in text
    manifest = json.loads((tmp_path / "selections/hardest/keep_0.50-seed_0.json").read_text())
    assert manifest["how"]["score"] == "ifd_superfiltering"
    table = pq.read_table(tmp_path / "scores" / "scores.parquet")
    hardest = np.argsort(-table["ifd_superfiltering"].to_numpy(), kind="stable")[:12]
    kept = np.load(tmp_path / "selections/hardest/keep_0.50-seed_0.npy")
    assert kept.tolist() == sorted(hardest.tolist())
    lines = (tmp_path / "exports/hardest/keep_0.50-seed_0/kept.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [ROWS[i] for i in kept]


@pytest.mark.slow
def test_compressed_talks_are_scored_and_written_for_trainers(place, tmp_path):
    """Of ShareGPT's layout in two shards, all turns; the file for trainers is read as it is."""
    talks = [
        {
            "conversations": [
                {"from": speaker, "value": text}
                for pair in ROWS[i : i + 2]
                for speaker, text in (("human", pair["instruction"]), ("gpt", pair["output"]))
            ]
        }
        for i in range(0, 24, 2)
    ]
    (tmp_path / "shards").mkdir()
    for part in range(2):
        with gzip.open(tmp_path / f"shards/train-{part}.jsonl.gz", "wt") as file:
            file.writelines(f"{json.dumps(row)}\n" for row in talks[6 * part : 6 * part + 6])
    source = f"--config.dataset.train=jsonl:{tmp_path}/shards/train-*.jsonl.gz"
    said = run(
        place,
        tmp_path / "work",
        source,
        "--config.dataset.turns=all",
        "--config.selection.methods=('easiest',)",
        "--config.selection.keep_fractions=0.5",
        "--config.export.forms=jsonl,trl",
    )
    assert "12 rows of layout 'sharegpt', read in the tokenizer's chat template" in said
    assert "no column ifd, ifd_superfiltering, ifd_cherry, ifd_t_shirt: ifd: compares" in said
    folder = tmp_path / "work/exports/easiest/keep_0.50-seed_0"
    kept = [json.loads(line) for line in (folder / "kept.jsonl").read_text().splitlines()]
    assert len(kept) == 6
    assert all(row in talks for row in kept)
    roles = {"human": "user", "gpt": "assistant"}
    expected = [
        {
            "messages": [
                {"role": roles[turn["from"]], "content": turn["value"]}
                for turn in row["conversations"]
            ]
        }
        for row in kept
    ]
    lines = (folder / "kept.trl.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == expected
    # a layout that is none leaves nothing behind
    (tmp_path / "rows.jsonl").write_text('{"q": "a", "a": "b"}\n')
    source = f"--config.dataset.train=jsonl:{tmp_path}/rows.jsonl"
    said = run(place, tmp_path / "other", source, code=2)
    assert '--config.dataset.columns="prompt=q,response=a"' in said
    assert not (tmp_path / "other/scores").exists()
    columns = "--config.dataset.columns=prompt=q,response=a"
    assert "1 rows of layout 'prompt', read as text" in run(
        place, tmp_path / "other", source, columns, "--config.stages=('score',)"
    )


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--config.selection.methods=el2n",), "instructions have no record of training"),
        (("--config.selection.methods=rds",), "selection.target: is what method 'rds' selects by"),
        (("--config.stages=tune",), "stages: unknown value 'tune'"),
        (("--config.dataset.category=topic",), "no text in column 'topic'"),
        (("--config.dataset.template=prompt",), "no text in column 'prompt'"),
        (("--config.encoder.max_length=513",), "max_length"),
        (("--config.encoder.max_length=20",), "have no response left at max_length 20"),
        (("--config.encoder.weights=/there/is/none",), "no folder"),
        (("--config.selection.variant=superfiltering",), "is a variant of none of the methods"),
        (("--config.selection.variant=superfilter",), "Did you mean 'superfiltering'"),
        (("--config.encoder.name=resnet18", "--config.selection.score=ifd"), "is of instructions"),
    ],
)
def test_mistakes_end_in_one_clear_line(place, tmp_path, arguments, says):
    said = run(place, tmp_path, *arguments, code=2)
    assert says in said
    assert len([line for line in said.splitlines() if line.startswith("error: ")]) == 1


def write_mmlu(folder):
    """Two subjects of different groups, five solved and four open questions each."""
    header = "question,choice0,choice1,choice2,choice3,answer\n"
    for subject in ("philosophy", "anatomy"):
        for part, num in (("dev", 5), ("test", 4)):
            (folder / part).mkdir(parents=True, exist_ok=True)
            rows = [f"What is {i} and {i}?,{i},{2 * i},{3 * i},{4 * i},1\n" for i in range(1, num)]
            rows.append(f"What of {subject}?,red,blue,green,{part},3\n")
            (folder / part / f"{subject}_{part}.csv").write_text(header + "".join(rows))


LORA = (
    "--config.selection.methods=flexrand,random",
    "--config.selection.keep_fractions=0.5",
    "--config.lora.optimiser=adamw",
    "--config.lora.learning_rate=0.02",
    "--config.lora.warmup_steps=1",
    "--config.lora.batch_size=8",
    "--config.lora.dtype=float32",
)


@pytest.mark.long
def test_adapters_are_trained_and_asked(place, tmp_path):
    """Score, select, fine-tune, evaluate and report in one go, and what the functions give."""
    write_mmlu(tmp_path / "mmlu")
    work = tmp_path / "work"
    arguments = (
        "--config.stages=score,select,finetune,evaluate,report",
        f"--config.dataset.test=jsonl:{place}/rows.jsonl",
        f"--config.evaluation.mmlu=mmlu:{tmp_path}/mmlu",
        *LORA,
    )
    said = run(place, work, *arguments)
    assert "finetune: 3/3" in said
    assert "evaluate: 4/4" in said
    with open(work / "results.csv", newline="") as file:
        rows = {row["method"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["base", "full", "random", "flexrand"]
    assert [rows[name]["num_kept"] for name in rows] == ["0", "24", "12", "12"]
    losses = {name: float(rows[name]["test_loss"]) for name in rows if name != "base"}
    model = dlc.load_language_model(str(place / "model"), dtype="float32")
    tokens = dlc.tokenise(dlc.load_instructions(f"jsonl:{place}/rows.jsonl"), model.tokenizer, 512)

    def test_loss(model):
        found = dlc.response_losses(model, tokens)
        return np.average(found, weights=tokens.num_response)

    assert losses["full"] < losses["random"] < test_loss(model)
    mmlu = dlc.load_mmlu(f"mmlu:{tmp_path}/mmlu")
    for name, folder in (("full", "full/keep_1.00-seed_0"), ("random", "random/keep_0.50-seed_0")):
        run_folder = work / "finetune" / folder
        tuned = dlc.load_adapter(model, run_folder / "adapter")
        assert test_loss(tuned) == pytest.approx(losses[name], abs=1e-5)
        asked = dlc.evaluate_mmlu(tuned, mmlu)
        assert float(rows[name]["test_accuracy"]) == pytest.approx(asked.accuracy)
        assert float(rows[name]["humanities"]) == pytest.approx(asked.by_group["humanities"])
        assert float(rows[name]["stem"]) == pytest.approx(asked.by_group["stem"])
    asked = dlc.evaluate_mmlu(model, mmlu)
    assert float(rows["base"]["test_accuracy"]) == pytest.approx(asked.accuracy)
    table = (work / "report" / "results.md").read_text()
    assert "3 of the 3 runs asked for are finished" in table
    assert f"{losses['full']:.4f}" in table

    again = run(place, work, *arguments, "--config.lora.merge=True")
    assert "3 runs were finished before, not run again" in again
    assert "of 8 questions" not in again
    merged = dlc.load_language_model(
        str(work / "finetune/random/keep_0.50-seed_0/merged"), dtype="float32"
    )
    assert test_loss(merged) == pytest.approx(losses["random"], abs=1e-4)
    merged.tokenizer("it has one")

    # accuracies with other examples in the prompt do not stand beside each other
    ask = ("--config.stages=evaluate", f"--config.evaluation.mmlu=mmlu:{tmp_path}/mmlu")
    some = ("--config.selection.methods=random", "--config.evaluation.num_shots=3")
    run(place, work, *ask, *LORA[1:], *some)
    with open(work / "results.csv", newline="") as file:
        rows = {row["method"]: row for row in csv.DictReader(file)}
    assert [name for name in rows if not rows[name]["test_accuracy"]] == ["flexrand"]
    others = [option for option in LORA if "dtype" not in option]
    said = run(place, work, *ask, *others, "--config.lora.dtype=bfloat16", code=2)
    assert "expected encoder.weights and lora.dtype as in the stage 'finetune'" in said

    changed = run(place, work, *arguments, "--config.lora.epochs=1", "--config.lora.rank=2")
    assert "3 runs of other settings or scores moved to superseded/" in changed
    with open(work / "results.csv", newline="") as file:
        rows = {row["method"]: row for row in csv.DictReader(file)}
    assert float(rows["full"]["test_loss"]) > losses["full"]


@pytest.mark.slow
def test_stages_that_miss_something_say_what(place, tmp_path):
    said = run(place, tmp_path, "--config.stages=evaluate", code=2)
    assert "evaluation.mmlu: missing" in said
    write_mmlu(tmp_path / "mmlu")
    mmlu = f"--config.evaluation.mmlu=mmlu:{tmp_path}/mmlu"
    all_of_it = "--config.stages=score,select,finetune,evaluate"
    six = "--config.evaluation.num_shots=6"
    said = run(place, tmp_path / "other", all_of_it, mmlu, six, code=2)
    assert "anatomy_dev.csv: found 5 rows, expected at least 6" in said
    run(place, tmp_path / "work", "--config.stages=score,select", *LORA)
    said = run(place, tmp_path / "work", "--config.stages=evaluate", mmlu, *LORA, code=2)
    assert "none of 3 runs is finished" in said
    said = run(
        place,
        tmp_path / "other",
        "--config.stages=score,select,finetune",
        "--config.dataset.test=jsonl:/there/is/none.jsonl",
        code=2,
    )
    assert "/there/is/none.jsonl" in said
    assert not (tmp_path / "other" / "scores").exists()
    run(place, tmp_path / "work", "--config.stages=finetune", *LORA)
    said = run(place, tmp_path / "work", "--config.stages=report", *LORA, code=2)
    assert "no run has a test_accuracy; run the stage 'evaluate' first" in said
