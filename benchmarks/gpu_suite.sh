#!/usr/bin/env bash
# All that a GPU is needed for, by one command; the stages may take 525 s together:
#
#   benchmarks/gpu_suite.sh OUT_DIR              builds, tests, times, profiles; files in OUT_DIR after every stage
#   benchmarks/gpu_suite.sh --dry-run OUT_DIR    says what it would do
#
# A stage that fails, is missing a tool or runs out of its time is recorded, and the next one begins. Settings by the
# environment: PYTHON, the interpreter that has torch (python3); TOTAL, seconds in all (525); STAGES, some of those
# below; PEERS, a folder with fast_jl's source archive; COMMIT, where the source is no git checkout; WORK, a folder for
# what is not kept (build/gpu_suite).
set -uo pipefail

dry_run=false
if [ "${1:-}" = --dry-run ]; then
  dry_run=true
  shift
fi
if [ $# -ne 1 ]; then
  echo "usage: benchmarks/gpu_suite.sh [--dry-run] OUT_DIR" >&2
  exit 2
fi
mkdir -p "$1"
out=$(cd "$1" && pwd)
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
root=$PWD
python=${PYTHON:-python3}
total=${TOTAL:-525}
mkdir -p "${WORK:=build/gpu_suite}"
work=$(cd "$WORK" && pwd)
export PYTHONPATH="$root:$work/peers${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
export PATH="$PATH:/usr/local/cuda/bin"

# ---- stages: each is a function; its last line of output is what the report says of it ----

stage_machine() {
  nvidia-smi --query-gpu=name,driver_version,compute_cap,memory.total,clocks.sm,clocks.mem,power.limit --format=csv \
    | tee "$work/gpu.csv"
  nvcc --version | tail -n 2
  "$python" -c 'import sys, torch; print("Python", sys.version.split()[0], "torch", torch.__version__)'
}

# 9.0 -> 90a-real: code for the GPU at hand alone takes a third of the time.
architecture() {
  local capability
  capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1)
  capability=${capability//./}
  case $capability in
    90) echo 90a-real ;;
    [1-9]*) echo "$capability-real" ;;
    *) return 1 ;;
  esac
}

stage_build() {
  local arch
  arch=$(architecture) || { echo "no GPU is visible"; return 1; }
  build_peers > "$work/peers_build.log" 2>&1 &  # one file that takes as long as ours together
  FERRET_CUDA=ON CMAKE_ARGS="-DFERRET_TESTS=ON -DCMAKE_CUDA_ARCHITECTURES=$arch" "$python" setup.py build_ext --inplace \
    || return 1
  wait
  cat build/*/kernel_resources.txt
  echo "built for $arch"
}

device_test() {
  local found
  found=$(find build -name test_cuda_device -type f -perm -u+x -printf '%T@ %p\n' | sort -n | tail -n 1)
  echo "${found#* }"
}

stage_answers() {
  local program
  program=$(device_test)
  [ -n "$program" ] || { echo "test_cuda_device was not built"; return 1; }
  "$program" tests/golden.txt
}

# The operators' own tests come first; those around them need packages that a machine with torch may lack.
stage_tests() {
  local found="" failed=0 error
  error=$(why_not ferret_ext) || { echo "ferret_ext cannot be imported: $error"; return 1; }
  run_tests tests/native || failed=1
  if error=$(why_not transformers ferret_ext.federated.cli); then
    run_tests tests/federated tests/remote || failed=1
  else
    found+="; tests/federated and tests/remote left out: $error"
    [[ $error == "ModuleNotFoundError: "* && $error != *"'ferret_ext"* ]] || failed=1  # a package that may be missing
  fi
  echo "${found#; }"
  return $failed
}

# Fails where one of these modules cannot be imported, and says why; the traceback goes to the log.
why_not() {
  local module traceback code
  for module in "$@"; do
    traceback=$("$python" -c "import $module" 2>&1) && continue
    code=$?
    echo "$traceback" >&2
    tail -n 1 <<< "${traceback:-exit status $code}"
    return 1
  done
}

run_tests() {
  local code=0
  "$python" -m pytest -q -p no:cacheprovider -m cuda "$@" --durations=5 | tee "$work/pytest.log" || code=1
  tail -n 1 "$work/pytest.log" | grep -q '[1-9][0-9]* passed' || code=1  # not if all are skipped
  found+="; $*: $(tail -n 1 "$work/pytest.log")"
  return $code
}

# fast_jl 0.1.3 asks for an architecture that CUDA 13 no longer knows, and for cuRAND's headers, which come with torch.
build_peers() {
  local archive arch headers
  archive=$(find "${PEERS:-/nonexistent}" -name 'fast_jl-*.tar.gz' 2> /dev/null | head -n 1)
  [ -n "$archive" ] || return 0
  arch=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1)
  rm -rf "$work/peers" && mkdir -p "$work/peers" && tar xzf "$archive" -C "$work/peers" --strip-components=1 || return 1
  sed -i "s/^environ\\['TORCH_CUDA_ARCH_LIST'\\].*/environ['TORCH_CUDA_ARCH_LIST'] = '$arch'/" "$work/peers/setup.py"
  headers=$("$python" -c 'import torch, pathlib; print(pathlib.Path(torch.__file__).parents[1] / "nvidia" / "cu13" / "include")')
  (cd "$work/peers" && CPATH="$headers" "$python" setup.py build_ext --inplace)
}

