"""What others rely on and what therefore stays, whatever is rebuilt behind it.

Names and formats below a work directory, commands, names and calls of the API, as README promises
them. A change here is a change for users: it belongs in CHANGELOG. `.ci/same_results` holds the
bytes of results, which one machine alone can compare.
"""

from __future__ import annotations

import ast
import csv
import dataclasses
import inspect
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import ROOT
from ml_collections import ConfigDict

import dlc_jax as dlc

NAMES = """
Compute Dataset Encoder FinetuneConfig FinetuneTrials ImageCache Images InputError Instructions
LanguageModel LinearProbeConfig LoraConfig PathSpec ProbeLosses RankCertificate RecordConfig
ResponseLosses Rules Run RunResult Sample Selection TrainingRecord Tuning
array_dataset certify evaluate_mmlu export features finetune finetune_lora keep_curve linear_probes
load_adapter load_dataset load_encoder load_instructions load_language_model load_mmlu make_mesh
measure_responses probe probe_responses record_training response_losses score select
stratified_split tokenise tune use_all_cores write_adapter write_merged
"""

CALLS = """
dlc.load_dataset("parquet:train.parquet")
dlc.load_dataset("demo:caltech15/train")
dlc.array_dataset(images, labels)
dlc.stratified_split(dataset, (80, 20))
dlc.load_encoder("resnet18", weights="timm/resnet18.tv_in1k")
dlc.Encoder(params, apply=apply, is_prunable=is_prunable, mean=(0.5,) * 3, std=(0.5,) * 3)
dlc.Encoder(params, apply=apply, is_prunable=is_prunable, apply_training=train,
            statistics=statistics, head="cls")
dlc.Encoder.from_module(nnx_module, is_prunable)
dlc.probe(encoder, dataset, image_size=64)
dlc.probe(encoder, dataset, schedule="linear", step=0.02, num_probes=50, masking="l1",
          image_size=224, seed=0)
dlc.probe(encoder, dataset, image_size=64, mode="official")
dlc.probe(encoder, dlc.Images(dataset, cache=dlc.ImageCache()), run=dlc.Run(folder="runs/mine"))
dlc.probe(encoder, dataset, run=dlc.Run(mesh=dlc.make_mesh()))
dlc.probe(encoder, dataset, image_size=64, path=dlc.PathSpec(), compute=dlc.Compute())
dlc.probe(encoder, dataset, num_probes="auto")
dlc.certify(probes)
dlc.make_mesh()
dlc.use_all_cores()
dlc.features(encoder, dataset, image_size=224)
dlc.score(probes)
dlc.score(record, method="el2n")
dlc.score(responses, method="ifd", variant="cherry")
dlc.select(scores, labels, keep_fraction=0.3, split=0.5, seed=1, ids=ids)
dlc.select(scores, labels, method="flexrand", keep_fraction=0.3, split=0.5, seed=1, mode="official")
dlc.select(scores, labels, method="auto", keep_fraction=0.3, tuning=tuning, features=feats)
dlc.select(None, labels, method="herding", keep_fraction=0.3, features=feats)
dlc.selection.Candidates(scores, labels)
dlc.selection.Candidates.select(candidates, method="flexrand", keep_fraction=0.3, split=0.5, seed=1)
dlc.tune(scores, labels, features=feats, keep_fractions=(0.1, 0.3, 0.5))
dlc.select(scores, labels, keep_fraction=0.3, rules=dlc.Rules(variant="deepcore"))
dlc.keep_curve(tuning, tolerance=5.0)
dlc.record_training(encoder, dataset, image_size=64, epochs=20, progress=True)
dlc.linear_probes(feats, labels, [kept], val_features=feats, val_labels=labels)
dlc.finetune(encoder, dataset, kept, test=test, epochs=50)
dlc.finetune(encoder, dataset, kept, test=test, image_size=64, epochs=20, batch_size=32,
             learning_rate=0.05, seed=1, folder="runs/mine")
dlc.finetune(encoder, dataset, kept, test=test, settings=dlc.FinetuneConfig(linear_probe=True))
dlc.export(dataset, kept, "kept.parquet", form="parquet", part="kept")
dlc.load_language_model("models/mistral-7b", dtype="bfloat16")
dlc.load_instructions("jsonl:train.jsonl")
dlc.tokenise(data, tokenizer, max_length=1024)
dlc.probe_responses(model, tokens, num_probes=8)
dlc.measure_responses(model, data)
dlc.finetune_lora(model, tokens, kept, optimiser="adamw", learning_rate=1e-4)
dlc.write_adapter(tuned, "adapter")
dlc.write_merged(tuned, "merged")
dlc.load_mmlu("mmlu:data/mmlu")
dlc.evaluate_mmlu(tuned, mmlu)
"""

