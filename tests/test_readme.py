"""The README's promises that a program can check."""

import importlib.util
import re
import shlex

import numpy as np
import pytest
from absl import flags
from conftest import ROOT, random_images
from flax import nnx
from ml_collections import config_flags

import dlc_jax as dlc
from dlc_jax.config import Config, known_keys

README = (ROOT / "README.md").read_text()


def commands() -> list[str]:
    return re.findall(r"```bash\n(.*?)\n```", README, re.DOTALL)


def test_ci_runs_exactly_the_test_commands():
    tests = commands()[1]
    assert tests.endswith("pytest")
    slow = re.search(r"`(\.venv/bin/python -m pytest -m slow)`", README)[1]
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    assert lines[lines.index(tests) + 1] == slow


def test_first_command_is_the_bundled_sample():
    assert commands()[0].endswith("-m dlc_jax.main --config=configs/demo.py")


def test_files_and_folders_named_in_the_tree_exist():
    tree = re.search(r"```text\n(dlc_jax/.*?)```", README, re.DOTALL)[1]
    folder = ""
    for line in tree.splitlines():
        name = line.split()[0] if line.strip() else ""
        if not line.startswith(" "):
            folder = name if name.endswith("/") else ""
            assert (ROOT / name).exists(), name
        elif name:
            assert (ROOT / folder / name).exists(), folder + name


# smaller than in the text, so that it takes seconds
SMALLER = {
    "dlc.probe(encoder, dataset, image_size=64)": "dlc.probe(encoder, dataset, image_size=32, "
    "num_probes=2)",
    "image_size=64": "image_size=32",
    "batch_size=32": "batch_size=45",
    "epochs=20": "epochs=1",
    "features=feats, keep_fractions=(0.1, 0.3, 0.5)": "features=feats, keep_fractions=(0.3,), "
    'methods=("random", "herding")',
    '"models/mistral-7b", dtype="bfloat16"': '"demo:tiny-llama", dtype="float32"',
    'load_instructions("jsonl:train.jsonl")': 'load_instructions("demo:dolly/train").subset(FEW)',
    "num_probes=8": "num_probes=2",
    "keep_fraction=0.1": "keep_fraction=0.5",
    'optimiser="adamw"': 'optimiser="adamw", epochs=1',
    'load_mmlu("mmlu:data/mmlu")': 'load_mmlu("demo:mmlu")',
}
FILES = {"tuning.md", "tuning.csv", "finetune.py"}  # named like settings
DOCS = [ROOT / "README.md", ROOT / "launch" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def snippets(*kinds: str) -> list[str]:
    """The code blocks of these kinds, in all documents."""
    fences = "|".join(kinds)
    return [
        block
        for file in DOCS
        for block in re.findall(rf"```(?:{fences})\n(.*?)```", file.read_text(), re.DOTALL)
    ]


PYTHON = snippets("python", "py")


def small(snippet: str) -> str:
    for text, other in SMALLER.items():
        snippet = snippet.replace(text, other)
    return snippet


def snippet_with(text: str) -> str:
    (found,) = [snippet for snippet in PYTHON if text in snippet]
    return found


@pytest.fixture(scope="module")
def images_scope() -> dict:
    """What the first example leaves, on which those of images build."""
    scope: dict = {}
    exec(small(PYTHON[0]), scope)
    return scope


def test_python_example_runs(images_scope):
    assert len(images_scope["kept"]) == images_scope["result"].num_kept == 225
    assert 0 < images_scope["result"].test_accuracy < 100


@pytest.mark.slow
def test_example_of_tuning_and_other_methods_runs(images_scope):
    scope = dict(images_scope)
    snippet = small(snippet_with("dlc.tune("))
    exec(snippet.replace("kept.chosen.why", "chosen = kept.chosen"), scope)
    assert scope["chosen"].method == "herding"  # which needs the features
    assert scope["record"].probabilities.shape == (750, 15)
    assert 0 < scope["heads"].accuracy[0] < 100


def test_example_of_suspect_labels_runs(images_scope):
    scope = dict(images_scope)
    exec(small(snippet_with("dlc.suspect_labels(")), scope)
    found, sure = scope["found"], scope["sure"]
    assert len(scope["worst"]) == 20
    assert not found.is_suspect[scope["kept"].indices].any()
    assert sure[found.is_suspect].mean() < 0.5 * sure[~found.is_suspect].mean()


def test_example_of_prediction_runs(images_scope):
    scope = dict(images_scope)
    exec(small(snippet_with('result.weights["head"]\n')), scope)
    predicted = np.asarray(scope["logits"]).argmax(axis=1)
    np.testing.assert_array_equal(predicted, scope["result"].predictions)


def test_example_of_an_own_model_runs():
    class Tiny(nnx.Module):
        def __init__(self):
            self.conv = nnx.Conv(3, 4, (3, 3), rngs=nnx.Rngs(0))

        def __call__(self, images):
            return self.conv(images)

    module = Tiny()
    scope = {
        "dlc": dlc,
        "params": {"kernel": np.ones((3, 4), np.float32)},
        "net": lambda params, images: images @ params["kernel"],
        "nnx_module": module,
        "is_prunable": lambda path: path.endswith("kernel"),
    }
    snippet = snippet_with("dlc.Encoder(")
    first, second = snippet.split("encoder = dlc.Encoder.from_module")
    images = random_images(4, 16)
    data = dlc.array_dataset(images, [0, 1, 0, 1])
    for part in (first, f"encoder = dlc.Encoder.from_module{second}"):
        exec(part, scope)
        assert dlc.features(scope["encoder"], data, image_size=16).shape == (4, 4)


def short_ones(num: int) -> np.ndarray:
    """Positions of the shortest instructions."""
    data = dlc.load_instructions("demo:dolly/train")
    lengths = [len(p) + len(r) for p, r in zip(data.prompts, data.responses, strict=True)]
    return np.sort(np.argsort(lengths, kind="stable")[:num])


@pytest.mark.slow
def test_example_of_instructions_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scope = {"dlc": dlc, "FEW": short_ones(12)}
    snippet = small(snippet_with("dlc.load_language_model("))
    exec(snippet, scope)
    assert scope["probes"].losses.shape == (2, 12)
    assert len(scope["kept"]) == 6
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_every_python_example_is_run_here():
    """One that is added needs a test above."""
    run = ("load_dataset", "dlc.tune(", "result.weights", "dlc.Encoder(", "load_language_model(")
    run += ("dlc.suspect_labels(",)
    assert len(PYTHON) == len(run)
    assert all(any(text in snippet for text in run) for snippet in PYTHON)


def shell_lines() -> list[list[str]]:
    """The commands of all shell blocks, in words, each part of `a && b` on its own."""
    lines = "\n".join(snippets("bash", "sh")).replace("\\\n", " ").splitlines()
    parts = [part for line in lines for part in line.split("&&")]
    return [words for part in parts if (words := shlex.split(part, comments=True))]


def modules_run() -> list[tuple[str, list[str]]]:
    """Module and arguments of every `python -m`."""
    found = []
    for words in shell_lines():
        if "-m" in words and "python" in words[0]:
            place = words.index("-m")
            found.append((words[place + 1], words[place + 2 :]))
    return found


def parsed(arguments: list[str], monkeypatch) -> Config:
    """The configuration that the command would run, its flags parsed as there."""
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values)
    flags.DEFINE_string("workdir", None, "", flag_values=values)
    monkeypatch.setattr("sys.argv", ["main", *arguments])  # where keys of --config are looked for
    values(["main", *arguments])
    return Config.of(values.config)


