"""The stage `plan` of instructions, and the plans of the paper's models, from shapes alone."""

import dataclasses
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from conftest import ROOT, slow_but

from dlc_jax import expect, presets
from dlc_jax.config import Config, default_config
from dlc_jax.encoders.decoder import Architecture
from dlc_jax.encoders.known_models import KNOWN_MODELS, PAPER_MODELS
from dlc_jax.planning import instruction_plan, plan
from dlc_jax.planning.decoder_memory import Finetuning, Scoring, weight_bytes
from dlc_jax.planning.machine import Machine
from dlc_jax.planning.memory import ways_out
from dlc_jax.planning.programs import peak_bytes
from dlc_jax.stages.pipeline import run_plan
from dlc_jax.training.lora.settings import LoraConfig

GIB = 1 << 30
COUNTS = {
    "mistralai/Mistral-7B-v0.3": 7_248_023_552,
    "meta-llama/Meta-Llama-3-8B": 8_030_261_248,
    "google/gemma-2-9b": 9_241_705_984,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "google/gemma-3-12b-pt": 11_766_034_176,
}
LARGEST = "google/gemma-2-9b"
MODELS = [
    pytest.param(LARGEST, marks=pytest.mark.slow),
    *(pytest.param(name, marks=pytest.mark.long) for name in COUNTS if name != LARGEST),
]
MISTRAL = PAPER_MODELS["mistralai/Mistral-7B-v0.3"]
GEMMA = PAPER_MODELS[LARGEST]


def scoring(config, fsdp, tokens_per_batch=8192):
    return Scoring(config, "bfloat16", "l1", 8, tokens_per_batch, 2048, fsdp)


@pytest.mark.parametrize("name", slow_but(["Qwen/Qwen3-8B"], COUNTS))
def test_sizes_of_known_models(name):
    architecture = Architecture(KNOWN_MODELS[name], "bfloat16")
    shapes = jax.tree.leaves(architecture.abstract_params())
    assert sum(leaf.size for leaf in shapes) == COUNTS[name]
    assert weight_bytes(architecture, 1) == 2 * COUNTS[name]
    # but for norms, every device has an eighth
    assert 0 <= weight_bytes(architecture, 8) - COUNTS[name] / 4 < 2e6


@pytest.mark.parametrize("name", MODELS)
def test_they_fit_eight_small_devices(name):
    config = KNOWN_MODELS[name]
    for job in (scoring(config, 8), Finetuning(config, LoraConfig(), 2048, 8)):
        assert 2 * COUNTS[name] / 8 < job.plan().num_bytes < 0.9 * 24 * GIB


@pytest.mark.parametrize("name", MODELS)
def test_they_fit_one_large_device(name):
    config = KNOWN_MODELS[name]
    assert Finetuning(config, LoraConfig(), 2048, 1).plan().num_bytes < 0.9 * 80 * GIB
    # many short rows have many logits, each over a quarter of a million tokens
    tokens = 4096 if name.startswith("google/gemma") else 8192
    assert scoring(config, 1, tokens).plan().num_bytes < 0.9 * 80 * GIB


def test_every_model_that_configurations_name_has_its_sizes_here():
    assert set(presets.LANGUAGE_MODELS.values()) == set(PAPER_MODELS)


@pytest.mark.slow
def test_the_setting_to_turn():
    large = Scoring(**{**vars(scoring(GEMMA, 1)), "tokens_per_batch": 131_072})
    assert (
        ways_out(large, int(0.9 * 24 * GIB)) == "try probe.tokens_per_batch=32768, or mesh.fsdp=2"
    )
    kept = Finetuning(MISTRAL, LoraConfig(rematerialise=False), 2048, 1)
    assert "try lora.rematerialise=True, or" in ways_out(kept, int(0.9 * 80 * GIB))


