#!/usr/bin/env bash
# What waits for a GPU, without a network, in pieces that each end within LIMIT seconds (560):
#
#   benchmarks/run_gpu.sh build-check   build, every kernel against float64, the GPU tests
#   benchmarks/run_gpu.sh kernels       every op against its peers, time and memory, bfloat16 at T = 2048
#   benchmarks/run_gpu.sh sizes         the two matmul-bound ops at other T, and in float32
#   benchmarks/run_gpu.sh revise        one step of the reviser at the shapes of 0.5B, 1.5B and 7B models
#   benchmarks/run_gpu.sh attention     the same at 1.5B with sdpa and with flex_attention
#   benchmarks/run_gpu.sh engines       sampling with transformers and with vLLM, where vLLM is installed
#   benchmarks/run_gpu.sh tune          other configurations of the kernels
#   benchmarks/run_gpu.sh cubins        registers, shared memory and spills with this machine's compilers
#   benchmarks/run_gpu.sh all           all of it, a piece after the other
#
# Needs python3 with torch (CUDA) and triton, setuptools, CMake, Ninja, pybind11 and nvcc; a piece that finds the package
# not built builds it. Wheels of peers in $WHEELS (wheels/) are installed to a folder of their own. Each piece leaves one
# file in $OUT (benchmarks/results), PIECE.tar.gz, written anew after every step: JSON that grows with every measurement, a
# log a step, and one line a step in summary.jsonl. A step that fails or finds no time left is recorded and the rest
# still runs; the exit status is the number of such steps.
piece=${1:-}
case $piece in
  build-check | kernels | sizes | revise | attention | engines | tune | cubins) ;;
  all)
    failed=0
    for one in build-check kernels sizes revise attention engines tune cubins; do
      [ -n "${TINY:-}" ] && [ "$one" = cubins ] && continue # compiles everything on any machine already
      "$0" "$one" || failed=$((failed + $?))
    done
    exit "$failed"
    ;;
  *)
    sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"
    exit 2
    ;;
esac

tiny=${TINY:-}
deadline=$((SECONDS + ${LIMIT:-560}))
failed=0
results=${OUT:-benchmarks/results}
mkdir -p "$results"
results=$(cd "$results" && pwd)
out=$(mktemp -d)
export PYTHONUNBUFFERED=1
trap 'pack; rm -rf "$out"' EXIT
trap 'exit 1' INT TERM

pack() { # a reader, or the end of the machine, finds the old file or the new one
  tar -czf "$results/$piece.part" -C "$out" . && mv "$results/$piece.part" "$results/$piece.tar.gz"
}

# step NAME SECONDS COMMAND...
step() {
  local name=$1 limit=$2 begin=$SECONDS status
  shift 2
  local left=$((deadline - SECONDS))
  if [ "$left" -lt 5 ]; then
    status=-1
    echo "no time left" > "$out/$name.log"
  else
    timeout -k 5 "$((limit < left ? limit : left))" "$@" > "$out/$name.log" 2>&1
    status=$?
  fi
  [ "$status" -eq 0 ] || failed=$((failed + 1))
  printf '{"piece": "%s", "step": "%s", "status": %d, "seconds": %d}\n' "$piece" "$name" "$status" $((SECONDS - begin)) |
    tee -a "$out/summary.jsonl"
  pack
  [ "$status" -eq 0 ] || tail -n 15 "$out/$name.log"
  return "$status"
}

