#!/usr/bin/env bash
# What waits for a GPU, without a network: one piece a call, or several that share its LIMIT of seconds (560).
#
#   benchmarks/run_gpu.sh build-check   build, every kernel against float64, the GPU tests
#   benchmarks/run_gpu.sh kernels       every op against its peers, time and memory, bfloat16 at T = 2048
#   benchmarks/run_gpu.sh sizes         the two matmul-bound ops at other T, and in float32
#   benchmarks/run_gpu.sh revise        one step of the reviser at the shapes of 0.5B, 1.5B and 7B models, as a graph too
#   benchmarks/run_gpu.sh attention     the same at 1.5B with sdpa and with flex_attention
#   benchmarks/run_gpu.sh sanitize      compute-sanitizer on the CUDA kernels' smallest cases, where it is installed
#   benchmarks/run_gpu.sh engines       sampling with transformers and with vLLM, where vLLM is installed
#   benchmarks/run_gpu.sh tune          other configurations of the kernels
#   benchmarks/run_gpu.sh cubins        registers, shared memory and spills with this machine's compilers
#   benchmarks/run_gpu.sh all           all of it, each piece with a LIMIT of its own
#
#   --only REGEX    only the steps whose name the expression matches
#   --rehearse      every step on a CPU, as small as can be: Triton in its interpreter, CUDA in the tests' emulation
#
# Needs python3 with torch (CUDA) and triton; for the CUDA backends also setuptools, CMake, Ninja, pybind11 and nvcc. A
# piece that finds the package not built builds it; where that fails it builds for the CPU alone, and where that fails
# too the clone runs as it is: Triton needs no build. Wheels of peers in $WHEELS (wheels/; `make wheels-gpu`) are
# installed to a folder of their own. Each piece leaves one file in $OUT (benchmarks/results), PIECE.tar.gz, written anew
# after every step: JSON that grows with every measurement, a log a step, and one line a step in summary.jsonl. A step
# that fails or finds no time left is recorded and the rest still runs; the exit status is the number of such steps.
all=(build-check kernels sizes revise attention sanitize engines tune cubins)
rehearsing=${REHEARSING:-} only=${ONLY:-} pieces=()
while [ $# -gt 0 ]; do
  case $1 in
    --rehearse) rehearsing=1 ;;
    --only)
      only=${2:-}
      shift
      ;;
    *) pieces+=("$1") ;;
  esac
  shift
done
for piece in "${pieces[@]:-none}"; do
  if [[ " all ${all[*]} " != *" $piece "* ]]; then
    sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"
    exit 2
  fi
done

if [ "${#pieces[@]}" -gt 1 ] || [ "$piece" = all ]; then
  deadline=$((SECONDS + ${LIMIT:-560})) failed=0
  SCRATCH=$(mktemp -d)
  trap 'rm -rf "$SCRATCH"' EXIT
  export SCRATCH REHEARSING=$rehearsing ONLY=$only
  if [ "$piece" = all ]; then
    for one in "${all[@]}"; do "$0" "$one" || failed=$((failed + $?)); done
  else
    for one in "${pieces[@]}"; do LIMIT=$((deadline - SECONDS)) "$0" "$one" || failed=$((failed + $?)); done
  fi
  exit "$failed"
fi

slower=${rehearsing:+6} # an emulated kernel takes its time, and the machine may be a busy one
deadline=$((SECONDS + ${LIMIT:-560} * ${slower:-1}))
failed=0
results=${OUT:-benchmarks/results}
mkdir -p "$results"
results=$(cd "$results" && pwd)
out=$(mktemp -d)
scratch=${SCRATCH:-$out.scratch} # what the pieces of a call share
mkdir -p "$scratch"
export PYTHONUNBUFFERED=1
trap 'pack; rm -rf "$out" "$out.scratch"' EXIT
trap 'exit 1' INT TERM
[ -z "$rehearsing" ] || export TRITON_INTERPRET=1

pack() { # a reader, or the end of the machine, finds the old file or the new one
  tar -czf "$results/$piece.part" -C "$out" . && mv "$results/$piece.part" "$results/$piece.tar.gz"
}

