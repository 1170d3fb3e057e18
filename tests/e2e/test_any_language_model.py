"""Language models through both doors by the command, on bundled instructions."""

import os
import shutil
import subprocess
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import ROOT
from scipy.stats import spearmanr

from dlc_jax.encoders.language_model import model_folder

SIZES = {
    "vocab_size": 4096,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}


def made(folder, family):
    """Saves a random model of the bundled tokenizer's vocabulary, and that tokenizer."""
    import torch
    import transformers

    shutil.copytree(model_folder("demo:tiny-llama"), folder)
    for name in ("config.json", "model.safetensors"):
        (folder / name).unlink()
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SIZES)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)


def run(workdir, folder, *more):
    settings = {
        "encoder.weights": folder,
        "encoder.max_length": 64,
        "dataset.train": "demo:dolly/test",
        "dataset.test": "demo:dolly/test",
        "probe.dtype": "float32",
        "probe.num_probes": 2,
        "selection.methods": "flexrand",
        "selection.keep_fractions": 0.5,
        "lora.full_set": False,
        "evaluation.limit": 1,
        "evaluation.num_shots": 1,
    }
    command = [sys.executable, "-m", "dlc_jax.main", "--config=configs/instructions_demo.py"]
    command += [f"--config.{name}={value}" for name, value in settings.items()]
    done = subprocess.run(
        [*command, f"--workdir={workdir}", *more],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def files(workdir, pattern):
    return {path.relative_to(workdir): path.read_bytes() for path in workdir.glob(pattern)}


@pytest.mark.long
def test_both_doors_of_a_qwen_keep_the_same_instructions(timm, tmp_path):
    made(tmp_path / "model", "Qwen3")
    doors = {"decoder": "by the decoder here", "decoder:converted": "as asked for"}
    runs = []
    for number, (name, words) in enumerate(doors.items()):
        runs.append(tmp_path / f"run{number}")
        said = run(runs[-1], tmp_path / "model", f"--config.encoder.name={name}")
        assert "model: qwen3, computed by" in said
        assert words in said
        assert "evaluate: 2/2 flexrand" in said
    scores = [pq.read_table(path / "scores" / "scores.parquet") for path in runs]
    assert scores[0]["id"] == scores[1]["id"]
    for column in ("dlc", "perplexity", "ifd", "ifd_superfiltering", "ifd_cherry"):
        one, other = (table[column].to_numpy() for table in scores)
        assert spearmanr(one, other).statistic >= 0.9999, column
        np.testing.assert_allclose(other, one, rtol=1e-4, err_msg=column)
    kept = [files(path, "exports/**/kept.jsonl") for path in runs]
    assert len(kept[0]) == 1
    assert kept[0] == kept[1]
    adapters = [files(path, "finetune/**/adapter_config.json") for path in runs]
    assert adapters[0].keys() == adapters[1].keys()
    assert len(adapters[0]) == 1


@pytest.mark.long
def test_a_model_that_is_converted_goes_through_all_stages(timm, tmp_path):
    import peft
    import torch
    import transformers

    made(tmp_path / "model", "Phi3")
    said = run(tmp_path / "run", tmp_path / "model", "--config.lora.merge=True")
    assert "model: phi3, computed by transformers' own class, converted from torch" in said
    assert "score: masks 8 " in said
    (folder,) = (tmp_path / "run").glob("finetune/flexrand/**/merged")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tuned = peft.PeftModel.from_pretrained(base, folder.parent / "adapter")
    merged = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokens = torch.arange(3, 40)[None]
    with torch.no_grad():
        ours, theirs = (model(input_ids=tokens).logits for model in (merged, tuned))
    assert (ours - theirs).norm() <= 1e-5 * theirs.norm()
    assert (tmp_path / "run" / "report" / "results.md").exists()