build() {
  local site=${TMPDIR:-/tmp}/latentrevise-peers
  export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}" PIP_ROOT_USER_ACTION=ignore PIP_BREAK_SYSTEM_PACKAGES=1
  [ -z "$tiny" ] || return 0
  if compgen -G "${WHEELS:-wheels}/*.whl" > /dev/null && [ ! -d "$site" ]; then
    step peers 30 python3 -m pip install -q --no-index --no-deps --target "$site" "${WHEELS:-wheels}"/*.whl
  fi
  python3 -c 'from latentrevise.kernels import native; exit(native.unavailable("cuda") is not None)' 2> /dev/null && return 0
  local archs
  archs=$(python3 -c 'import torch; a, b = torch.cuda.get_device_capability(); print(f"{a}{b}{chr(97) * (a >= 9)}-real")') || archs=
  LATENTREVISE_CUDA=1 LATENTREVISE_CUDA_ARCHS=${LATENTREVISE_CUDA_ARCHS:-$archs} CMAKE_BUILD_PARALLEL_LEVEL=$(nproc) \
    step build 120 python3 -m pip install --no-build-isolation --no-deps --no-index -v -e . ||
    echo "not built: Triton needs no build, the clone runs as it is without the CUDA backends"
}

measure() { # measure NAME SECONDS OPTIONS...: a benchmark into NAME.json
  local name=$1 limit=$2
  shift 2
  [ -z "$tiny" ] || set -- "$1" --T 16 --d 24 --vocab 300 --dtype float32 --budget 0 --no-compile
  step "$name" "$limit" python3 -m benchmarks "$@" --json "$out/$name.json"
}

checked() { # checked OP BACKEND SECONDS: against float64
  step "check-$1-$2" "$3" python3 -m benchmarks.check ${tiny:+--tiny} --op "$1" --backend "$2" --json "$out/check-$1-$2.json"
}

build_check() {
  # A process for each op and backend, with its own limit: a hang or an illegal access costs one. Hopper comes last.
  local op
  if [ -n "$tiny" ]; then
    for op in vertex_oracle hull_step; do checked "$op" cpu 20; done
  else
    for op in vertex_oracle linear_logprob hull_step mixture_embed plausible_vertices softmax_mixture entropic_step; do
      checked "$op" triton 20
    done
    for op in vertex_oracle linear_logprob mixture_embed; do checked "$op" cuda 10; done
  fi
  local workers=() tests=(tests/kernels -m gpu)
  python3 -c 'import xdist' 2> /dev/null && workers=(-n 8)
  [ -z "$tiny" ] || tests=(tests/kernels/test_dispatch.py -k backend)
  step tests 250 python3 -m pytest -q -p no:cacheprovider --junitxml "$out/tests.xml" "${workers[@]}" "${tests[@]}"
  [ -n "$tiny" ] || checked vertex_oracle hopper 10
}

kernels() {
  local large=(--dtype bfloat16 --T 2048 --budget 1.5)
  measure vertex_oracle 90 vertex_oracle "${large[@]}" --d 896 2048 4096 --backend triton cuda hopper
  measure linear_logprob 150 linear_logprob "${large[@]}" --d 896 2048 4096 --backend triton cuda
  measure hull_step 40 hull_step "${large[@]}" --d 896 4096
  measure softmax_mixture 40 softmax_mixture "${large[@]}" --d 896
  measure plausible_vertices 40 plausible_vertices "${large[@]}" --d 896 4096
  measure entropic_step 30 entropic_step "${large[@]}" --d 896 4096
  measure mixture_embed 30 mixture_embed "${large[@]}" --d 896 4096 --backend triton cuda
}

sizes() {
  local other=(--dtype bfloat16 --budget 1 --no-compile) exact=(--dtype float32 --budget 1 --no-compile --T 256 2048 --d 896)
  measure vertex_oracle_sizes 100 vertex_oracle "${other[@]}" --T 16 256 16384 --d 896 2048 --backend triton cuda hopper
  measure linear_logprob_sizes 150 linear_logprob "${other[@]}" --T 16 256 16384 --d 896 2048 --backend triton cuda
  measure vertex_oracle_float32 70 vertex_oracle "${exact[@]}"
  measure linear_logprob_float32 90 linear_logprob "${exact[@]}"
}

reviser() { # reviser SECONDS SHAPE [--attention KIND OPTIONS...]
  local limit=$1 name=revise-$2${4:+-$4} options=(--dtype bfloat16 --rounds 3 --shapes "${@:2}")
  [ -z "$tiny" ] || options=(--shapes 0.5B --layers 1 --vocab 2000 --rounds 1 --no-loop)
  step "$name" "$limit" python3 -m benchmarks revise "${options[@]}" --json "$out/$name.json"
}

revise() {
  reviser 100 0.5B
  reviser 140 1.5B
  reviser 190 7B
}

attention() {
  reviser 200 1.5B --attention sdpa --no-loop --T 1024
  reviser 200 1.5B --attention flex_attention --no-loop --T 1024
}

engines() {
  if ! python3 -c 'import vllm' 2> "$out/engines.log"; then
    echo "engines: left out, vLLM cannot be imported here ($(tail -n 1 "$out/engines.log"))"
    return
  fi
  step engines 430 python3 -m benchmarks engines --json "$out/engines.json"
}

tune() {
  [ -z "$tiny" ] || export TRITON_INTERPRET=1 # a machine without a GPU tunes in the interpreter
  step tune 430 python3 -m benchmarks.tune ${tiny:+--tiny} --seconds 380 --json "$out/tune.json"
}

cubins() {
  step cubins 430 python3 -m benchmarks cubins --json "$out/cubins.json"
}

python3 - > "$out/machine.json" << 'PY'
import json, platform, torch
gpu = torch.cuda.is_available()
device = str(torch.cuda.get_device_properties(0)) if gpu else "no CUDA device"
versions = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda}
print(json.dumps({"platform": platform.platform(), "device": device} | versions))
PY
cat "$out/machine.json"
build
"${piece/-/_}"
echo "$piece: $failed failed"
exit "$failed"
