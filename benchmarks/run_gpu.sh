#!/usr/bin/env bash
# Everything that waits for a GPU, in one command and without a network: build, tests, benchmarks.
#
#   benchmarks/run_gpu.sh [quick]
#
# Needs Python with torch (CUDA), triton, CMake, Ninja, pybind11 and nvcc. Results (JSON, logs, one line a step in
# summary.txt) go to $OUT, by default benchmarks/results. A step that fails is recorded and the rest still runs; the exit
# status is the number of failed steps.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-benchmarks/results}
mkdir -p "$out"
out=$(cd "$out" && pwd)
quick=${1:-}
failed=0
: > "$out/summary.txt"

step() { # step NAME SECONDS COMMAND...
  local name=$1 limit=$2 begin=$SECONDS status
  shift 2
  timeout "$limit" "$@" > "$out/$name.log" 2>&1
  status=$?
  [ "$status" -eq 0 ] || failed=$((failed + 1))
  echo "$name: $([ "$status" -eq 0 ] && echo ok || echo "FAILED ($status)") after $((SECONDS - begin)) s" | tee -a "$out/summary.txt"
  return "$status"
}

# The source tree is used where it is: an import path with latentrevise and latentrevise.kernels, libraries built in place.
build() {
  set -e
  local tree=${LATENTREVISE_BUILD_DIR:-/tmp/latentrevise-build}
  cmake -S . -B "$tree" -G Ninja -DCMAKE_BUILD_TYPE=Release -DPython_EXECUTABLE="$(command -v python3)" \
    -Dpybind11_DIR="$(python3 -c 'import pybind11; print(pybind11.get_cmake_dir())')" -DLATENTREVISE_CUDA=ON \
    -DCMAKE_CUDA_ARCHITECTURES="${LATENTREVISE_CUDA_ARCHS:-80-real;90a-real;80-virtual}"
  cmake --build "$tree" --parallel
  cp "$tree"/modules/_c*.so kernels/
  rm -rf "$tree/site" && mkdir -p "$tree/site/latentrevise"
  ln -s "$PWD"/latentrevise/* "$tree/site/latentrevise/"
  rm -f "$tree/site/latentrevise/kernels"
  ln -s "$PWD/kernels" "$tree/site/latentrevise/kernels"
}
export -f build
export PYTHONPATH="${LATENTREVISE_BUILD_DIR:-/tmp/latentrevise-build}/site:$PWD${PYTHONPATH:+:$PYTHONPATH}"

python3 - > "$out/machine.txt" 2>&1 << 'PY'
import platform, torch
print(platform.platform(), "python", platform.python_version(), "torch", torch.__version__)
print(torch.cuda.get_device_properties(0) if torch.cuda.is_available() else "no CUDA device")
PY
cat "$out/machine.txt"

step build 600 bash -c build || { echo "the libraries were not built; see $out/build.log"; exit "$failed"; }
# Not every machine has the test tools; a check of the kernels against float64 must not depend on them.
step check 300 python3 -m benchmarks.check
if python3 -c 'import pytest, hypothesis' 2> /dev/null; then
  step tests 600 python3 -m pytest -q tests/kernels -p no:cacheprovider -k "not interpreter and not instruction_set"
else
  echo "tests: skipped, pytest or hypothesis is not installed" | tee -a "$out/summary.txt"
fi
step cubins 600 python3 -m benchmarks cubins --json "$out/cubins.json"
sizes=()
[ "$quick" = quick ] && sizes=(--T 2048 --d 896 2048 --dtype bfloat16 --budget 3)
for name in vertex_oracle linear_logprob hull_step entropic_step mixture_embed; do
  step "$name" 900 python3 -m benchmarks "$name" --json "$out/$name.json" --budget 5 "${sizes[@]}"
done
step vertex_oracle_backends 600 python3 -m benchmarks vertex_oracle --dtype bfloat16 --backend triton cuda \
  --json "$out/vertex_oracle_backends.json" --budget 5 "${sizes[@]}"
step tune 600 python3 -m benchmarks.tune
for name in vertex_oracle linear_logprob; do tail -n 40 "$out/$name.log"; done
cat "$out/summary.txt"
exit "$failed"