# what the documents read from results
ATTRIBUTES = {
    "ProbeLosses": "losses sparsity labels ids prototypes class_names skipped",
    "Selection": "indices method keep_fraction split seed ids chosen",
    "RunResult": "test_accuracy num_kept weights predictions",
    "TrainingRecord": "probabilities labels ids",
    "Dataset": "labels ids class_names name fingerprint subset without_empty_classes empty_classes",
    "Instructions": "prompts responses ids subset",
    "Encoder": "params apply is_prunable mean std head apply_training statistics from_module",
    "LanguageModel": "tokenizer",
}

EXAMPLE = """
probes = dlc.probe(encoder, dataset, schedule="linear", step=0.02, num_probes=3, masking="l1",
                   image_size=32, seed=0)
losses, sparsity, labels, ids = probes.losses, probes.sparsity, probes.labels, probes.ids
prototypes = probes.prototypes
feats = dlc.features(encoder, dataset, image_size=32)
scores = dlc.score(probes)
kept = dlc.select(scores, dataset.labels, method="flexrand", keep_fraction=0.3, split=0.5, seed=1)
result = dlc.finetune(encoder, dataset, kept, test=test, epochs=1, image_size=32)
accuracy = result.test_accuracy
"""

DEFAULTS = json.loads((ROOT / "tests/golden/data/defaults.json").read_text())


def test_names_of_the_api_are_there():
    assert set(NAMES.split()) <= set(dlc.__all__)


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_results_have_what_is_read_from_them(name):
    kind = getattr(dlc, name)
    there = {*dir(kind), *(field.name for field in dataclasses.fields(kind))}
    assert set(ATTRIBUTES[name].split()) <= there


def test_calls_as_written_fit_the_functions():
    calls = [node.value for node in ast.parse(CALLS).body if isinstance(node, ast.Expr)]
    assert len(calls) == CALLS.count("\ndlc.")
    for call in calls:
        assert isinstance(call, ast.Call)
        function = dlc
        for name in ast.unparse(call.func).split(".")[1:]:
            function = getattr(function, name)
        signature = inspect.signature(function)
        keywords = [str(keyword.arg) for keyword in call.keywords]
        signature.bind(*call.args, **dict.fromkeys(keywords))
        assert set(keywords) <= set(signature.parameters), ast.unparse(call)  # not by **kwargs


def num_settings(function: ast.FunctionDef) -> int:
    """Returns how many keywords it has; of one without, how many parameters."""
    if function.args.kwonlyargs:
        return len(function.args.kwonlyargs)
    names = [argument.arg for argument in (*function.args.posonlyargs, *function.args.args)]
    return len(names) - (names[:1] in (["self"], ["cls"]))


def test_no_function_has_more_than_ten_settings():
    """Nor a constructor that is written out; settings and results are dataclasses with more."""
    many = {
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"
        for path in (ROOT / "dlc_jax").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and num_settings(node) > 10
    }
    assert many == set()
    public = [*map(dlc.__getattr__, dlc.__all__), dlc.Encoder.from_module]
    hidden = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    for function in filter(inspect.isroutine, public):
        parameters = inspect.signature(function).parameters.values()
        assert all(parameter.kind not in hidden for parameter in parameters), function


@pytest.mark.slow
def test_the_example_of_the_api_runs_as_written(small_sample, sample_encoder):
    scope = {"dlc": dlc, "dataset": small_sample, "test": small_sample, "encoder": sample_encoder}
    exec(EXAMPLE, scope)
    assert scope["losses"].shape == (3, 60)
    assert scope["losses"].dtype == np.float32
    np.testing.assert_allclose(scope["sparsity"], [0, 0.02, 0.04], atol=1e-5)
    assert scope["prototypes"].shape == (15, scope["feats"].shape[1])
    assert scope["labels"].tolist() == small_sample.labels.tolist()
    assert scope["ids"].tolist() == small_sample.ids.tolist()
    np.testing.assert_allclose(scope["scores"], scope["losses"].mean(axis=0), rtol=1e-6)
    assert scope["kept"].indices.dtype == np.int64
    assert (np.diff(scope["kept"].indices) > 0).all()
    assert 0 <= scope["accuracy"] <= 100


def flat(values: dict[str, object], section: str = "") -> dict[str, object]:
    """Returns settings by their keys, `section.name`."""
    found = {}
    for name, value in values.items():
        found |= flat(value, f"{name}.") if isinstance(value, dict) else {section + name: value}
    return found


