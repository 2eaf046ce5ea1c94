#!/usr/bin/env bash
# Everything that wants a GPU, in one call, from the repository's root or anywhere:
#
#     benchmarks/gpu_session.sh DIR first     # ten minutes: values, check, rates, the goals' grid
#     benchmarks/gpu_session.sh DIR second    # ten minutes: sanitizers, repetition, graphs, errors
#     benchmarks/gpu_session.sh DIR third     # the full grid as far as it gets, training
#     benchmarks/gpu_session.sh DIR [values] [launches] [check] [bench] [sanitizer] [training]
#
# Runs the parts of a call, or those that are named, and leaves in DIR
#
#     environment.txt   device, driver, versions, commit
#     values.txt, launches.txt   pytest -m gpu
#     check.txt         the tests of the check, and python -m triton_gru check; its verdicts are in
#                       cache/verdicts
#     SUITE.json        benchmarks.run, and SUITE.txt what it printed
#     memcheck.txt, racecheck.txt, synccheck.txt
#     training.json, .png, .txt   the real command with each backend (benchmarks.compare_backends),
#                       and what its jobs printed
#     summary.txt       what is printed last
#
# Settings, by environment: PYTHON (python3), CHECK (--quick), SUITE and its MINUTES (by the call;
# core and 3.5), SECONDS_OF_TESTS (200) and SECONDS_OF_A_SANITIZER (110), TRITON_GRU_REPEATS (10,000
# launches), WORKERS of the tests that may share the device (6), TRAINING (settings of the training,
# in place of ours) and BACKENDS (torch,triton), COMMIT where there is no git. What is in DIR from
# before is written over. Ends with 1 if a test or a check failed. Nothing is installed, and no
# setting of the device is touched. All but `training` need torch, triton, numpy and pytest alone;
# that one also Lightning, Hydra and the corpus in TRITON_GRU_CACHE.
#
# The limits of the parts of a call add up to less than its ten minutes: values 200 s, check 100,
# bench 210 and 30 to compile; launches 200, three sanitizers of 110; bench 300 and training 240.
set -uo pipefail

usage="usage: benchmarks/gpu_session.sh DIR first|second|third, or parts: values launches check"
usage="$usage bench sanitizer training"
out=${1:?$usage}
shift
(($# > 0)) || { echo "$usage" >&2 && exit 2; }
suite=core minutes=3.5 training_seconds=240
case $* in
  first) parts="values check bench" ;;
  second) parts="launches sanitizer" ;;
  third) parts="bench training" suite=full minutes=5 ;;
  *) parts=$* training_seconds=560 ;;
esac
python=${PYTHON:-python3}
suite=${SUITE:-$suite}
minutes=${MINUTES:-$minutes}
test_seconds=${SECONDS_OF_TESTS:-200}
export TRITON_GRU_REPEATS=${TRITON_GRU_REPEATS:-10000}
mkdir -p "$out"
out=$(cd "$out" && pwd)
cd "$(dirname "$0")/.."
commit=${COMMIT:-$(git rev-parse HEAD 2>/dev/null || echo unknown)}
export PYTHONUNBUFFERED=1
status=0

has() { "$python" -c "import $1" 2>/dev/null; }

{
  echo "commit $commit"
  nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm,clocks.max.sm --format=csv
  "$python" - <<'EOF'
import platform, torch
print("python", platform.python_version(), "torch", torch.__version__, "cuDNN", torch.backends.cudnn.version())
import triton
print("triton", triton.__version__, "CUDA", torch.cuda.is_available())
EOF
} 2>&1 | tee "$out/environment.txt"
: >"$out/summary.txt"

# The part's name and what became of it, for the end.
note() {
  echo "$1: $2" >>"$out/summary.txt"
}

values() {
  # Every kernel, several processes at once, as most of the time is compiling. Processes of xdist are
  # replaced when a kernel takes their device context along.
  local share=()
  has xdist && share=(-n "${WORKERS:-6}" --dist worksteal)
  pytests values "${share[@]}" tests/gpu/test_scan.py tests/gpu/test_layer.py
}

