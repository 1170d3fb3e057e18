"""The command as users run it, in its own process, on the bundled images."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import ROOT
from PIL import Image

import dlc_jax as dlc

FAST = (
    "--config=configs/demo.py",
    "--config.probe.num_probes=3",
    "--config.encoder.image_size=32",
)


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "dlc_jax.main", *arguments]


def run(*arguments: str, code: int = 0) -> subprocess.CompletedProcess:
    done = subprocess.run(command(*arguments), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == code, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A finished run."""
    folder = tmp_path_factory.mktemp("run")
    run(*FAST, f"--workdir={folder}")
    return folder


def contents(folder) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_artefacts_have_their_names_and_hold_what_the_api_gives(workdir, sample, sample_encoder):
    arrays = np.load(workdir / "scores" / "losses.npz", allow_pickle=False)
    probes = dlc.probe(sample_encoder, sample, image_size=32, num_probes=3)
    np.testing.assert_array_equal(arrays["losses"], probes.losses)
    assert {name: arrays[name].dtype.kind for name in arrays} == {
        "losses": "f",
        "sparsity": "f",
        "labels": "i",
        "ids": "U",
        "nearest": "i",
    }
    assert arrays["losses"].dtype == np.float32
    np.testing.assert_array_equal(arrays["nearest"], probes.nearest)
    assert arrays["labels"].dtype == np.int32

    table = pq.read_table(workdir / "scores" / "scores.parquet")
    assert table.column_names == ["id", "label", "class_name", "dlc"]
    scores = dlc.score(probes)
    np.testing.assert_array_equal(table["dlc"].to_numpy(), scores)
    assert table["id"].to_pylist() == sample.ids.tolist()
    assert table["class_name"][49].as_py() == "bonsai"

    for method, cell, split in (
        ("flexrand", "keep_0.30-split_0.50-seed_1", 0.5),
        ("random", "keep_0.30-seed_1", None),
    ):
        kept = dlc.select(
            scores,
            sample.labels,
            method=method,
            keep_fraction=0.3,
            split=split,
            seed=1,
            ids=sample.ids,
        )
        found = np.load(workdir / "selections" / method / f"{cell}.npy")
        assert found.dtype == np.int64
        np.testing.assert_array_equal(found, kept.indices)
        manifest = json.loads((workdir / "selections" / method / f"{cell}.json").read_text())
        assert (manifest["kept"]["count"], manifest["dropped"]["count"]) == (225, 525)
        assert manifest["per_class"]["ketch"] == {"samples": 50, "kept": 15}
        assert manifest["split"] == split
    assert len(list((workdir / "selections").rglob("*.npy"))) == 4 * 9
    with Image.open(workdir / "scores" / "easiest_hardest.png") as picture:
        assert picture.size[0] > 500


def test_config_and_provenance_are_complete(workdir, sample, sample_encoder):
    config = json.loads((workdir / "config.json").read_text())
    assert config["probe"]["schedule"] == "linear"  # the default, resolved
    assert config["probe"]["num_probes"] == 3
    assert config["encoder"]["mean"] == [0.485, 0.456, 0.406]  # the checkpoint's, filled in
    assert config["encoder"]["pooling"] == "mean"
    provenance = json.loads((workdir / "provenance.json").read_text())
    assert provenance["dataset"]["fingerprint"] == sample.fingerprint
    encoder = sample_encoder.for_mode("default")
    assert provenance["encoder"]["fingerprint"] == encoder.fingerprint
    assert provenance["versions"]["dlc_jax"] == dlc.__version__
    score = provenance["stages"]["score"]
    assert score["seconds"] > 0
    assert score["settings"]["probe"] == config["probe"]
    assert provenance["devices"]


@pytest.mark.slow
def test_table_and_places_are_printed(workdir):
    printed = run(*FAST, f"--workdir={workdir}").stdout
    line = next(line for line in printed.splitlines() if line.startswith("helicopter"))
    _, samples, kept, easiest, hardest = line.split()
    assert (samples, kept) == ("50", "25")
    assert easiest.startswith("helicopter/image_")
    assert easiest != hardest
    assert str(workdir) in printed
    assert "seconds, when last run: score" in printed


