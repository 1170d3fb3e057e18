"""The README's promises that a program can check."""

import re

from conftest import ROOT

README = (ROOT / "README.md").read_text()


def commands() -> list[str]:
    return re.findall(r"```bash\n(.*?)\n```", README, re.DOTALL)


def test_ci_runs_exactly_the_test_commands():
    tests = commands()[1]
    assert tests.endswith("pytest")
    slow = re.search(r"`(\.venv/bin/python -m pytest -m slow)`", README)[1]
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    assert lines[-2:] == [tests, slow]


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


def test_python_example_runs():
    example = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]
    example = example.replace("dataset, image_size=64", "dataset, image_size=32, num_probes=2")
    example = example.replace("epochs=20", "epochs=1")
    scope: dict = {}
    exec(example, scope)
    assert len(scope["kept"]) == scope["result"].num_kept == 225
    assert 0 < scope["result"].test_accuracy < 100
