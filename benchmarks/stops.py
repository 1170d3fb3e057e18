"""Stops runs at random moments, nothing compiled before; says how each ended.

python -m benchmarks.stops [--num=30] [--seed=0] [--longest_s=40]

Scores images and instructions, fine-tunes both, and sends SIGTERM or Ctrl-C at a random moment.
Right is: "stopping" at once, exit code 75 or 130, no crash and no traceback. Prints a row per
run and a summary as JSON.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from absl import app, flags

_NUM = flags.DEFINE_integer("num", 30, "How many runs.")
_SEED = flags.DEFINE_integer("seed", 0, "Of moments.")
_LONGEST_S = flags.DEFINE_float("longest_s", 40.0, "Seconds until the last moment.")

_IMAGES = ["--config=configs/demo.py", "--config.encoder.image_size=32"]
_INSTRUCTIONS = ["--config=configs/instructions_demo.py"]
RUNS = {
    "score images": [*_IMAGES, "--config.probe.num_probes=20"],
    "fine-tune images": [
        *_IMAGES,
        "--config.probe.num_probes=2",
        "--config.stages=score,select,finetune",
        "--config.finetune.epochs=20",
    ],
    "score instructions": _INSTRUCTIONS,
    "fine-tune instructions": [
        *_INSTRUCTIONS,
        "--config.stages=score,select,finetune",
        "--config.lora.epochs=20",
    ],
}
CODES = {signal.SIGTERM: 75, signal.SIGINT: 130}


def stopped(arguments: list[str], workdir: Path, number: int, moment: float, env: dict) -> dict:
    """Starts a run and signals it; returns how it ended.

    Args:
      arguments: Of the command.
      workdir: Of the run.
      number: Of the signal.
      moment: Seconds after the start.
      env: Of the process.
    """
    command = [sys.executable, "-m", "dlc_jax.main", f"--workdir={workdir}", *arguments]
    process = subprocess.Popen(
        command,
        env=env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    said: list[tuple[float, str]] = []
    assert process.stderr is not None
    lines = iter(process.stderr.readline, "")
    reader = threading.Thread(
        target=lambda: said.extend((time.monotonic(), line) for line in lines), daemon=True
    )
    reader.start()
    time.sleep(moment)
    sent = time.monotonic()
    process.send_signal(number)
    code = process.wait(timeout=300)
    seconds = time.monotonic() - sent
    reader.join(10)
    text = "".join(line for _, line in said)
    heard = [when - sent for when, line in said if line.startswith("stopping")]
    return {
        "signal": signal.Signals(number).name,
        "moment": round(moment, 2),
        "code": code,
        "seconds": round(seconds, 1),
        "said_after": round(heard[0], 2) if heard else None,
        "is_right": code in (0, CODES[signal.Signals(number)])
        and bool(heard or code == 0)
        and "Traceback" not in text
        and "Fatal" not in text,
        "text": text[-600:],
    }


def main(_: list[str]) -> None:
    generator = random.Random(_SEED.value)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for trial in range(_NUM.value):
            name = list(RUNS)[trial % len(RUNS)]
            number = list(CODES)[trial // len(RUNS) % len(CODES)]
            env = os.environ | {"XDG_CACHE_HOME": f"{folder}/cache-{trial}"}
            env.pop("JAX_COMPILATION_CACHE_DIR", None)
            moment = generator.uniform(0.2, _LONGEST_S.value)
            row = stopped(RUNS[name], Path(folder) / str(trial), number, moment, env)
            text = row.pop("text")
            print({"run": name, **row}, flush=True)
            if not row["is_right"]:
                print(text, flush=True)
            rows.append(row)
    codes = [row["code"] for row in rows]
    heard = [row["said_after"] for row in rows if row["said_after"] is not None]
    summary = {
        "num": len(rows),
        "num_right": sum(row["is_right"] for row in rows),
        "codes": {code: codes.count(code) for code in sorted(set(codes))},
        "latest_word_s": max(heard, default=None),
        "longest_s": max(row["seconds"] for row in rows),
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    app.run(main)
