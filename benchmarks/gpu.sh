#!/usr/bin/env bash
# Everything that needs a GPU, in three parts of under nine minutes each, without network.
#
#   bash benchmarks/gpu.sh correctness|images|text [OUT]
#
# Needs Python with what gpu_has.txt lists (PYTHON, else python3). Wheels, photographs and an encoder
# come from a kit (KIT: kit/ of this clone, or the folder around it; see gpu_kit.sh); without one, the
# bundled photographs and encoder do. OUT/PART.json (OUT: gpu) is written anew after every step, so
# that it is there if the part is stopped. Steps that have ended are kept in OUT/steps: the same
# command again does the others. Ends with 1 where a step is missing or a check does not hold.
# SMALL=1 tries everything at a reduced size, on a CPU too, and keeps it apart (OUT/small).
set -uo pipefail
part=${1:-}
[[ $part == correctness || $part == images || $part == text ]] || {
  echo "gpu.sh: ${part:-no part}; expected correctness, images or text" >&2
  exit 2
}
out=$(realpath -m "${2:-gpu}")${SMALL:+/small}
root=$(realpath "$(dirname "$0")/..")
kit=${KIT:-$root/kit}
[[ -d $kit/wheels ]] || kit=$(realpath "$root/..")
python=${PYTHON:-python3}
steps=$out/steps
mkdir -p "$steps"
cd "$root"
end=$((SECONDS + ${SECONDS_IN_ALL:-520}))
export JAX_COMPILATION_CACHE_DIR=$steps/programs JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0
# where there is a GPU, JAX is not to fall back on the CPU, which some steps use besides
nvidia-smi >/dev/null 2>&1 && export JAX_PLATFORMS=${JAX_PLATFORMS:-cuda,cpu}
export XDG_CACHE_HOME=$steps/images
export XLA_PYTHON_CLIENT_PREALLOCATE=false # torch computes on the same GPU
export PYTHONPATH=$root PYTHONWARNINGS=ignore

