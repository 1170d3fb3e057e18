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


def test_public_names_exist_and_are_documented():
    import dlc_jax

    assert set(dlc_jax.__all__) <= set(dir(dlc_jax))
    for name in dlc_jax.__all__:
        assert getattr(dlc_jax, name).__doc__, name