@pytest.mark.slow
def test_finished_stages_are_not_run_again(workdir):
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*.np?")}
    printed = run(*FAST, f"--workdir={workdir}", "--config.probe.batch_size=50").stdout
    assert printed.count("unchanged, not run again") == 2
    assert {path: path.stat().st_mtime_ns for path in workdir.rglob("*.np?")} == before

    printed = run(*FAST, f"--workdir={workdir}", "--config.selection.seeds=(2,)").stdout
    assert "score: unchanged" in printed
    assert "select: 36 selections written" in printed
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.slow
def test_changed_inputs_and_damaged_files_run_again(workdir, tmp_path):
    subprocess.run(["cp", "-r", f"{workdir}/.", str(tmp_path)], check=True)
    losses = tmp_path / "scores" / "losses.npz"
    whole = losses.read_bytes()
    losses.write_bytes(whole[:1000])
    assert "score: unchanged" not in run(*FAST, f"--workdir={tmp_path}").stdout
    np.testing.assert_array_equal(
        np.load(losses)["losses"], np.load(workdir / "scores" / "losses.npz")["losses"]
    )
    changed = run(*FAST, f"--workdir={tmp_path}", "--config.probe.num_probes=2").stdout
    assert "unchanged" not in changed
    assert np.load(losses)["losses"].shape == (2, 750)


@pytest.mark.slow
def test_selections_of_other_scores_are_set_aside(workdir, tmp_path):
    subprocess.run(["cp", "-r", f"{workdir}/.", str(tmp_path)], check=True)
    shutil.rmtree(tmp_path / "superseded", ignore_errors=True)
    before = sorted(path.name for path in (tmp_path / "selections").rglob("*.npy"))
    printed = run(
        *FAST,
        f"--workdir={tmp_path}",
        "--config.probe.masking=random",
        "--config.selection.keep_fractions=(0.5,)",
    ).stdout
    assert f"select: {len(before)} selections of other scores or mode moved" in printed
    assert len(list((tmp_path / "selections").rglob("*.npy"))) == 4
    moved = sorted(path.name for path in (tmp_path / "superseded").rglob("*.npy"))
    assert moved == before


def test_scores_that_do_not_belong_together_are_not_selected_from(workdir, tmp_path):
    """As a run leaves them that is killed between two files of `scores/`."""
    subprocess.run(["cp", "-r", f"{workdir}/.", str(tmp_path)], check=True)
    other = dict(np.load(workdir / "scores" / "losses.npz"))
    other["losses"] = other["losses"] + 1
    np.savez(tmp_path / "scores" / "losses.npz", **other)
    only = "--config.stages=('select',)"
    failed = run(*FAST, f"--workdir={tmp_path}", only, code=2)
    assert "not as the stage 'score' left it" in failed.stderr


@pytest.mark.slow
def test_a_home_directory_in_the_work_directory_is_expanded(workdir, tmp_path):
    subprocess.run(["cp", "-r", f"{workdir}/scores", str(tmp_path)], check=True)
    done = subprocess.run(
        command(*FAST, "--workdir=~", "--config.stages=('select',)"),
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "HOME": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "selections").is_dir()
    assert not (ROOT / "~").exists()


def test_selecting_alone_needs_neither_data_nor_encoder(workdir, tmp_path):
    subprocess.run(["cp", "-r", f"{workdir}/scores", str(tmp_path)], check=True)
    (tmp_path / "only.py").write_text(
        "from dlc_jax.config import default_config\n"
        "def get_config():\n"
        "    config = default_config()\n"
        "    config.stages = ('select',)\n"
        "    config.mode = 'official'\n"
        "    config.selection.splits = (0.25, 0.85)\n"
        "    return config\n"
    )
    run(f"--config={tmp_path}/only.py", f"--workdir={tmp_path}")
    scores = pq.read_table(tmp_path / "scores" / "scores.parquet")
    for split in (0.25, 0.85):
        kept = dlc.select(
            scores["dlc"].to_numpy(),
            scores["label"].to_numpy(),
            keep_fraction=0.7,
            split=split,
            seed=0,
            mode="official",
        )
        name = f"keep_0.70-split_{split:.2f}-seed_0.npy"
        np.testing.assert_array_equal(
            np.load(tmp_path / "selections" / "flexrand" / name), kept.indices
        )