if compgen -G "$kit/wheels/*.whl" >/dev/null; then
  [[ -d $steps/site ]] || {
    "$python" -m pip install -q --no-index --no-deps --no-compile --target "$steps/site.part" \
      --disable-pip-version-check "$kit"/wheels/*.whl && mv "$steps/site.part" "$steps/site"
  }
  PYTHONPATH+=:$steps/site
fi
"$python" -c 'import benchmarks.peers, dlc_jax.api; benchmarks.peers.import_timm()' || {
  echo "gpu.sh: $python: expected the packages of gpu_has.txt; what is missing is named above" >&2
  exit 1
}

# gather - OUT/PART.json of what there is
gather() {
  "$python" - "$steps" "$part" "$out/$part.json" <<'PYTHON'
import contextlib
import json
import os
import sys
from importlib import metadata
from pathlib import Path

steps, part, out = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
found = {}
for command in sorted(steps.glob(f"{part}.*.command"), key=os.path.getmtime):
    name = command.name.removesuffix(".command")
    whole, begun, log, seconds = (
        steps / f"{name}.{end}" for end in ("json", "begun.json", "log", "seconds")
    )
    step = {"ended": whole.exists(), "command": command.read_text().strip()}
    if seconds.exists():
        step["seconds"] = int(seconds.read_text())
    if not whole.exists() and log.exists():
        step["log"] = log.read_text().splitlines()[-5:]
    if whole.exists() or begun.exists():
        step["found"] = json.loads((whole if whole.exists() else begun).read_text())
    found[name.removeprefix(f"{part}.")] = step
card = steps / "card"
packages = ("jax", "jaxlib", "flax", "numpy", "torch", "timm", "transformers")
versions = {"python": sys.version.split()[0]}
for package in packages:
    with contextlib.suppress(metadata.PackageNotFoundError):
        versions[package] = metadata.version(package)
result = {
    "card": card.read_text().strip() if card.exists() else None,
    "cores": len(os.sched_getaffinity(0)),
    "versions": versions,
    "steps": found,
}
temporary = out.with_suffix(".part")
temporary.write_text(json.dumps(result, indent=1))
os.replace(temporary, out)
PYTHON
}

child=
stopped() {
  [[ -z $child ]] || kill -- "$child" 2>/dev/null
  gather
  echo "stopped; $out/$part.json has what there is"
  exit 143
}
trap stopped TERM INT HUP

# step NAME SECONDS [VARIABLE=VALUE]... MODULE ARGUMENT... - once, and for no longer than that
step() {
  local name=$part.$1 limit=$2 left=$((end - SECONDS)) start=$SECONDS variables=() code before
  shift 2
  while [[ $1 == *=* ]]; do
    variables+=("$1")
    shift
  done
  before=$(cat "$steps/$name.command" 2>/dev/null)
  if [[ $before != "${variables[*]} $*" ]]; then
    rm -f "$steps/$name".{json,begun.json}
  elif [[ -e $steps/$name.json ]]; then
    echo "== $name: done before"
    return
  fi
  rm -f "$steps/$name".{log,seconds}
  echo "${variables[*]} $*" >"$steps/$name.command"
  if ((left < 10)); then
    echo "== $name: no time left; the same command again goes on here"
    gather
    return
  fi
  echo "== $name"
  env "${variables[@]}" timeout $((limit < left ? limit : left)) "$python" -m "$@" \
    --json="$steps/$name.begun.json" 2>"$steps/$name.log" &
  child=$!
  wait "$child"
  code=$?
  child=
  echo $((SECONDS - start)) >"$steps/$name.seconds"
  if ((code == 0)); then
    [[ -e $steps/$name.begun.json ]] || echo null >"$steps/$name.begun.json"
    mv "$steps/$name.begun.json" "$steps/$name.json"
  else
    echo "ended with $code" >>"$steps/$name.log"
    tail -n 3 "$steps/$name.log"
  fi
  gather
}

# or SMALL LARGE - the first if everything is to be small
or() { [[ -n ${SMALL:-} ]] && echo "$1" || echo "$2"; }

nvidia-smi --query-gpu=name,driver_version,clocks.max.sm --format=csv,noheader >"$steps/card" 2>/dev/null ||
  rm -f "$steps/card"
photographs=demo:caltech15/train weights=() large=()
[[ -d $kit/photographs/caltech15 ]] && photographs=folder:$kit/photographs/caltech15
[[ -d $kit/encoders/resnet18_tin64 ]] && weights=(--weights="$kit/encoders/resnet18_tin64")
[[ -d $kit/photographs/dtd ]] && large=(--folder="$kit/photographs/dtd")
times=$(or 1 30) # 120 photographs are too few to measure with
((${#large[@]})) || times=$(or 1 4)
side=$(or 32 224) batch=$(or 4 128) rounds=$(or 1 5)
gather

case $part in
correctness)
  compute=(benchmarks.correctness --photographs="$photographs" "${weights[@]}")
  compute+=(--num_images="$(or 30 750)" --num_vit="$(or 15 75)" --num_rows="$(or 8 64)")
  same=XLA_FLAGS=--xla_gpu_deterministic_ops=true
  step cpu 150 JAX_PLATFORMS=cpu "${compute[@]}" --reference --compute="$steps/cpu.npz"
  step device 180 "$same" "${compute[@]}" --compute="$steps/device.npz"
  step again 150 "$same" JAX_COMPILATION_CACHE_DIR="$steps/again" "${compute[@]}" --compute="$steps/again.npz"
  rm -f "$steps/$part.compared.json" # it takes seconds, and the files may be new
  step compared 30 JAX_PLATFORMS=cpu benchmarks.correctness \
    --compare="$steps/cpu.npz,$steps/device.npz,$steps/again.npz"
  ;;
images)
  kernel=(benchmarks.probe_kernel --batch_size="$batch" --num_probes="$(or 2 10)" --rounds="$rounds")
  all=$(or resnet18 resnet18,vit_base_patch16_224,resnet50,vit_small_patch16_224)
  step end_to_end 170 benchmarks.prune_end_to_end "${large[@]}" --num_images="$(or 20 120)" \
    --repeat="$(or 1 10)" --batch_size="$batch" --image_size="$side" --encoders=resnet18 \
    --dtype=bfloat16 --by="$(or 'dlc_jax 5' 'dlc_jax 50,released,dlc_jax auto'),good torch"
  step kernel 150 "${kernel[@]}" --encoders="$all" --compiled="$(or false true)"
  step train 80 benchmarks.train_step --encoders="$(or resnet18 resnet50)" --image_size="$side" \
    --batch_size="$batch" --dtypes=bfloat16 --compiled="$(or false true)" --rounds="$rounds"
  settings=(--dtypes=bfloat16 --notorch --chunks="$(or 1,2 1,5,10)" --unrolls="$(or 1,2 1,2,5)")
  settings+=(--attentions=,cudnn)
  step settings 120 "${kernel[@]}" "${settings[@]}" \
    --encoders="$(or resnet18 vit_base_patch16_224,resnet18)"
  step precision 60 benchmarks.precision --dataset="$photographs" "${weights[@]}" \
    --num_probes="$(or 2 50)" --image_size="$(or 32 64)"
  step decode 40 benchmarks.decode "${large[@]}" --repeat="$times" --rounds="$(or 1 3)"
  step overlap 60 benchmarks.overlap "${large[@]}" --repeat="$times" --image_size="$side" \
    --batch_size="$(or 16 128)" --num_probes="$(or 1 50)" --rounds="$(or 1 3)"
  flags=(none= latency_hiding=--xla_gpu_enable_latency_hiding_scheduler=true
    no_command_buffers=--xla_gpu_enable_command_buffer= no_autotuning=--xla_gpu_autotune_level=0)
  for flag in "${flags[@]}"; do
    step "flag_${flag%%=*}" 40 XLA_FLAGS="${flag#*=}" "${kernel[@]}" --dtypes=bfloat16 --notorch \
      --encoders="$(or resnet18 resnet50)"
  done
  ;;
text)
  tokens=(--length="$(or 256 1024)" --rows="$(or 2 8)" --rounds="$(or 1 3)")
  llama=(benchmarks.llm_probes "${tokens[@]}" --dtypes=bfloat16)
  [[ -n ${SMALL:-} ]] && llama+=(--width=128) || llama+=(--paper=meta-llama/Meta-Llama-3-8B)
  step llama 200 "${llama[@]}" --depth="$(or 2 0)" --attentions=,cudnn,cudnn_causal --notorch
  step llama_torch 90 "${llama[@]}" --depth="$(or 1 4)"
  step llama_1b 90 benchmarks.llm_probes "${tokens[@]}" --dtypes=bfloat16 --width="$(or 128 2048)" \
    --depth="$(or 1 22)" --attentions=,cudnn_causal --notorch
  for name in $(or resnet18 "resnet50 vit_base_patch16_224"); do
    step "memory_$name" 60 benchmarks.memory --encoders="$name" --dtype=bfloat16 --side="$side" \
      --batch_sizes="$(or 2 32,128,512)" --num_probes="$(or 2 50)"
  done
  step select 60 benchmarks.select --num="$(or 1000 1000000)"
  ;;
esac
"$python" - "$out/$part.json" <<'PYTHON'
import json
import sys

steps = json.load(open(sys.argv[1]))["steps"]
rows = [row for step in steps.values() if isinstance(step.get("found"), list) for row in step["found"]]
failed = [row for row in rows if not row.get("holds", True)]
for row in failed:
    print(f"does not hold: {row['name']}: {row['found']:.4g}, expected {row['expected']}")
missing = [name for name, step in steps.items() if not step["ended"]]
print("written:", sys.argv[1], "; not ended:", ", ".join(missing) or "none")
sys.exit(bool(failed or missing))
PYTHON