def test_what_configuration_files_import():
    from dlc_jax import presets
    from dlc_jax.config import default_config

    config = default_config()
    assert isinstance(config, ConfigDict)
    found = flat(json.loads(config.to_json()))
    assert {key: found.get(key, "not there") for key in DEFAULTS} == DEFAULTS
    models = {"mistral-7b", "llama3-8b", "gemma2-9b"}
    assert set(presets.LANGUAGE_MODELS) == models
    assert presets.DEFAULT_MODEL in models
    assert presets.paper_instructions("llama3-8b").encoder.weights.startswith("meta-llama/")
    assert presets.run_name("configs/dolly.py:llama3-8b") == "dolly-llama3-8b"


def test_registries_hold_what_readme_lists():
    from dlc_jax.datasets import SOURCES
    from dlc_jax.datasets.row_sources import ROW_SOURCES
    from dlc_jax.encoders import ENCODERS
    from dlc_jax.exports import FORMS
    from dlc_jax.scores import SCORES
    from dlc_jax.selection import SELECTORS

    of_training = {"least_confidence", "entropy", "margin", "forgetting", "grand", "el2n"}
    assert {"dlc", "ifd", "perplexity", "length", *of_training} <= set(SCORES)
    assert set(SELECTORS) == of_training | {
        *("flexrand", "easiest", "hardest", "random", "ccs", "contextual_diversity"),
        *("herding", "k_center_greedy", "moderate", "longest", "rds", "middle", "ccs_herding"),
        *("typical", "subzerocore", "d2", "prototypes", "ram_apl"),
    }
    resnets = {"resnet18", "resnet34", "resnet50"}
    assert {*resnets, "vit_small_patch16_224", "vit_base_patch16_224"} <= set(ENCODERS)
    assert set(SOURCES) == {
        *("folder", "parquet", "csv", "npz", "tar", "hf", "tfds", "fgvc_aircraft", "split"),
        "demo",
    }
    assert set(ROW_SOURCES) == {"jsonl", "json", "parquet", "hf", "demo"}
    assert set(FORMS) == {
        *("npy", "json", "ids", "jsonl", "parquet", "image_folder", "image_links", "hf"),
        "released",
    }