@pytest.mark.slow
def test_selections_are_exported_for_other_programs(workdir, tmp_path, sample):
    subprocess.run(["cp", "-r", f"{workdir}/.", str(tmp_path)], check=True)
    arguments = (
        *FAST,
        f"--workdir={tmp_path}",
        "--config.stages=('export',)",
        "--config.selection.keep_fractions=(0.1,)",
        "--config.selection.methods=hardest",
        "--config.export.forms=ids,parquet,image_folder",
        "--config.export.parts=kept,dropped",
    )
    assert "export: 6 exports of 1 selections written" in run(*arguments).stdout
    assert "export: unchanged, not written again" in run(*arguments).stdout
    (tmp_path / "exports" / "hardest" / "keep_0.10-seed_1" / "kept.txt").write_text("mine")
    assert "export: 1 exports of 1 selections written" in run(*arguments).stdout
    place = tmp_path / "exports" / "hardest" / "keep_0.10-seed_1"
    kept = np.load(tmp_path / "selections" / "hardest" / "keep_0.10-seed_1.npy")
    assert (place / "kept.txt").read_text().splitlines() == sample.ids[kept].tolist()
    assert len((place / "dropped.txt").read_text().splitlines()) == 675
    back = dlc.load_dataset(f"parquet:{place}/kept.parquet")
    assert [back[i].image for i in range(75)] == [sample[int(i)].image for i in kept]
    assert len(dlc.load_dataset(f"folder:{place}/dropped-images")) == 675
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith(".")]


@pytest.mark.slow
def test_own_images_in_folders_with_one_unreadable_and_one_lonely(tmp_path, sample):
    for i in (*range(0, 8), *range(50, 58), 100):
        path = tmp_path / "data" / sample.ids[i]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(sample[i].image)
    bad = tmp_path / "data" / sample.ids[3]
    bad.write_bytes(bad.read_bytes()[:700])
    arguments = (
        *FAST,
        f"--config.dataset.train=folder:{tmp_path}/data",
        f"--workdir={tmp_path}/run",
        "--config.selection.keep_fractions=(0.3,)",
    )
    failed = run(*arguments, code=2)
    assert failed.stderr.startswith("error: ") or "\nerror: " in failed.stderr
    assert sample.ids[3] in failed.stderr
    assert "Traceback" not in failed.stderr
    assert not (tmp_path / "run" / "scores").exists()

    printed = run(*arguments, "--config.dataset.on_corrupt=skip").stdout
    assert "classes of one sample (in mode 'default' always kept): chandelier" in printed
    assert "unreadable samples left out: 1" in printed
    provenance = json.loads((tmp_path / "run" / "provenance.json").read_text())
    assert list(provenance["dataset"]["skipped"]) == [sample.ids[3]]
    assert provenance["dataset"]["single_sample_classes"] == ["chandelier"]
    kept = np.load(tmp_path / "run/selections/easiest/keep_0.30-seed_1.npy")
    assert 15 in kept  # the lonely one, last in order: 7 + 8 before it


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "--config is required"),
        (("--config=configs/demo.py", "demo"), "unexpected argument 'demo'"),
        (("--config=configs/demo.py", "--config.probe.num_probes=abc"), "probe.num_probes"),
        (("--config=configs/demo.py", "--config.dataset.train=/tmp"), "Did you mean 'folder:/tmp'"),
        (("--config=configs/absent.py",), "configs/absent.py"),
        (("--config=configs/demo.py", "--config.prob.step=0.1"), "Did you mean 'probe.step'"),
        (("--config=configs/demo.py", "--config.probe.step=2"), "probe.step: must be < 1"),
        (
            ("--config=configs/demo.py", "--config.selection.keep_fractions=30"),
            "Did you mean 0.3",
        ),
        (("--config=configs/demo.py", "--config.selection.splits=(1.0,)"), "selection.splits"),
        (("--config=configs/demo.py", "--config.stages=('scoer',)"), "Did you mean 'score'"),
        (("--config=configs/demo.py", "--config.dataset.train=folder:/absent"), "no such folder"),
        (("--config=configs/demo.py", "--config.encoder.weights=/absent.safetensors"), "absent"),
        (("--config=configs/demo.py", "--config.encoder.name=resnet50"), "names the architecture"),
        (("--config=configs/demo.py", "--config.stages=('select',)"), "run the stage 'score'"),
    ],
)
def test_mistakes_end_in_one_clear_line(tmp_path, arguments, says):
    done = run(*arguments, f"--workdir={tmp_path}/run", code=2)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert says in last
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.rglob("*.np?"))


def test_a_work_directory_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    done = run(*FAST, f"--workdir={tmp_path}/file/run", code=2)
    assert f"cannot write to {tmp_path}/file/run" in done.stderr


@pytest.mark.slow
def test_mistakes_in_a_configuration_file_end_in_one_line(tmp_path):
    head = (
        "from dlc_jax.config import default_config\ndef get_config():\n    c = default_config()\n"
    )
    for line, says in (
        ("c.selection.keep_fractions = 0.3", "keep_fractions"),
        ("c.probe.stepp = 0.3", "stepp"),
        ("undefined", "name 'undefined' is not defined"),
    ):
        (tmp_path / "x.py").write_text(f"{head}    {line}\n    return c\n")
        done = run(f"--config={tmp_path}/x.py", code=2)
        assert done.stderr.startswith("error: ")
        assert says in done.stderr
        assert len(done.stderr.splitlines()) == 1