def test_commands_in_shell_examples_parse(monkeypatch):
    monkeypatch.chdir(ROOT)
    commands = [arguments for module, arguments in modules_run() if module == "dlc_jax.main"]
    assert len(commands) >= 7
    for arguments in commands:
        assert parsed(arguments, monkeypatch).dataset.train
    with pytest.raises(Exception, match="no_such_key"):
        parsed(["--config=configs/demo.py", "--config.probe.no_such_key=1"], monkeypatch)


def test_modules_in_shell_examples_are_there():
    for module, _ in modules_run():
        assert importlib.util.find_spec(module) is not None, module


def test_settings_that_the_documents_name_are_there():
    sections = {key.partition(".")[0] for key in known_keys() if "." in key}
    for file in DOCS:
        text = file.read_text()
        given = re.findall(r"--config\.([a-z_.]+[a-z_])", text)
        inline = re.findall(rf"`((?:{'|'.join(sections)})\.[a-z_]+)(?:[=`])", text)
        for key in {*given, *inline} - FILES:
            assert key in known_keys(), f"{file.name}: {key}"


def test_files_that_commands_name_are_there():
    for file in DOCS:
        for name in re.findall(r"(?:configs|launch)/\w+\.(?:py|sh|sbatch|yaml)", file.read_text()):
            assert (ROOT / name).is_file(), f"{file.name}: {name}"
