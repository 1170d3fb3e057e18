"""Model folders that ask for more than to be read: code to run, files without an end."""

import builtins
import json
import os
import shutil

import pytest

from dlc_jax.encoders.language_model import load_language_model, load_tokenizer, model_folder

CODE = """
from pathlib import Path
Path({marker!r}).write_text("ran")
from transformers import LlamaConfig, PreTrainedTokenizerFast
class Config(LlamaConfig):
    model_type = {model_type!r}
class Words(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(model_folder("demo:tiny-llama"), tmp_path / "model")


def change(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize("model_type", ["llama", "unheard-of"])
@pytest.mark.parametrize("load", [load_language_model, load_tokenizer])
def test_code_in_a_model_folder_is_never_run(folder, tmp_path, monkeypatch, model_type, load):
    marker = tmp_path / "marker"
    (folder / "code.py").write_text(CODE.format(marker=str(marker), model_type=model_type))
    change(folder / "config.json", auto_map={"AutoConfig": "code.Config"}, model_type=model_type)
    own = {"AutoTokenizer": ["code.Words", "code.Words"]}
    change(folder / "tokenizer_config.json", auto_map=own, tokenizer_class="Words")
    asked = []
    monkeypatch.setattr(builtins, "input", lambda *text: asked.append(text) or "y")
    if model_type == "llama" and load is load_language_model:
        load(str(folder))  # the family's own class is used instead
    else:
        with pytest.raises(ValueError, match=r"unheard-of|contains custom code"):
            load(str(folder))
    assert not marker.exists()
    assert not asked


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "model.safetensors", "other.json"]
)
@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_files_without_an_end_are_refused(folder, name, kind):
    (folder / name).unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(folder / name)
    else:
        (folder / name).symlink_to("/dev/zero")
    with pytest.raises(ValueError, match=f"{name}: not a regular file"):
        load_language_model(str(folder))
    with pytest.raises(ValueError, match=f"{name}: not a regular file"):
        load_tokenizer(str(folder))


def test_a_tokenizer_that_cannot_be_read_is_refused_in_a_line(folder):
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    split = {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}
    for content in ("[" * 100_000, "{}", json.dumps(tokenizer | {"pre_tokenizer": split})):
        (folder / "tokenizer.json").write_text(content)
        with pytest.raises(
            ValueError, match=r"^[^\n]*: has no tokenizer that can be read: [^\n]+$"
        ):
            load_tokenizer(str(folder))
