import subprocess
import sys


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


SCORES = """
import sys

class Lacking:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in set(sys.argv[1:]):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Lacking())
import dlc_jax as dlc

sample = dlc.load_dataset("demo:caltech15/train")
images, labels = [sample[i].image for i in range(0, 750, 25)], sample.labels[::25]
encoder = dlc.load_encoder("resnet18", weights="demo:resnet18")
probes = dlc.probe(encoder, dlc.array_dataset(images, labels), image_size=32, num_probes=2)
kept = dlc.select(dlc.score(probes), probes.labels, keep_fraction=0.5, ids=probes.ids)
print(len(kept))
"""


def test_scoring_and_selecting_need_only_what_they_use():
    lacking = "ml_collections", "matplotlib", "orbax", "tensorflow_datasets", "transformers"
    command = [sys.executable, "-c", SCORES, *lacking]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout == "15\n", done.stderr


def test_public_names_exist_and_are_documented():
    import dlc_jax

    assert set(dlc_jax.__all__) <= set(dir(dlc_jax))
    for name in dlc_jax.__all__:
        assert getattr(dlc_jax, name).__doc__, name