# step NAME SECONDS COMMAND...
step() {
  local name=$1 limit=$(($2 * ${slower:-1})) begin=$SECONDS status
  shift 2
  [[ $name =~ $only ]] || return 0
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

left_out() { # left_out WHAT WHY
  echo "$1: left out, $2" | tee -a "$out/left_out.log"
}

build() {
  local library=${rehearsing:+cpu} install=(python3 -m pip install --no-build-isolation --no-deps --no-index -v -e .) archs
  export PYTHONPATH="$scratch/peers${PYTHONPATH:+:$PYTHONPATH}" PIP_ROOT_USER_ACTION=ignore PIP_BREAK_SYSTEM_PACKAGES=1
  export CMAKE_BUILD_PARALLEL_LEVEL=${CMAKE_BUILD_PARALLEL_LEVEL:-$(nproc)}
  if compgen -G "${WHEELS:-wheels}/*.whl" > /dev/null && [ ! -d "$scratch/peers" ]; then
    step peers 30 python3 -m pip install -q --no-index --no-deps --target "$scratch/peers" "${WHEELS:-wheels}"/*.whl
  fi
  [ -e latentrevise/kernels ] || ln -sfn ../kernels latentrevise/kernels # some copies of a clone lack links
  python3 -c "from latentrevise.kernels import native; exit(native.unavailable('${library:-cuda}') is not None)" \
    2> /dev/null && return
  [ ! -e "$scratch/build-failed" ] || return # by the piece before, and nothing has changed
  if [ -z "$rehearsing" ]; then
    archs=$(python3 -c 'import torch; a, b = torch.cuda.get_device_capability(); print(f"{a}{b}{chr(97) * (a >= 9)}-real")') || archs=
    LATENTREVISE_CUDA=1 LATENTREVISE_CUDA_ARCHS=${LATENTREVISE_CUDA_ARCHS:-$archs} step build 80 "${install[@]}" && return
  fi
  touch "$scratch/build-failed"
  LATENTREVISE_CUDA=0 step build-cpu 40 "${install[@]}" ||
    echo "not built: Triton needs no build, the clone runs as it is without the compiled backends"
}

measure() { # measure NAME SECONDS OPTIONS...: a benchmark into NAME.json
  local name=$1 limit=$2
  shift 2
  [ -z "$rehearsing" ] || set -- "$@" --device cpu --T 16 --d 32 --vocab 300 --budget 0 --no-compile
  step "$name" "$limit" python3 -m benchmarks "$@" --json "$out/$name.json"
}

checked() { # checked NAME OP BACKEND SECONDS [PROGRAM...]: against float64, the smallest case under another program
  local name=$1-$2-$3 op=$2 backend=$3 limit=$4 run=(python3 -m benchmarks.check)
  shift 4
  [ -z "$rehearsing" ] || [ "$backend" = triton ] ||
    run=(python3 tests/kernels/emulated_cuda.py "$scratch/emulated" benchmarks.check)
  [ -z "$rehearsing" ] && [ $# -eq 0 ] || run+=(--tiny)
  step "$name" "$limit" "$@" "${run[@]}" --op "$op" --backend "$backend" --json "$out/$name.json"
}

build_check() {
  # A process for each op and backend, with its own limit: a hang or an illegal access costs one. Hopper comes last.
  local op
  for op in vertex_oracle linear_logprob hull_step mixture_embed plausible_vertices softmax_mixture entropic_step; do
    checked check "$op" triton 20
  done
  checked check mixture_embed cuda 10
  local workers=()
  python3 -c 'import xdist' 2> /dev/null && workers=(-n "$(($(nproc) < 8 ? $(nproc) : 8))")
  step tests 240 env -u TRITON_INTERPRET python3 -m pytest -q -p no:cacheprovider --junitxml "$out/tests.xml" \
    "${workers[@]}" tests/kernels -m gpu
  for op in vertex_oracle linear_logprob; do checked check "$op" hopper 10; done
}

kernels() {
  # A process a backend, Hopper last: each measures the floor beside it, which is what they are compared by.
  local large=(--dtype bfloat16 --T 2048 --budget 1.5) own=(--no-compile --only latentrevise eager)
  measure vertex_oracle 65 vertex_oracle "${large[@]}" --d 896 2048 4096 --backend triton
  measure linear_logprob 100 linear_logprob "${large[@]}" --d 896 2048 4096 --backend triton
  measure hull_step 40 hull_step "${large[@]}" --d 896 4096 --backend triton
  measure softmax_mixture 30 softmax_mixture "${large[@]}" --d 896 --backend triton
  measure plausible_vertices 40 plausible_vertices "${large[@]}" --d 896 4096 --backend triton
  measure entropic_step 30 entropic_step "${large[@]}" --d 896 4096 --backend triton
  measure mixture_embed 20 mixture_embed "${large[@]}" --d 896 4096 --backend triton
  measure mixture_embed_cuda 15 mixture_embed "${large[@]}" --d 896 4096 --backend cuda "${own[@]}"
  measure vertex_oracle_hopper 30 vertex_oracle "${large[@]}" --d 896 2048 4096 --backend hopper "${own[@]}"
  measure linear_logprob_hopper 45 linear_logprob "${large[@]}" --d 896 2048 4096 --backend hopper "${own[@]}"
}

sizes() {
  local other=(--dtype bfloat16 --budget 1 --no-compile --T 16 256 16384 --d 896 2048) own=(--only latentrevise eager)
  local exact=(--dtype float32 --budget 1 --no-compile --T 256 2048 --d 896 --backend triton)
  measure vertex_oracle_sizes 50 vertex_oracle "${other[@]}" --backend triton
  measure linear_logprob_sizes 110 linear_logprob "${other[@]}" --backend triton
  measure vertex_oracle_float32 60 vertex_oracle "${exact[@]}"
  measure linear_logprob_float32 80 linear_logprob "${exact[@]}"
  measure screening 25 screening --dtype bfloat16 float32 --T 2048 --d 896 2048
  measure vertex_oracle_sizes_hopper 30 vertex_oracle "${other[@]}" --backend hopper "${own[@]}"
  measure linear_logprob_sizes_hopper 45 linear_logprob "${other[@]}" --backend hopper "${own[@]}"
}

reviser() { # reviser SECONDS SHAPE [--attention KIND OPTIONS...]
  local limit=$1 name=revise-$2${4:+-$4} options=(--dtype bfloat16 --rounds 3 --shapes "${@:2}")
  [ -z "$rehearsing" ] || # bodies of real width take a CPU minutes
    options=(--dtype bfloat16 --shapes 0.5B "${@:3:2}" --layers 1 --vocab 500 --batch 1 --M 40 --prompt 8 --rounds 1 --no-loop)
  step "$name" "$limit" env -u TRITON_INTERPRET python3 -m benchmarks revise "${options[@]}" --json "$out/$name.json"
}

revise() {
  step step-graph 40 env -u TRITON_INTERPRET python3 -m pytest -q -p no:cacheprovider tests/test_step_graph.py -m gpu
  reviser 100 0.5B
  reviser 140 1.5B
  reviser 190 7B
}

attention() {
  reviser 200 1.5B --attention sdpa --no-loop --M 1280
  if [ -n "$rehearsing" ]; then
    left_out revise-1.5B-flex_attention "FlexAttention has no backward pass on a CPU"
  else
    reviser 200 1.5B --attention flex_attention --no-loop --M 1280
  fi
}

sanitize() {
  # Writes outside an allocation show only where torch does not cut several tensors from one.
  local tool op
  if ! command -v compute-sanitizer > /dev/null; then
    left_out sanitize "compute-sanitizer was not found in PATH"
    return
  fi
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1
  for tool in memcheck racecheck; do
    checked "$tool" mixture_embed cuda 60 compute-sanitizer --tool "$tool" --error-exitcode 9
  done
  for op in vertex_oracle linear_logprob; do
    checked memcheck "$op" hopper 60 compute-sanitizer --tool memcheck --error-exitcode 9
  done
}

engines() {
  if ! python3 -c 'import vllm' 2> "$out/engines.log"; then
    left_out engines "vLLM cannot be imported here ($(tail -n 1 "$out/engines.log"))"
    return
  fi
  local options=()
  [ -z "$rehearsing" ] || options=(--sizes 1M --dtype float32 --requests 2 --prompt-tokens 32 --new-tokens 8 --samples 1 --rounds 1)
  step engines 430 env -u TRITON_INTERPRET python3 -m benchmarks engines "${options[@]}" --json "$out/engines.json"
}

tune() {
  step tune 430 python3 -m benchmarks.tune ${rehearsing:+--tiny} --seconds 380 --json "$out/tune.json"
}

cubins() {
  step cubins 430 env -u TRITON_INTERPRET python3 -m benchmarks cubins ${rehearsing:+--only mixture_embed} --json "$out/cubins.json"
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
