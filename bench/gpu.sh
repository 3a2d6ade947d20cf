#!/usr/bin/env bash
# On a CUDA machine, one command: builds the CUDA kernels, runs the GPU tests, compute-sanitizer on small cases, then the
# benchmarks. A short table comes last. Exit status 0 only if every stage passed; under 9 minutes in all.
#
#   PYTHON=python3   the Python whose environment has torch and pytest, and into which the package is built
#   OUT=DIR          where results go (default bench/results)
#   ROUNDS=40        rounds of each benchmark
#   DEVICE=cuda      "cpu" tries the script itself where there is no GPU
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1

PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
OUT=${OUT:-bench/results}
ROUNDS=${ROUNDS:-40}
DEVICE=${DEVICE:-cuda}
mkdir -p "$OUT" || exit 1
OUT=$(cd "$OUT" && pwd)
LOGS=$(mktemp -d)
REPORT=()

# stage NAME SECONDS COMMAND...: runs a command under a time limit; stops the script when it fails.
stage() {
  local name=$1 limit=$2 start=$SECONDS status
  shift 2
  echo "== $name"
  timeout --kill-after=10 "$limit" "$@" 2>&1 | tee "$LOGS/log"
  status=${PIPESTATUS[0]}
  if [ "$status" -ne 0 ]; then
    [ "$status" -eq 124 ] && echo "$name: over its limit of $limit s"
    echo "FAILED: $name (exit status $status)"
    exit 1
  fi
  REPORT+=("| $name | passed | $((SECONDS - start)) s |")
}

# pytest that must run tests: nothing collected or everything skipped is a failure too.
gpu_tests() {
  "$PYTHON" -m pytest tests/ops/test_cuda.py -q --no-header -p no:cacheprovider "$@" | tee "$LOGS/tests"
  [ "${PIPESTATUS[0]}" -eq 0 ] && grep -qE '[0-9]+ passed' "$LOGS/tests"
}

sanitizer() {
  local tool
  for tool in compute-sanitizer "${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer" \
    "${CUDA_HOME:-/usr/local/cuda}/compute-sanitizer/compute-sanitizer"; do
    command -v "$tool" && return
  done
  return 1
}

if [ "$DEVICE" = cuda ]; then
  stage "build" 150 env SYNTHFAST_CUDA=1 "$PYTHON" -m pip install --quiet --no-build-isolation --no-deps -e .
  stage "device" 30 "$PYTHON" -c '
import sys, torch
from synthfast import ops
print(torch.__version__, torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device", ops.build_facts())
sys.exit(not torch.cuda.is_available() or ops.cuda_problem is not None)'
  export -f gpu_tests
  export PYTHON LOGS
  stage "GPU tests" 100 bash -c gpu_tests
  if memcheck=$(sanitizer); then
    # Without PyTorch's caching allocator every tensor is an allocation of its own, and reading past its end is seen.
    # API errors that PyTorch provokes and handles itself are not reported.
    stage "compute-sanitizer" 80 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
      "$memcheck" --tool memcheck --report-api-errors no --error-exitcode 1 \
      "$PYTHON" -m pytest tests/ops/test_cuda.py -q -x --no-header -p no:cacheprovider \
      -k "(test_philox and float16) or test_quantize_uint8_misaligned or (test_solver_step_large_and_misaligned) \
          or (test_solver_step_layouts and float32-float32) or test_solver_step_in_place"
  else
    echo "compute-sanitizer: not on PATH and not in ${CUDA_HOME:-/usr/local/cuda}; left out"
    REPORT+=("| compute-sanitizer | left out: not found | |")
  fi
fi
stage "benchmarks" 170 "$PYTHON" -m bench --ops --device "$DEVICE" --rounds "$ROUNDS" --out "$OUT"

echo
echo "| stage | result | time |"
echo "| --- | --- | --- |"
printf '%s\n' "${REPORT[@]}"
echo
sed -n '/^| benchmark | case/,$p' "$LOGS/log"