stage_peers() {
  cat "$work/peers_build.log"
  "$python" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("fast_jl") is None)' \
    || { echo "left out: fast_jl is not installed, nor built from a source archive in PEERS"; return 0; }
  "$python" -c 'import torch, fast_jl; print(fast_jl.__name__, "is ready")'
}

stage_bench() {
  "$python" benchmarks/bench_gpu.py --json "$work/bench.json" --budget "$((budget - 15))"
}

# A round of a 7B model on each path, then, in the time left, one whose start is in host memory.
stage_round() {
  local path failed="" begin=$SECONDS left
  "$python" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("transformers") is None)' \
    || { echo "left out: transformers is not installed"; return 0; }
  for path in mma simt; do
    play_round "$path" "$((budget / 2))" "$work/round-$path.json" --trained 2 || failed+=" $path (exit status $?)"
  done
  left=$((budget - 2 - SECONDS + begin))
  if [ $left -lt 20 ]; then
    echo "no time left for a start in host memory"
  else
    play_round mma $left "$work/round-host.json" --trained 1 --start-on-host || failed+=" start on host (exit status $?)"
  fi
  [ -z "$failed" ] || { echo "failed:$failed"; return 1; }
}

# play_round PATH SECONDS JSON [OPTION ..]
play_round() {
  local path=$1 seconds=$2 json=$3
  FERRET_CUDA_PATH=$path timeout "$seconds" "$python" benchmarks/bench_round.py --shape llama-7b --device cuda \
    --steps 10 --accumulation 4 "${@:4}" --json "$json"
}

stage_micro() {
  local arch
  arch=$(architecture) || { echo "no GPU is visible"; return 1; }
  arch=${arch%-real}
  nvcc -O3 -std=c++17 --fmad=false -gencode="arch=compute_$arch,code=sm_$arch" -I csrc benchmarks/micro/rates.cu \
    -o "$work/rates" || return 1
  "$work/rates" | tee "$work/micro.jsonl"
}

# The clocks stay as they are, and whole sections are asked for, because names of single counters change. Only the bytes
# of device memory, whose names do not, are asked for by themselves; bank conflicts come with the tables.
stage_profile() {
  command -v ncu > /dev/null || { echo "left out: ncu is not installed"; return 0; }
  ncu --clock-control none --profile-from-start off --kernel-name 'regex:(project|project_matrix|apply|apply_matrix)_kernel' --force-overwrite \
    --section SpeedOfLight --section ComputeWorkloadAnalysis --section MemoryWorkloadAnalysis \
    --section MemoryWorkloadAnalysis_Tables --metrics dram__bytes_read.sum,dram__bytes_write.sum \
    --section InstructionStats --section WarpStateStats --section SchedulerStats --section LaunchStats \
    --section Occupancy --export "$out/profile.ncu-rep" "$python" benchmarks/bench_gpu.py --profile || return 1
  ncu --import "$out/profile.ncu-rep" --csv --page raw > "$work/profile.csv" || return 1
  echo "$(($(wc -l < "$work/profile.csv") - 2)) kernels"
}