@pytest.mark.slow
def test_weights_that_fit_nowhere():
    said = ways_out(scoring(MISTRAL, 1), GIB // 16)
    assert said.startswith("no single setting helps")


@pytest.mark.slow
def test_importance_that_is_drawn_has_to_be_somewhere():
    job = scoring(MISTRAL, 8)
    drawn = Scoring(**{**vars(job), "masking": "random"})  # a block's is copied too
    assert drawn.plan().num_bytes - job.plan().num_bytes == 4 * 33 * 218_103_808 // 8


def test_peak_of_values():
    x = jax.ShapeDtypeStruct((1000,), jnp.float32)
    assert peak_bytes(lambda x: x + 1, x) == 4000
    assert peak_bytes(lambda x: (x + 1) * 2 * 3, x) == 8000
    assert peak_bytes(lambda x: jax.lax.map(lambda y: y * jnp.ones(7), x).sum(axis=1), x) == 32000


def run(*arguments, tmp_path):
    return subprocess.run(
        [sys.executable, "-m", "dlc_jax.main", *arguments, f"--workdir={tmp_path / 'run'}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
def test_the_command(tmp_path):
    asked = ("--config=configs/instructions.py", "--config.stages=('plan',)")
    done = run(*asked, "--config.plan_details=True", tmp_path=tmp_path)
    assert "mistralai/Mistral-7B-v0.3, 7,248,023,552 parameters" in done.stdout
    rows = [[c.strip() for c in row.split("|")[1:-1]] for row in done.stdout.splitlines()]
    of_weights = [row[1:] for row in rows if row and row[0] == "weights"]
    assert of_weights == 2 * [["13.50", "13.50", "1.69"]]
    fits = {(row[0], row[1].partition(" of ")[2]): row[4] for row in rows if len(row) == 5}
    for stage in ("score", "finetune"):
        assert fits[stage, "1 x 80 GiB"] == fits[stage, "8 x 24 GiB"] == "yes"
    here = fits["score", "1 x cpu"], fits["finetune", "1 x cpu"]  # by this machine's memory
    assert done.returncode == (0 if set(here) == {"yes"} else 2), done.stderr
    assert ("finetune takes" in done.stderr) == (here[1] == "no")
    assert "no passes and no time, since there are no data: jsonl:train.jsonl" in done.stdout
    assert not (tmp_path / "run").exists()


def told(config, *, details=False) -> str:
    lines: list[str] = []
    checked = dataclasses.replace(Config.of(config), plan_details=details)
    run_plan(checked, lines.append)
    return "\n".join(lines)


@pytest.fixture
def sample_config():
    return of_sample()


def of_sample():
    config = default_config()
    config.stages = ("plan",)
    config.dataset.train, config.dataset.test = "demo:dolly/train", "demo:dolly/test"
    config.encoder.name, config.encoder.weights = "decoder", "demo:tiny-llama"
    config.encoder.max_length, config.probe.num_probes = 512, 4
    config.selection.keep_fractions, config.lora.dtype = (0.5,), "float32"
    return config


@pytest.fixture(scope="module")
def whole():
    """All that a plan of the sample says."""
    return told(of_sample(), details=True)


@pytest.mark.long
def test_time_memory_and_break_even_come_first_and_the_rest_on_request(sample_config, whole):
    text = told(sample_config)
    lines = text.splitlines()
    assert lines[0].startswith("plan: demo:tiny-llama, ")
    assert "400 instructions of" in lines[0]
    assert lines[-1].endswith("--config.plan_details=True")
    heads = [
        line for line in lines if line.startswith(("| stage", "| keep fraction", "break-even"))
    ]
    assert [head.split()[1] for head in heads] == ["stage", "stage", "pruning", "keep"]
    assert len(lines) < 40
    for more in ("| passes", "per device", "per process", "\nmeasured: "):
        assert more not in "\n".join(lines[1:-1])
    for more in ("| passes", " per device ", " per process ", "measured: "):
        assert more in whole[whole.index("break-even") :]


@pytest.mark.slow
def test_passes_time_and_break_even(whole):
    assert "| score    | losses of 4 probes              | 4      | 1,600 " in whole
    assert "| score    | losses with and without prompts | 3      | 1,200 " in whole
    # three epochs of everything and of a half
    assert "| finetune | LoRA, 2 runs                    | 6      | 1,800 " in whole
    assert "tests, 100 instructions         | 2      | 200 " in whole
    assert "within a factor of 2" in whole
    assert "\n| 0.50 " in whole


@pytest.mark.slow
def test_only_this_machine_is_refused(sample_config, monkeypatch):
    config = sample_config
    config.dataset.train = "jsonl:nowhere.jsonl"
    config.stages = ("plan", "score")
    small = Machine("1 x small", 1, 90 << 20)
    monkeypatch.setattr(instruction_plan, "REFERENCES", (small,))
    assert "score, a device of 1 x small: does not fit; try probe.tokens_per_batch=4096" in told(
        config
    )
    monkeypatch.setattr(plan, "this_machine", lambda num: small)
    with pytest.raises(expect.InputError, match=r"score takes .* try probe.tokens_per_batch=4096"):
        told(config)
    config.probe.tokens_per_batch = 4096
    told(config)


def test_a_folder_needs_its_sizes_only(tmp_path):
    from test_sharded import SIZES

    (tmp_path / "config.json").write_text(json.dumps(SIZES))
    assert instruction_plan.model_sizes(str(tmp_path)).depth == 6
    with pytest.raises(expect.InputError, match="no folder 'nowhere'"):
        instruction_plan.model_sizes("nowhere")
