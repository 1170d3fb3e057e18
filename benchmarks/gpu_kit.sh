#!/usr/bin/env bash
# Collects in one folder of under 60 MiB what benchmarks/gpu.sh needs on a machine without network.
#
#   PYTHON=python3.12 bash benchmarks/gpu_kit.sh [FOLDER]
#
# package/      this clone without tests and documentation
# wheels/       what the package depends on and gpu_has.txt does not list, for PYTHON on x86-64
# photographs/  one sub-folder per class: caltech15 (bundled), dtd (of DTD, a folder of Parquet files)
# encoders/     a ResNet-18 for these (ENCODER, a folder), in half precision
#
# Then there: bash FOLDER/package/benchmarks/gpu.sh. DTD and ENCODER default to ../shared; where they
# are missing, gpu.sh enlarges the bundled photographs and takes the bundled encoder.
set -euo pipefail
kit=$(realpath -m "${1:-kit}")
cd "$(dirname "$0")/.."
python=${PYTHON:-python3.12}
shared=$(realpath -m ../shared)
machine=$("$python" -c 'import platform, sys; print(*sys.version_info[:2], platform.machine())')
[[ $machine == "3 12 x86_64" ]] || {
  echo "gpu_kit.sh: PYTHON: $python is $machine; expected 3 12 x86_64, as on that machine" >&2
  exit 2
}
[[ ! -e $kit ]] || {
  echo "gpu_kit.sh: $kit: there already; expected a new folder" >&2
  exit 2
}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$work/kit/package"

git ls-files -z -- benchmarks configs dlc_jax pyproject.toml README.md LICENSE |
  tar -c --null -T - | tar -x -C "$work/kit/package"

"$python" -m venv "$work/venv"
pip() { "$work/venv/bin/python" -m pip "$@" -q --disable-pip-version-check; }
pip install numpy pillow pyarrow safetensors
pip install --dry-run --ignore-installed --report "$work/report.json" -c benchmarks/gpu_has.txt .
"$work/venv/bin/python" - "$work/report.json" benchmarks/gpu_has.txt >"$work/lacking" <<'PYTHON'
import json
import re
import sys

report, has = sys.argv[1:]
normalised = lambda name: re.sub(r"[-_.]+", "-", name).lower()
lines = (line.split("#")[0].strip() for line in open(has))
there = {normalised(re.split(r"[=<>~! ]", line)[0]) for line in lines if line}
for item in json.load(open(report))["install"]:
    name, version = item["metadata"]["name"], item["metadata"]["version"]
    if normalised(name) not in there | {"dlc-jax"}:
        print(f"{name}=={version}")
PYTHON
pip wheel --no-deps -w "$work/kit/wheels" -r "$work/lacking"

"$work/venv/bin/python" - "$work/kit" "${DTD:-$shared/dtd10}" "${ENCODER:-$shared/encoders/resnet18_tin64}" <<'PYTHON'
import json
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from safetensors import numpy as tensors

kit, dtd, encoder = map(Path, sys.argv[1:])


def write(files, folder, each):
    """Writes the first so many images of each class."""
    for file in files:
        table = pq.read_table(file)
        features = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
        names = features["label"]["names"]
        for row in table.to_pylist():
            of_class = folder / names[row["label"]]
            of_class.mkdir(parents=True, exist_ok=True)
            if len(list(of_class.iterdir())) < each:
                name = Path(row["image"]["path"]).name
                (of_class / name).write_bytes(row["image"]["bytes"])


sample = kit / "package/dlc_jax/datasets/sample/train.parquet"
write([sample], kit / "photographs/caltech15", 50)
if dtd.is_dir():
    write(sorted(dtd.glob("train*.parquet")), kit / "photographs/dtd", 12)
if encoder.is_dir():
    weights = tensors.load_file(encoder / "model.safetensors")
    half = {k: v.astype(np.float16) if v.dtype == np.float32 else v for k, v in weights.items()}
    folder = kit / "encoders" / encoder.name
    folder.mkdir(parents=True)
    tensors.save_file(half, folder / "model.safetensors")
    (folder / "config.json").write_bytes((encoder / "config.json").read_bytes())
PYTHON

mebibytes=$(($(du -sb "$work/kit" | cut -f1) / 1048576 + 1))
du -sh --apparent-size "$work/kit"/*
((mebibytes < 60)) || {
  echo "gpu_kit.sh: $mebibytes MiB; expected under 60" >&2
  exit 1
}
mkdir -p "$(dirname "$kit")"
mv "$work/kit" "$kit"
echo "$kit: $mebibytes MiB"
