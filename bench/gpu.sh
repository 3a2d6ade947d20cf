#!/usr/bin/env bash
# On a CUDA machine, one command: builds the CUDA kernels, runs the GPU tests, compute-sanitizer on small cases, then the
# benchmarks. A short table comes last. Exit status 0 only if every stage passed; under 10 minutes in all.
#
#   PYTHON=python    the Python whose environment has torch and pytest, and into which the package is built; if not given,
#                    that of .venv, else the first "python" or "python3" on PATH
#   OUT=DIR          where results go (default bench/results)
#   ROUNDS=N         rounds of each benchmark (default: each benchmark's own)
#   DEVICE=cpu       tries the script where there is no GPU: benchmarks of the operations only
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1

# The limits of the stages, in seconds, add up to 570.
BUILD=140 LOOK=20 TESTS=130 MEMCHECK=70 BENCHMARKS=210

first_python() {
  if [ -x .venv/bin/python ]; then echo .venv/bin/python; else command -v python || command -v python3; fi
}
PYTHON=${PYTHON:-$(first_python)}
OUT=${OUT:-bench/results}
DEVICE=${DEVICE:-cuda}
mkdir -p "$OUT" || exit 1
OUT=$(cd "$OUT" && pwd)
LOGS=$(mktemp -d)
trap 'rm -rf "$LOGS"' EXIT
REPORT=()

table() {
  echo
  echo "| stage | result | time |"
  echo "| --- | --- | --- |"
  printf '%s\n' "${REPORT[@]}"
}

# stage NAME SECONDS COMMAND...: runs a command under a time limit; stops the script when it fails.
stage() {
  local name=$1 limit=$2 start=$SECONDS status result=passed
  shift 2
  echo "== $name"
  # KILL goes to the whole group of processes; what outlived its parent would hold on to the pipe.
  timeout --signal=KILL "$limit" "$@" 2>&1 | tee "$LOGS/log"
  status=${PIPESTATUS[0]}
  if [ "$status" -eq 137 ]; then
    result="FAILED: over its limit of $limit s"
  elif [ "$status" -ne 0 ]; then
    result="FAILED: exit status $status"
  fi
  REPORT+=("| $name | $result | $((SECONDS - start)) s |")
  if [ "$status" -ne 0 ]; then
    table
    exit 1
  fi
}

# Names without spaces; a string, because functions run by "bash -c" get no arrays.
GPU_TESTS="tests/ops/test_cuda.py tests/ops/test_cuda_data.py tests/ops/test_cuda_attacks.py \
  tests/data/loaders/test_cuda_loaders.py tests/scoring/test_cuda_scores.py"

# pytest that must run tests: nothing collected or everything skipped is a failure too.
gpu_tests() {
  "$PYTHON" -m pytest $GPU_TESTS -q --no-header -p no:cacheprovider "$@" | tee "$LOGS/tests"
  [ "${PIPESTATUS[0]}" -eq 0 ] && grep -qE '[0-9]+ passed' "$LOGS/tests"
}

# Without PyTorch's caching allocator every tensor is an allocation of its own, and reading past its end is seen.
# API errors that PyTorch provokes and handles itself are not reported.
memory_check() {
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$TOOL" --tool memcheck --report-api-errors no --error-exitcode 1 \
    "$PYTHON" -m pytest $GPU_TESTS -q -x --no-header -p no:cacheprovider -k "$SELECTION" | tee "$LOGS/tests"
  [ "${PIPESTATUS[0]}" -eq 0 ] && grep -qE '[0-9]+ passed' "$LOGS/tests"
}
SELECTION="(test_philox and float16) or test_quantize_uint8_misaligned or test_solver_step_large_and_misaligned \
  or (test_solver_step_layouts and float32-float32) or test_solver_step_in_place \
  or (test_gather_augment and float16) or test_set_that_does_not_start_at_16_bytes \
  or (test_cuda_attacks and (test_misaligned or (test_layouts and float32)))"

sanitizer() {
  local toolkit=${CUDA_HOME:-/usr/local/cuda}
  command -v compute-sanitizer || command -v "$toolkit/bin/compute-sanitizer" ||
    command -v "$toolkit/compute-sanitizer/compute-sanitizer"
}

extent=()
if [ "$DEVICE" = cuda ]; then
  stage "build" $BUILD env SYNTHFAST_CUDA=1 "$PYTHON" -m pip install --quiet --no-build-isolation --no-deps -e .
  stage "device" $LOOK "$PYTHON" -c '
import sys, torch
from synthfast import ops
device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device"
print(torch.__version__, device, ops.build_facts(), ops.cuda_problem or "kernels loaded")
sys.exit(not torch.cuda.is_available() or ops.cuda_problem is not None)'
  export -f gpu_tests memory_check
  export PYTHON LOGS SELECTION GPU_TESTS
  stage "GPU tests" $TESTS bash -c gpu_tests
  if TOOL=$(sanitizer); then
    export TOOL
    stage "compute-sanitizer" $MEMCHECK bash -c memory_check
  else
    echo "compute-sanitizer: not on PATH and not in ${CUDA_HOME:-/usr/local/cuda}; left out"
    REPORT+=("| compute-sanitizer | left out: not found | |")
  fi
else
  extent=(--ops)
fi
stage "benchmarks" $BENCHMARKS "$PYTHON" -m bench --device "$DEVICE" --out "$OUT" ${extent[@]+"${extent[@]}"} \
  ${ROUNDS:+--rounds "$ROUNDS"}
table
echo
sed -n '/^| benchmark | case/,$p' "$LOGS/log"