stage_sanitizer() {
  local program tool failed=0
  command -v compute-sanitizer > /dev/null || { echo "left out: compute-sanitizer is not installed"; return 0; }
  program=$(device_test)
  [ -n "$program" ] || { echo "test_cuda_device was not built"; return 1; }
  for tool in memcheck racecheck initcheck; do
    timeout "$((budget / 3))" compute-sanitizer --tool "$tool" --error-exitcode 9 "$program" tests/golden.txt --small \
      || { echo "$tool: exit status $?"; failed=1; }
  done
  [ $failed = 0 ] && echo "memcheck, racecheck and initcheck found nothing"
  return $failed
}

# What a stage may take, in seconds; all of them together are cut to `total`. First come those that show what an emulator
# cannot, races and rates, and last a round, which takes what is left and for which some is kept.
declare -A budgets=([machine]=30 [build]=180 [answers]=30 [tests]=90 [sanitizer]=90 [bench]=150 [micro]=45 [profile]=70
  [peers]=30 [round]=120)
stages=${STAGES:-machine build answers tests sanitizer bench micro profile peers round}

kept=0  # for a round that is still to come
[[ " $stages " == *" round "* ]] && kept=80

report() { "$python" benchmarks/gpu_report.py "$work" "$out"; }

run_stage() {
  local name=$1 begin=$SECONDS left=$((total - SECONDS)) code=0
  [ "$name" = round ] && kept=0
  left=$((left - kept))
  budget=${budgets[$name]}
  [ $left -lt "$budget" ] && budget=$left
  if [ "$budget" -lt 10 ]; then
    printf '%s\t-1\t0\tno time left\n' "$name" >> "$work/stages.tsv"
    return
  fi
  printf '\n== %s (at most %d s; %d s so far)\n' "$name" "$budget" "$SECONDS" | tee -a "$out/suite.log"
  # `timeout` runs programs only, so the stage is this script again, in a process of its own.
  timeout --kill-after=5 "$budget" env SUITE_STAGE="$name" SUITE_BUDGET="$budget" PYTHON="$python" WORK="$work" \
    bash "$root/benchmarks/gpu_suite.sh" "$out" > "$work/$name.log" 2>&1 < /dev/null || code=$?
  tee -a "$out/suite.log" < "$work/$name.log" | tail -n 25
  printf '%s\t%d\t%d\t%s\n' "$name" "$code" "$((SECONDS - begin))" "$(grep -v '^[[:space:]]*$' "$work/$name.log" | tail -n 1 \
    | tr '\t' ' ')" >> "$work/stages.tsv"
  report > /dev/null 2>> "$out/suite.log" || echo "the report failed: see suite.log"
}

if [ -n "${SUITE_STAGE:-}" ]; then
  budget=$SUITE_BUDGET
  "stage_$SUITE_STAGE"
  exit
fi

if $dry_run; then
  for name in $stages; do
    printf '%-10s at most %3d s\n' "$name" "${budgets[$name]}"
  done
  echo "in all     at most $total s; results in $out: gpu.json, table.txt, suite.log, profile.ncu-rep"
  exit
fi

rm -f "$work"/{peers_build.log,stages.tsv,gpu.csv,bench.json,round-simt.json,round-mma.json,round-host.json,micro.jsonl,profile.csv} "$out/suite.log"
for name in $stages; do
  [ -n "${budgets[$name]:-}" ] || { echo "no such stage: $name" >&2; exit 2; }
  run_stage "$name"
done
printf '\n'
report