def command(module: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", f"dlc_jax.{module}", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def photographs(sample, tmp_path_factory) -> Path:
    """A folder of 30 images of 5 classes."""
    folder = tmp_path_factory.mktemp("photographs")
    for position in (50 * j + i for j in range(5) for i in range(6)):
        path = folder / sample.ids[position]
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(sample[position].image)
    return folder


@pytest.fixture(scope="module")
def workdir(photographs, tmp_path_factory) -> Path:
    """A work directory after every stage, for images."""
    folder = tmp_path_factory.mktemp("images")
    command(
        "main",
        "--config=configs/dtd.py",
        f"--workdir={folder}",
        "--config.stages=('score','tune','select','export','finetune','report')",
        f"--config.dataset.train=folder:{photographs}",
        f"--config.dataset.test=folder:{photographs}",
        "--config.encoder.weights=demo:resnet18",
        "--config.encoder.image_size=32",
        "--config.probe.num_probes=auto",
        "--config.selection.methods=flexrand,random,herding,el2n,auto",
        "--config.selection.keep_fractions=0.5,",
        "--config.selection.splits=0.5,",
        "--config.selection.seeds=1,",
        "--config.tuning.methods=random,flexrand",
        "--config.finetune.epochs=2",
        "--config.finetune.batch_size=8",
        "--config.export.forms=ids",
    )
    return folder


def names(folder: Path) -> set[str]:
    files = (p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    return {name for name in files if "/checkpoint/" not in name}


CELLS = [f"{method}/keep_0.50-seed_1" for method in ("random", "herding", "el2n", "auto")]
CELLS += ["flexrand/keep_0.50-split_0.50-seed_1"]


@pytest.mark.slow
def test_every_file_of_images_has_its_name(workdir):
    found = names(workdir)
    training = {name for name in found if name.startswith("scores/training/")}
    assert "scores/training/record.npz" in training
    runs = [*CELLS, "full/keep_1.00-seed_1"]
    expected = {
        *("config.json", "provenance.json", "results.csv"),
        *(f"scores/{name}" for name in ("losses.npz", "scores.parquet", "certificate.json")),
        *("scores/features.npz", "scores/easiest_hardest.png", "scores/near_duplicates.csv"),
        *("scores/suspect_labels.csv", "scores/suspect_labels.png"),
        *(f"tuning/{name}" for name in ("tuning.json", "tuning.md", "tuning.csv", "curve.png")),
        *(f"report/{name}" for name in ("results.md", "gap_to_random.png", "gap_to_random.svg")),
        *(f"selections/{cell}{suffix}" for cell in CELLS for suffix in (".npy", ".json")),
        *(f"exports/{cell}/kept.txt" for cell in CELLS),
        *(f"finetune/{cell}/metrics.jsonl" for cell in runs),
        *(f"finetune/{cell}/per_class_accuracy.csv" for cell in runs),
        *(f"finetune/{cell}/predictions.npz" for cell in runs),
        *(f"finetune/{cell}/run.json" for cell in runs),
        *(f"records/{name}.json" for name in ("score", "features", "training", "table", "tune")),
        *(f"records/{name}.json" for name in ("select", "finetune", "report")),
        *(f"records/{name}.json" for name in ("suspect_labels", "near_duplicates")),
        *(f"records/selections/{cell}.json" for cell in CELLS),
        *(f"records/exports/{cell}/kept.txt.json" for cell in CELLS),
    }
    assert found - training == expected
    for cell in runs:
        assert list((workdir / "finetune" / cell / "checkpoint").iterdir())


@pytest.mark.slow
def test_arrays_and_tables_have_their_formats(workdir):
    arrays = dict(np.load(workdir / "scores/losses.npz", allow_pickle=False))
    assert {k: (a.dtype.str[:2], a.ndim) for k, a in arrays.items()} == {
        "losses": ("<f", 2),
        "sparsity": ("<f", 1),
        "labels": ("<i", 1),
        "ids": ("<U", 1),
        "nearest": ("<i", 2),
    }
    assert {a.dtype.itemsize for k, a in arrays.items() if k != "ids"} == {4}
    features = dict(np.load(workdir / "scores/features.npz", allow_pickle=False))
    assert features["features"].dtype == np.float32
    assert len(features["features"]) == len(features["ids"]) == 30

    table = pq.read_table(workdir / "scores/scores.parquet")
    assert table.column_names[:4] == ["id", "label", "class_name", "dlc"]
    assert "el2n" in table.column_names
    assert [str(table.schema.field(i).type) for i in range(4)] == [
        *("string", "int32", "string", "float")
    ]
    for cell in CELLS:
        kept = np.load(workdir / f"selections/{cell}.npy", allow_pickle=False)
        assert (kept.dtype, kept.shape) == (np.int64, (15,))
        assert (np.diff(kept) > 0).all()
        listed = (workdir / f"exports/{cell}/kept.txt").read_text().splitlines()
        assert listed == table.take(kept)["id"].to_pylist()
    predictions = dict(np.load(workdir / f"finetune/{CELLS[0]}/predictions.npz"))
    assert {k: (a.dtype.str, a.ndim) for k, a in predictions.items()} == {
        "predicted": ("<i4", 1),
        "labels": ("<i4", 1),
    }
    headers = {
        "results.csv": "method,keep_fraction,split,seed,num_kept,test_accuracy,seconds",
        f"finetune/{CELLS[0]}/per_class_accuracy.csv": "label,class_name,num_test,test_accuracy",
    }
    for name, header in headers.items():
        assert (workdir / name).read_text().splitlines()[0] == header
    tuning = (workdir / "tuning/tuning.csv").read_text()
    assert tuning.startswith("keep_fraction,method,split,accuracy,to_random,")


def has(value: object, **shape: type | tuple[type, ...]) -> bool:
    """Whether a JSON object has these keys with values of these types."""
    assert isinstance(value, dict)
    return all(key in value and isinstance(value[key], kind) for key, kind in shape.items())


@pytest.mark.slow
def test_json_files_hold_what_readme_says(workdir):
    manifest = json.loads((workdir / f"selections/{CELLS[-1]}.json").read_text())
    assert has(manifest, method=str, mode=str, keep_fraction=float, split=float, seed=int)
    assert has(manifest, kept=dict, dropped=dict, per_class=dict, scores_fingerprint=str)
    assert has(manifest["kept"], count=int, sha256=str)
    assert has(manifest["per_class"]["bonsai"], samples=int, kept=int)
    chosen = json.loads((workdir / "selections/auto/keep_0.50-seed_1.json").read_text())["chosen"]
    assert has(chosen, keep_fraction=float, method=str, why=str)

    run = json.loads((workdir / f"finetune/{CELLS[0]}/run.json").read_text())
    assert has(run, cell=dict, settings=dict, result=dict)
    assert has(run["result"], num_kept=int, test_accuracy=float, seconds=float)
    lines = (workdir / f"finetune/{CELLS[0]}/metrics.jsonl").read_text().splitlines()
    epochs = [json.loads(line) for line in lines]
    assert [epoch["epoch"] for epoch in epochs] == [1, 2]
    assert has(epochs[0], learning_rate=float, train_loss=float, train_accuracy=float)
    assert has(epochs[1], test_accuracy=float, elapsed_s=float)

    certificate = json.loads((workdir / "scores/certificate.json").read_text())
    assert has(certificate, num_probes=int, num_compared=int, spearman=dict, easiest=dict)
    config = flat(json.loads((workdir / "config.json").read_text()))
    assert set(DEFAULTS) <= set(config)
    assert config["dataset.deep_images"] == "error"  # what `mode` decides is filled in
    provenance = json.loads((workdir / "provenance.json").read_text())
    assert has(provenance, dataset=dict, encoder=dict, versions=dict, devices=list, stages=dict)
    assert has(provenance["dataset"], source=str, fingerprint=str, num_samples=int, skipped=dict)
    assert has(provenance["encoder"], name=str, weights=str, fingerprint=str)
    assert {"dlc_jax", "jax", "numpy"} <= set(provenance["versions"])
    stages = {"score", "features", "training", "tune", "select", "finetune"}
    assert stages <= set(provenance["stages"])
    assert all(has(stage, seconds=float) for stage in provenance["stages"].values())


@pytest.mark.slow
def test_every_file_of_instructions_has_its_name(tmp_path):
    data = dlc.load_instructions("demo:dolly/train")
    rows = [
        json.dumps({"prompt": data.prompts[i], "response": data.responses[i]})
        for i in range(len(data))
        if len(data.prompts[i]) + len(data.responses[i]) < 400
    ]
    for name, some in (("train", rows[:12]), ("test", rows[12:16])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(some) + "\n")
    command(
        "main",
        "--config=configs/instructions_demo.py",
        f"--workdir={tmp_path}/run",
        f"--config.dataset.train=jsonl:{tmp_path}/train.jsonl",
        f"--config.dataset.test=jsonl:{tmp_path}/test.jsonl",
        "--config.probe.num_probes=2",
        "--config.selection.methods=random",
        "--config.selection.keep_fractions=0.5,",
        "--config.lora.full_set=False",
        "--config.evaluation.limit=1",
    )
    cell = "random/keep_0.50-seed_0"
    assert names(tmp_path / "run") == {
        *("config.json", "provenance.json", "results.csv", "report/results.md"),
        *(f"scores/{name}" for name in ("losses.npz", "scores.parquet", "certificate.json")),
        *("scores/easiest_hardest.md", f"selections/{cell}.npy", f"selections/{cell}.json"),
        *(f"exports/{cell}/kept.jsonl", f"finetune/{cell}/metrics.jsonl"),
        *(f"finetune/{cell}/run.json", f"finetune/{cell}/adapter/adapter_config.json"),
        f"finetune/{cell}/adapter/adapter_model.safetensors",
        *("evaluate/base/keep_0.00-seed_0.json", f"evaluate/{cell}.json"),
        *(f"records/{name}.json" for name in ("score", "select", "finetune", "evaluate", "report")),
        *(f"records/selections/{cell}.json", f"records/exports/{cell}/kept.jsonl.json"),
        *("records/evaluate/base/keep_0.00-seed_0.json", f"records/evaluate/{cell}.json"),
    }
    columns = pq.read_schema(tmp_path / "run/scores/scores.parquet").names
    others = ["perplexity", "ifd", "ifd_superfiltering", "ifd_cherry", "ifd_t_shirt", "length"]
    assert columns == ["id", "label", "class_name", "dlc", *others]
    answers = json.loads((tmp_path / f"run/evaluate/{cell}.json").read_text())
    assert has(answers, cell=dict, result=dict, by_subject=dict, num_questions=int)
    assert has(answers["result"], test_accuracy=float, stem=float)
    with open(tmp_path / "run/results.csv", newline="") as file:
        (row,) = [row for row in csv.DictReader(file) if row["method"] == "random"]
    assert list(row) == [
        *("method", "keep_fraction", "split", "seed", "num_kept", "test_accuracy", "seconds"),
        *("test_loss", "humanities", "social_sciences", "stem", "other"),
    ]


@pytest.mark.slow
def test_the_other_commands_answer(photographs, tmp_path):
    said = command("check", f"--dataset=folder:{photographs}", f"--json={tmp_path}/found.json")
    assert ["samples", "30"] in [line.split() for line in said.splitlines()]
    found = json.loads((tmp_path / "found.json").read_text())
    assert has(found, num_samples=int)
    assert "--model_args" in command("lm_eval", "run", "--help")
