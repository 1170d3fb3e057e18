import subprocess
import sys

import dlc_jax as dlc


def test_import_is_light():
    program = (
        "import sys, dlc_jax\n"
        "assert 'jax' not in sys.modules\n"  # a command listens to signals before that
        "dlc_jax.selection.Candidates, dlc_jax.probe\n"
        "heavy = {'torch', 'tensorflow', 'tensorflow_datasets', 'transformers', 'timm'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
        "from jax._src import xla_bridge\n"
        "print(xla_bridge.backends_are_initialized())\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.split("\n")[:2] == ["[]", "False"], done.stderr


def test_a_command_starts_without_what_only_some_stages_need():
    heavy = "scipy.stats torch tensorflow transformers timm matplotlib.pyplot pandas"
    program = f"import sys, dlc_jax.cli.main; print(set({heavy!r}.split()) & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr


SCORES = """
import sys

class Lacking:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in set(sys.argv[2:]):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Lacking())
import dlc_jax as dlc

photographs = dlc.load_dataset(f"folder:{sys.argv[1]}")
encoder = dlc.load_encoder("resnet18", weights="demo:resnet18")
probes = dlc.probe(encoder, photographs, image_size=32, num_probes=2)
kept = dlc.select(dlc.score(probes), probes.labels, keep_fraction=0.5, ids=probes.ids)
print(len(kept))
"""


def test_scoring_and_selecting_need_only_what_they_use(tmp_path):
    sample = dlc.load_dataset("demo:caltech15/train")
    for position in range(0, 750, 25):
        path = tmp_path / str(sample.ids[position])
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(sample[position].image)
    lacking = "ml_collections", "matplotlib", "orbax", "pyarrow", "tensorflow_datasets"
    command = [sys.executable, "-c", SCORES, str(tmp_path), *lacking, "transformers"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout == "15\n", done.stderr


def test_public_names_exist_and_are_documented():
    import dlc_jax

    assert set(dlc_jax.__all__) <= set(dir(dlc_jax))
    for name in dlc_jax.__all__:
        assert getattr(dlc_jax, name).__doc__, name
