"""The launch files: scripts are run on a stand-in, the others compared with published schemas."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import ROOT

LAUNCH = ROOT / "launch"
SCRIPTS = [*sorted(LAUNCH.glob("*.sh")), LAUNCH / "slurm.sbatch"]
SCHEMAS = json.loads((Path(__file__).parent / "schemas.json").read_text())
TYPES = {"string": str, "integer": int, "boolean": bool, "string or null": (str, type(None))}

# What `dlc_jax.main` does with signals and exit codes, without its seconds of start-up: every
# process writes its environment to a file, and goes by --RANK=WHAT.
STAND_IN = """
import os, signal, sys, time
if sys.argv[1] == "-c":
    exec(sys.argv[2])
    sys.exit()
def stop(*_):
    time.sleep(0.3)
    print("saved", flush=True)
    os._exit(75)
signal.signal(signal.SIGTERM, stop)
assert sys.argv[1:3] == ["-m", "dlc_jax.main"]
rank = os.environ.get("JAX_PROCESS_ID") or os.environ["SLURM_PROCID"]
settings = dict(argument[2:].split("=") for argument in sys.argv[3:])
names = ["JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "CUDA_VISIBLE_DEVICES"]
said = [os.environ.get(name, "") for name in names]
said += [",".join(map(str, sorted(os.sched_getaffinity(0)))), str(os.getpid())]
path = os.path.join(os.environ["SAID"], rank)
open(path + ".part", "w").write(" ".join(text or "-" for text in said))
os.rename(path + ".part", path)
print("process", rank, "prints", flush=True)
what = settings.get(rank, "0")
if what == "wait":
    time.sleep(60)
sys.exit(int(what))
"""


# What `srun` does with two tasks, and `scontrol requeue`.
SRUN = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do shift; done
export SLURMD_NODENAME=here
SLURM_PROCID=0 "$@" & first=$!
SLURM_PROCID=1 "$@" & second=$!
wait $first; first=$?
wait $second; second=$?
exit $((first > second ? first : second))
"""
SCONTROL = """#!/usr/bin/env bash
echo "$@" >"$SAID/asked"
"""


def program(path: Path, text: str) -> str:
    path.write_text(text)
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def stand_in(tmp_path):
    python = program(tmp_path / "python", f"#!{sys.executable}\n{STAND_IN}")
    return {"DLC_JAX_PYTHON": python, "SAID": str(tmp_path)}


@pytest.fixture
def local(stand_in):
    """Starts launch/local.sh on the stand-in."""
    started = []

    def start(*arguments, **environment):
        environment = stand_in | environment
        command = ["bash", str(LAUNCH / "local.sh"), *arguments]
        process = subprocess.Popen(
            command,
            env=os.environ | environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            # whoever started the tests may ignore it, as a shell does for what runs behind
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()


def said(tmp_path, num: int) -> list[list[str]]:
    """Returns what the processes wrote, as soon as all have."""
    deadline = time.monotonic() + 30
    paths = [tmp_path / str(rank) for rank in range(num)]
    while not all(path.exists() for path in paths):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return [path.read_text().split(" ") for path in paths]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_bash_can_read_the_scripts(path):
    subprocess.run(["bash", "-n", path], check=True)


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="needs shellcheck")
def test_shellcheck_finds_nothing():
    scripts = [*SCRIPTS, ROOT / ".ci" / "run"]
    found = subprocess.run(["shellcheck", *scripts], capture_output=True, text=True)
    assert (found.returncode, found.stdout) == (0, "")


def test_check_runs_what_ci_runs():
    assert (LAUNCH / "check.sh").read_text().splitlines()[-1].endswith('/../.ci/run"')


def test_local_gives_every_process_its_place(local, tmp_path):
    process = local("3", DLC_JAX_GPUS="2")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0
    assert out == "process 0 prints\n"
    assert sorted(err.splitlines()) == ["[1] process 1 prints", "[2] process 2 prints"]
    places = said(tmp_path, 3)
    assert len({place[0] for place in places}) == 1
    assert places[0][0].startswith("127.0.0.1:")
    assert [place[1:3] for place in places] == [["3", "0,1"], ["3", "2,3"], ["3", "4,5"]]


@pytest.mark.skipif(shutil.which("taskset") is None, reason="needs taskset")
def test_local_pins_processes_to_cores_of_their_own(local, tmp_path):
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        pytest.skip("needs two cores")
    assert local("2", DLC_JAX_CORES="1").wait(timeout=60) == 0
    assert [place[3] for place in said(tmp_path, 2)] == [str(core) for core in cores[:2]]
    too_many = local(str(len(cores) + 1), DLC_JAX_CORES="1")
    assert too_many.wait(timeout=60) == 2


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--0=75", "--1=2"], 2),  # a mistake counts most
        (["--0=2", "--1=0"], 2),
        (["--0=wait", "--1=1"], 1),  # process 0 is told to stop: 75
        (["--0=75", "--1=wait"], 75),
    ],
)
def test_local_ends_with_the_code_that_tells_what_to_do(local, arguments, code):
    process = local("2", *arguments, DLC_JAX_GRACE="1")
    _, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert "exit codes of the processes:" in err