launches() {
  # What depends on timing, on memory or on nobody else being there has the device to itself.
  local alone=()
  has xdist && alone=(-n 1)
  pytests launches "${alone[@]}" tests/gpu/test_failures.py tests/gpu/test_launch.py \
    tests/gpu/test_check.py
}

pytests() {
  local name=$1
  shift
  timeout "$test_seconds" "$python" -m pytest -q -m gpu -p no:cacheprovider --durations=8 "$@" 2>&1 |
    tee "$out/$name.txt"
  local code=${PIPESTATUS[0]}
  note "$name" "ended with $code"
  grep -E '^(FAILED|ERROR)|passed|failed' "$out/$name.txt" | tail -8 >>"$out/summary.txt"
  ((code == 0)) || status=1
}

check() {
  # What a user runs, with its exit status.
  # shellcheck disable=SC2086 - arguments are words
  TRITON_GRU_CACHE="$out/cache" timeout 100 "$python" -m triton_gru check ${CHECK:---quick} 2>&1 |
    tee "$out/check.txt"
  local code=${PIPESTATUS[0]}
  note check "the command ended with $code"
  grep -E 'inference|training|not measured|^triton_gru ' "$out/check.txt" >>"$out/summary.txt"
  ((code == 0)) || status=1
}

bench() {
  timeout $((60 * ${minutes%.*} + 60)) "$python" -m benchmarks.run --suite "$suite" \
    --minutes "$minutes" --commit "$commit" --out "$out/$suite.json" 2>&1 | tee "$out/$suite.txt"
  local code=${PIPESTATUS[0]}
  note bench "$suite ended with $code"
  "$python" -m benchmarks.report --brief "$out/$suite.json" >>"$out/summary.txt"
  ((code == 0)) || status=1
}

sanitizer() {
  if ! command -v compute-sanitizer >/dev/null; then
    note sanitizer "compute-sanitizer is not here"
    return
  fi
  # Small shapes only: every kernel and variant once in bf16. Without torch's caching allocator each
  # tensor ends where it ends, so that memcheck sees one element too many.
  local seconds=${SECONDS_OF_A_SANITIZER:-110}
  for tool in memcheck racecheck synccheck; do
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 TRITON_GRU_TEST_TIMEOUT=$seconds timeout "$seconds" \
      compute-sanitizer --tool "$tool" --error-exitcode 9 --print-limit 20 \
      "$python" -m pytest -q -x -m gpu -p no:cacheprovider -k 'bfloat16 and every_kernel' \
      tests/gpu/test_scan.py >"$out/$tool.txt" 2>&1
    local code=$?
    tail -3 "$out/$tool.txt"
    note "$tool" "ended with $code; $(grep -E '(ERROR|RACECHECK|SYNCCHECK) SUMMARY' "$out/$tool.txt" | tail -1)"
    ((code == 0)) || status=1
  done
}

training() {
  if ! has hydra; then
    note training "hydra-core is not here"
    return
  fi
  local sweep default
  sweep=$(mktemp -d)
  default="experiment=char_best model/layer_type=gru trainer.precision=bf16-mixed trainer.max_steps=1500
    trainer.val_check_interval=250"
  # Jobs one after the other, so that each has the device to itself.
  # shellcheck disable=SC2086 - settings are words
  timeout "$training_seconds" "$python" -m lightning_module.train -m ${TRAINING:-$default} trainer.max_time=null \
    model.layer_type.backend="${BACKENDS:-torch,triton}" seed=1,2,3 hydra.sweep.dir="$sweep/jobs" 2>&1 |
    tee "$out/training.txt"
  local code=${PIPESTATUS[0]}
  tail -n 30 "$sweep"/jobs/jobs/*.log >>"$out/training.txt"
  note training "ended with $code"
  "$python" -m benchmarks.compare_backends "$sweep/jobs" --out "$out" >>"$out/summary.txt" 2>&1 ||
    status=1
  ((code == 0)) || status=1
  rm -r "$sweep"
}

for part in $parts; do
  case $part in
    values | launches | check | bench | sanitizer | training) begun=$SECONDS && "$part" && note "$part" "took $((SECONDS - begun)) s" ;;
    *) echo "unknown part $part" >&2 && exit 2 ;;
  esac
done
echo "--- summary, commit $commit"
cat "$out/summary.txt"
exit "$status"
