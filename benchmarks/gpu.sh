#!/usr/bin/env bash
# All measurements that want a GPU, in under nine minutes, into one JSON file.
#
#   bash benchmarks/gpu.sh [OUT.json]
#
# Needs no network: Python with jax for the GPU, torch and timm, and the packages of pyproject.toml;
# what is missing is installed from WHEELS (wheels/ of this clone) alone. DTD is a folder of
# photographs with one sub-folder per class; else ../shared/dtd10 if it is there, else the bundled
# photographs, enlarged. A part that fails, or takes too long, leaves its place empty.
set -uo pipefail
cd "$(dirname "$0")/.."
out=$(realpath -m "${1:-gpu.json}")
python=${PYTHON:-python3}
parts=$(mktemp -d)
trap 'rm -rf "$parts"' EXIT
export JAX_COMPILATION_CACHE_DIR=$parts/programs XDG_CACHE_HOME=$parts/images
export XLA_PYTHON_CLIENT_PREALLOCATE=false # torch computes on the same GPU
end=$((SECONDS + ${SECONDS_IN_ALL:-520}))

if ! "$python" -c 'import dlc_jax.main, timm' 2>/dev/null; then
  "$python" -m pip install -q --no-index --find-links "${WHEELS:-wheels}" -e . ||
    "$python" -m pip install -q --no-deps --no-build-isolation -e . || export PYTHONPATH=$PWD
fi
nvidia-smi --query-gpu=name,driver_version,clocks.max.sm --format=csv,noheader 2>/dev/null

part() { # NAME LIMIT COMMAND...
  local name=$1 limit=$2 left=$((end - SECONDS))
  shift 2
  ((left > 10)) || {
    echo "== $name: no time left"
    return
  }
  echo "== $name"
  timeout $((limit < left ? limit : left)) "$python" -m "$@" --json="$parts/$name.json" 2>"$parts/$name.err" ||
    tail -n 3 "$parts/$name.err"
}

images=()
[[ -d ../shared/dtd10 ]] && images=(--folder=parquet:../shared/dtd10)
[[ -n ${DTD:-} ]] && images=(--folder="$DTD")
part kernel 150 benchmarks.probe_kernel --encoders=resnet18,resnet50,vit_small_patch16_224,vit_base_patch16_224 \
  --batch_size=128 --num_probes=10 --chunks=1,5 --compiled
part end_to_end 240 benchmarks.prune_end_to_end "${images[@]}" --num_images=752 --repeat=5 --batch_size=128 \
  --encoders=resnet18 --by='dlc_jax 50,dlc_jax auto,good torch,released'
part precision 60 benchmarks.precision
part llm_probes 60 benchmarks.llm_probes --paper=llama3-8b --depth=4 --length=1024 --rows=8
part select 60 benchmarks.select
part memory 60 benchmarks.memory

"$python" - "$parts" "$out" <<'PYTHON'
import json
import sys
from pathlib import Path

folder, out = map(Path, sys.argv[1:])
names = ["kernel", "end_to_end", "precision", "llm_probes", "select", "memory"]
found = {name: folder / f"{name}.json" for name in names}
read = {n: json.loads(p.read_text()) if p.exists() else None for n, p in found.items()}
out.write_text(json.dumps(read, indent=1))
print("written:", out, "; empty:", [name for name, value in read.items() if value is None])
PYTHON