@pytest.mark.slow
def test_what_a_selection_alone_leaves_of_the_configuration(workdir, tmp_path):
    subprocess.run(["cp", "-r", f"{workdir}/.", str(tmp_path)], check=True)
    only = ("--config.stages=('select',)", "--config.selection.methods=easiest,hardest")
    custom = ("--config=configs/custom.py", f"--workdir={tmp_path}", *only)
    # it names data of its own, which were not scored
    refused = run(*custom, code=2).stderr
    assert "folder:data/train is not what was scored" in refused
    assert "demo:caltech15/train" in refused
    data = "--config.dataset.train=demo:caltech15/train"
    encoder = ("--config.encoder.name=resnet18", "--config.encoder.weights=demo:resnet18")
    refused = run(*custom, data, code=2).stderr
    assert "encoder.image_size: 224 (resnet50 timm/resnet50.tv_in1k) is not what was" in refused
    assert "expected 32 (resnet18 demo:resnet18)" in refused
    same = (data, *encoder, "--config.encoder.image_size=32")
    printed = run(*custom, *same, "--config.mode=official").stdout
    assert "note: the scores are of probes with num_probes 3; the configuration says" in printed
    assert "in mode 'official', from scores of mode 'default'" in printed
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["encoder"]["weights"] == "demo:resnet18"  # what the scores were made with
    assert config["probe"]["num_probes"] == 3
    assert config["selection"]["methods"] == ["easiest", "hardest"]
    assert config["mode"] == "official"


def test_help_lists_every_key():
    done = subprocess.run(command("--help"), cwd=ROOT, capture_output=True, text=True)
    assert "--config.probe.max_sparsity" in done.stdout
    assert "configs/demo.py" in done.stdout


@pytest.mark.slow
def test_killed_while_scoring_leaves_whole_files_and_a_run_that_goes_on(workdir, tmp_path):
    arguments = (*FAST, f"--workdir={tmp_path}")
    process = subprocess.Popen(
        command(*arguments), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while process.poll() is None and not (tmp_path / "scores").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    for path in (tmp_path / "scores").glob("[!.]*"):
        assert path.read_bytes() == (workdir / "scores" / path.name).read_bytes()
    run(*arguments)
    for name in ("losses.npz", "scores.parquet", "easiest_hardest.png"):
        assert (tmp_path / "scores" / name).read_bytes() == (workdir / "scores" / name).read_bytes()
    assert not list(tmp_path.rglob(".*"))


@pytest.mark.slow
def test_killed_at_any_moment_nothing_is_half_written(workdir, tmp_path):
    """Killed while it writes some hundred selections; then finished by a second run."""
    subprocess.run(["cp", "-r", f"{workdir}/scores", str(tmp_path)], check=True)
    arguments = (
        *FAST,
        f"--workdir={tmp_path}",
        "--config.stages=('select',)",
        f"--config.selection.splits={tuple(round(0.05 * i, 2) for i in range(1, 20))}",
        "--config.selection.seeds=(1,2,3)",
    )
    generator = np.random.default_rng(0)
    for _ in range(4):
        process = subprocess.Popen(
            command(*arguments), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        already = len(list(tmp_path.rglob("keep_*")))
        while process.poll() is None and len(list(tmp_path.rglob("keep_*"))) <= already:
            time.sleep(0.01)
        time.sleep(generator.uniform(0, 0.3))
        process.send_signal(signal.SIGKILL)
        process.wait()
        for path in tmp_path.rglob("*.npy"):
            if not path.name.startswith("."):
                assert np.load(path).dtype == np.int64
        for path in tmp_path.rglob("*.json"):
            if not path.name.startswith("."):
                json.loads(path.read_text())
    run(*arguments)
    found = contents(tmp_path)
    assert not [name for name in found if os.path.basename(name).startswith(".")]
    assert len([n for n in found if n.endswith(".npy")]) == (9 * 19 + 3 * 9) * 3
    once = tmp_path / "undisturbed"
    once.mkdir()
    subprocess.run(["cp", "-r", f"{workdir}/scores", str(once)], check=True)
    run(*[a.replace(f"={tmp_path}", f"={once}") for a in arguments])
    undisturbed = contents(once)
    for name, content in found.items():
        if name.startswith("selections/"):
            assert undisturbed[name] == content
