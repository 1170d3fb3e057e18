"""Runs launch/slurm.sbatch on a real Slurm of one machine, and kills a process in the middle.

.venv/bin/python tests/slurm/run.py [--folder=DIR] [OPTIONS of dlc_jax.main]

Needs root and Debian's packages, whose own daemons do not have to run:
apt-get install -y --no-install-recommends slurmctld slurmd munge slurm-client

Two tasks score the bundled sample. One is killed (SIGKILL) when some parts are done; Slurm starts
the job again, and is asked to end it (SIGTERM) when some more are; the third start finishes.
The losses have to be those of one process, bit for bit. Takes three minutes.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel")
PACKAGES = "slurmctld slurmd munge slurm-client"
CONFIGURATION = """\
ClusterName=dlc_jax
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=5
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=5,bf_interval=5
NodeName={host} NodeAddr=127.0.0.1 CPUs=2
PartitionName=all Nodes=ALL Default=YES
"""
SAID: list[str] = []  # states of the job


def main() -> None:
    # Debian keeps the daemons where only root looks
    os.environ["PATH"] += os.pathsep + "/usr/sbin"
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        sys.exit(
            f"{', '.join(missing)}: not installed; "
            f"apt-get install -y --no-install-recommends {PACKAGES}"
        )
    options = sys.argv[1:]
    given = [option for option in options if option.startswith("--folder=")]
    options = [option for option in options if option not in given]
    if given:
        folder = Path(given[0].removeprefix("--folder=")).resolve()
        folder.mkdir(parents=True)
        check(folder, options)
        return
    with tempfile.TemporaryDirectory(prefix="dlc_jax-slurm-") as name:
        check(Path(name), options)


def check(folder: Path, options: list[str]) -> None:
    """Runs it all in a folder."""
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    # small batches, for many parts
    options = ["--config=configs/demo.py", "--config.probe.batch_size=16", *options]
    command = [sys.executable, "-m", "dlc_jax.main", *options]
    one, two = folder / "one", folder / "two"
    begin = time.monotonic()
    subprocess.run([*command, f"--workdir={one}"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    say(f"one process, without Slurm: {time.monotonic() - begin:.0f} s")
    with slurm(folder):
        job, log = submit(folder, [*options, f"--workdir={two}"])
        kill_a_task(job, two)
        ask_to_end(job, two)
        state = wait_for_state(job, lambda state: state in ("COMPLETED", "FAILED", "CANCELLED"))
    print(f"\n{log.read_text().rstrip()}\n")
    if state != "COMPLETED":
        sys.exit(f"the job ended as {state}")
    with np.load(one / "scores/losses.npz") as mine, np.load(two / "scores/losses.npz") as theirs:
        assert mine.files == theirs.files
        for name in mine.files:
            np.testing.assert_array_equal(mine[name], theirs[name])
        say(f"identical to one process: {', '.join(mine.files)}; losses {mine['losses'].shape}")


@contextlib.contextmanager
def slurm(folder: Path) -> Iterator[None]:
    """Has a cluster of this machine, its files in the folder; ends what it started."""
    host = socket.gethostname().split(".")[0]
    settings = {"host": host, "folder": folder, "user": getpass.getuser(), "ports": free_ports(2)}
    configuration = folder / "slurm.conf"
    configuration.write_text(CONFIGURATION.format(**settings))
    os.environ["SLURM_CONF"] = str(configuration)
    for name in ("state", "spool"):
        (folder / name).mkdir()
    key = folder / "munge.key"
    key.touch(mode=0o400)
    key.chmod(0o600)
    key.write_bytes(os.urandom(128))
    # munge wants other users to reach its socket, and nobody to write beside it
    folder.chmod(0o755)
    munged = ["munged", "--foreground", "--force", f"--key-file={key}"]
    munged += [f"--socket={folder}/munge.sock", f"--pid-file={folder}/munged.pid"]
    munged += [f"--log-file={folder}/munged.log", f"--seed-file={folder}/munged.seed"]
    daemons: list[subprocess.Popen[bytes]] = []

    def start(*command: str) -> None:
        log = (folder / f"{command[0]}.out").open("wb")
        daemons.append(subprocess.Popen(command, stdout=log, stderr=log))

    try:
        start(*munged)
        wait_until((folder / "munge.sock").exists, "munged")
        start("slurmctld", "-D", "-i", "-f", str(configuration))
        start("slurmd", "-D", "-f", str(configuration))
        wait_until(lambda: "idle" in output("sinfo", "--noheader"), "Slurm")
        say(f"{output('sinfo', '--version').strip()}: {output('sinfo', '--noheader').strip()}")
        yield
    finally:
        for job in output("squeue", "--noheader", "--format=%i").split():
            output("scancel", "--signal=KILL", "--full", job)
        for daemon in reversed(daemons):
            daemon.terminate()
        for daemon in daemons:
            daemon.wait(timeout=60)


def submit(folder: Path, options: list[str]) -> tuple[str, Path]:
    """Returns the job and the file with what it prints."""
    log = folder / "job.out"
    os.environ["DLC_JAX_PYTHON"] = sys.executable
    sbatch = ["sbatch", "--parsable", "--ntasks=2", "--ntasks-per-node=2", f"--output={log}"]
    command = [*sbatch, "launch/slurm.sbatch", *options]
    job = subprocess.run(command, cwd=ROOT, check=True, text=True, stdout=subprocess.PIPE)
    say(f"sbatch {' '.join(command[2:])}".replace(str(folder), "$FOLDER"))
    return job.stdout.strip(), log


def kill_a_task(job: str, workdir: Path) -> None:
    """Kills process 1 when some of the losses are there."""
    wait_for_state(job, lambda state: state == "RUNNING")
    parts = wait_for_parts(workdir, at_least=4)
    pid = pid_of_task(job, 1)
    os.kill(pid, signal.SIGKILL)
    say(f"kill -9 {pid}, process 1 of 2; parts done: {parts}")
    wait_for_state(job, lambda state: state == "PENDING")


def ask_to_end(job: str, workdir: Path) -> None:
    """Sends SIGTERM, as before the end of a time limit, when more of them are there."""
    before = num_parts(workdir)
    wait_for_state(job, lambda state: state == "RUNNING")
    parts = wait_for_parts(workdir, at_least=before + 4)
    output("scancel", "--signal=TERM", job)
    say(f"scancel --signal=TERM {job}; parts done: {parts}, {before} of them by the first start")
    wait_for_state(job, lambda state: state == "PENDING")


def num_parts(workdir: Path) -> int:
    return len(list((workdir / "unfinished").rglob("*.npz")))


def wait_for_parts(workdir: Path, at_least: int) -> int:
    wait_until(lambda: num_parts(workdir) >= at_least, f"{at_least} parts in {workdir}", 300)
    return num_parts(workdir)


def wait_for_state(job: str, is_it: Callable[[str], bool]) -> str:
    """Returns the state of the job when it is as expected; says every change."""
    while True:
        shown = output("scontrol", "--oneliner", "show", "job", job)
        fields = dict(re.findall(r"(JobState|Restarts|Reason|ExitCode)=(\S+)", shown))
        line = " ".join(f"{name}={value}" for name, value in fields.items())
        if not SAID or line != SAID[-1]:
            say(f"job {job}: {line}")
            SAID.append(line)
        if is_it(fields["JobState"]):
            return fields["JobState"]
        if fields["JobState"] in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT"):
            sys.exit(f"the job ended too early, as {fields['JobState']}")
        time.sleep(0.2)


def pid_of_task(job: str, task: int) -> int:
    """Returns the Python process of a task."""
    wanted = {f"SLURM_JOB_ID={job}".encode(), f"SLURM_PROCID={task}".encode()}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            environment = set((folder / "environ").read_bytes().split(b"\0"))
            command = (folder / "cmdline").read_bytes().split(b"\0")
            if wanted <= environment and command[0] == sys.executable.encode():
                return int(folder.name)
    sys.exit(f"job {job} has no task {task}")


def output(*command: str) -> str:
    return subprocess.run(command, text=True, capture_output=True).stdout


def wait_until(is_so: Callable[[], bool], what: str, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        if time.monotonic() > deadline:
            sys.exit(f"waited {seconds:.0f} s for {what}")
        time.sleep(0.1)


def free_ports(num: int) -> list[int]:
    sockets = [socket.socket() for _ in range(num)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


if __name__ == "__main__":
    main()