def test_local_names_the_process_that_was_killed(local, tmp_path):
    process = local("2", "--0=wait", "--1=wait", DLC_JAX_GRACE="1")
    os.kill(int(said(tmp_path, 2)[1][4]), signal.SIGKILL)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 137
    assert out.endswith("saved\n")
    assert "process 1 ended with code 137; the others will stop" in err


@pytest.mark.parametrize(
    ("arguments", "restarts", "code", "is_requeued"),
    [
        (["--0=0", "--1=0"], 0, 0, False),
        (["--0=75", "--1=75"], 50, 75, True),
        (["--0=75", "--1=2"], 0, 2, False),
        (["--0=1", "--1=75"], 2, 75, True),
        (["--0=1", "--1=75"], 3, 100, False),
        (["--0=143", "--1=75"], 3, 75, True),  # SIGTERM while Python starts
    ],
)
def test_slurm_puts_back_what_may_start_again(
    stand_in, tmp_path, arguments, restarts, code, is_requeued
):
    program(tmp_path / "srun", SRUN)
    program(tmp_path / "scontrol", SCONTROL)
    slurm = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_JOB_NODELIST": "here"}
    slurm |= {"SLURM_RESTART_COUNT": str(restarts)}
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    ended = subprocess.run(
        ["bash", LAUNCH / "slurm.sbatch", *arguments],
        env=os.environ | stand_in | slurm | {"PATH": path},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ended.returncode == code
    asked = tmp_path / "asked"
    assert (asked.read_text() if asked.exists() else "") == ("requeue 7\n" if is_requeued else "")
    assert ("crashed" in ended.stdout + ended.stderr) == ("--0=1" in arguments)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_local_lets_all_save_when_it_is_told_to_stop(local, tmp_path, number):
    process = local("2", "--0=wait", "--1=wait")
    said(tmp_path, 2)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 75
    assert out.endswith("saved\n")
    assert "[1] saved\n" in err


@pytest.mark.parametrize("arguments", [[], ["0"], ["two"], ["--config=configs/demo.py"]])
def test_local_wants_a_number_of_processes(local, arguments):
    process = local(*arguments)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert err.startswith("error: N must be a number of processes")


@pytest.mark.slow
def test_local_runs_the_bundled_sample(tmp_path):
    """Two processes end with the scores of one."""
    losses = []
    for num in ("1", "2"):
        workdir = tmp_path / num
        options = ["--config=configs/demo.py", f"--workdir={workdir}"]
        options += ["--config.probe.num_probes=2", "--config.encoder.image_size=32"]
        subprocess.run(
            ["bash", LAUNCH / "local.sh", num, *options],
            env=os.environ | {"DLC_JAX_PYTHON": sys.executable},
            cwd=ROOT,
            check=True,
            timeout=300,
        )
        with np.load(workdir / "scores" / "losses.npz") as file:
            losses.append({name: file[name] for name in file.files})
    assert losses[0].keys() == losses[1].keys()
    for name in losses[0]:
        np.testing.assert_array_equal(losses[0][name], losses[1][name])


def problems(value, schema, path="") -> list[str]:
    """Returns what of a value is not as the schema says.

    A schema is the name of a type, a list of the allowed texts, a list with the schema of all
    items, or an object of keys; `!` marks those that must be there, `*` stands for any.
    """
    if isinstance(schema, str):
        of_type = isinstance(value, TYPES[schema]) and (schema == "boolean") == (
            isinstance(value, bool)
        )
        return [] if of_type else [f"{path}: {value!r} is no {schema}"]
    if isinstance(schema, list):
        if len(schema) == 1 and (not isinstance(schema[0], str) or schema[0] in TYPES):
            if not isinstance(value, list):
                return [f"{path}: {value!r} is no list"]
            return [
                one
                for i, item in enumerate(value)
                for one in problems(item, schema[0], f"{path}[{i}]")
            ]
        return [] if value in schema else [f"{path}: {value!r} is none of {schema}"]
    if not isinstance(value, dict):
        return [f"{path}: {value!r} is no object"]
    keys = {key.rstrip("!"): key for key in schema}
    found = [f"{path}.{key}: missing" for key in keys if keys[key][-1] == "!" and key not in value]
    for key, item in value.items():
        if key in keys or "*" in keys:
            found += problems(item, schema[keys.get(key, "*")], f"{path}.{key}")
        else:
            found.append(f"{path}.{key}: unknown")
    return found


@pytest.mark.parametrize("name", ["jobset", "skypilot"])
def test_file_is_as_its_publisher_says(name):
    assert problems(yaml.safe_load((LAUNCH / f"{name}.yaml").read_text()), SCHEMAS[name]) == []


def test_schema_finds_mistakes():
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    task["resources"]["job_recovery"] = {"max_restarts": 3, "recover_on_exit_codes": ["75"]}
    assert problems(task, SCHEMAS["skypilot"]) == [
        ".resources.job_recovery.max_restarts: unknown",
        ".resources.job_recovery.recover_on_exit_codes[0]: '75' is no integer",
    ]
    jobset = yaml.safe_load((LAUNCH / "jobset.yaml").read_text())
    del jobset["spec"]["replicatedJobs"][0]["name"]
    jobset["spec"]["failurePolicy"]["restartStrategy"] = "Never"
    assert [problem.split(": ")[0] for problem in problems(jobset, SCHEMAS["jobset"])] == [
        ".spec.failurePolicy.restartStrategy",
        ".spec.replicatedJobs[0].name",
    ]


def test_jobset_says_its_number_of_pods_alike():
    spec = yaml.safe_load((LAUNCH / "jobset.yaml").read_text())["spec"]["replicatedJobs"][0]
    job = spec["template"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    environment = {entry["name"]: entry.get("value") for entry in container["env"]}
    assert job["parallelism"] == job["completions"] == int(environment["JAX_NUM_PROCESSES"])
    # Kubernetes expands only what stands before
    names = list(environment)
    assert names.index("COORDINATOR") < names.index("JAX_COORDINATOR_ADDRESS")
    assert job["podFailurePolicy"]["rules"][0]["onExitCodes"]["containerName"] == container["name"]
    mounts = {mount["name"] for mount in container["volumeMounts"]}
    assert mounts == {volume["name"] for volume in job["template"]["spec"]["volumes"]}


def test_skypilot_turns_its_environment_into_a_place(tmp_path):
    run = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())["run"]
    python = tmp_path / "dlc_jax" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\nenv | grep ^JAX_ | sort\necho "$@"\nexit 75\n')
    python.chmod(0o755)
    environment = {
        "HOME": str(tmp_path),
        "PATH": os.environ["PATH"],
        "SKYPILOT_NODE_IPS": "10.0.0.7\n10.0.0.8",
        "SKYPILOT_NUM_NODES": "2",
        "SKYPILOT_NODE_RANK": "1",
        "WORKDIR": "gs://bucket/runs/demo",
        "CONFIG": "configs/demo.py",
        "FLAGS": "--config.seed=1 --config.mode=official",
    }
    ended = subprocess.run(["bash", "-c", run], env=environment, capture_output=True, text=True)
    assert ended.returncode == 75
    assert ended.stdout.splitlines() == [
        "JAX_COORDINATOR_ADDRESS=10.0.0.7:8476",
        "JAX_NUM_PROCESSES=2",
        "JAX_PROCESS_ID=1",
        "-m dlc_jax.main --config=configs/demo.py --workdir=gs://bucket/runs/demo "
        "--config.seed=1 --config.mode=official",
    ]


def test_dockerfile_copies_what_is_there():
    for line in (LAUNCH / "Dockerfile").read_text().splitlines():
        if line.startswith("COPY"):
            for name in line.split()[1:-1]:
                assert (ROOT / name).exists(), name
