#!/usr/bin/env bash
# Everything that wants a GPU, in one call, from the repository's root or anywhere:
#
#     benchmarks/gpu_session.sh DIR [tests] [check] [bench] [sanitizer] [training]
#
# Runs the parts that are named, or all five in this order, and leaves in DIR
#
#     environment.txt   device, driver, versions, commit
#     tests.txt         pytest -m gpu
#     check.txt         the tests of the check, and python -m triton_gru check; its verdicts are in
#                       cache/verdicts
#     SUITE.json        benchmarks.run, and SUITE.txt what it printed
#     memcheck.txt, racecheck.txt
#     training.json, .png, .txt   the real command with each backend (benchmarks.compare_backends),
#                       and what its jobs printed
#     summary.txt       what is printed last
#
# Settings, by environment: PYTHON (python3), CHECK (--quick), SUITE (quick), MINUTES of the suite
# (8), WORKERS of the tests that may share the device (6), TRAINING (settings of the training, in
# place of ours) and BACKENDS (torch,triton), COMMIT where there is no git. What is in DIR from
# before is written over. Ends with 1 if a test or a check failed. Nothing is installed, and no setting of the device is
# touched. All but `training` need torch, triton, numpy and pytest alone; that one also Lightning,
# Hydra and the corpus in TRITON_GRU_CACHE.
set -uo pipefail

out=${1:?usage: benchmarks/gpu_session.sh DIR [tests] [check] [bench] [sanitizer] [training]}
shift
parts=${*:-tests check bench sanitizer training}
python=${PYTHON:-python3}
suite=${SUITE:-quick}
minutes=${MINUTES:-8}
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

tests() {
  # Values first, several processes at once, as most of their time is compiling. What depends on
  # timing, on memory or on nobody else being there has the device to itself. Processes of xdist are
  # replaced when a kernel takes their device context along.
  local share=() alone=()
  if has xdist; then
    share=(-n "${WORKERS:-6}" --dist worksteal)
    alone=(-n 1)
  fi
  timeout 300 "$python" -m pytest -q -m gpu -p no:cacheprovider --durations=8 "${share[@]}" \
    tests/gpu/test_scan.py 2>&1 | tee "$out/tests.txt"
  local values=${PIPESTATUS[0]}
  timeout 300 "$python" -m pytest -q -m gpu -p no:cacheprovider --durations=8 "${alone[@]}" \
    tests/gpu/test_failures.py tests/gpu/test_launch.py tests/gpu/test_layer.py 2>&1 |
    tee -a "$out/tests.txt"
  local rest=${PIPESTATUS[0]}
  note tests "values ended with $values, launches and layer with $rest"
  grep -E '^(FAILED|ERROR)|passed|failed' "$out/tests.txt" >>"$out/summary.txt"
  ((values == 0 && rest == 0)) || status=1
}

check() {
  # Kernels that are broken on purpose, then what a user runs, with its exit status.
  timeout 400 "$python" -m pytest -q -m gpu -p no:cacheprovider --durations=8 \
    tests/gpu/test_check.py 2>&1 | tee "$out/check.txt"
  local tests=${PIPESTATUS[0]}
  # shellcheck disable=SC2086 - arguments are words
  TRITON_GRU_CACHE="$out/cache" timeout 190 "$python" -m triton_gru check ${CHECK:---quick} 2>&1 |
    tee -a "$out/check.txt"
  local code=${PIPESTATUS[0]}
  note check "its tests ended with $tests, the command with $code"
  grep -E '^(FAILED|ERROR)|passed|failed|inference|training|not measured|^triton_gru ' "$out/check.txt" >>"$out/summary.txt"
  ((tests == 0 && code == 0)) || status=1
}

bench() {
  timeout $((60 * ${minutes%.*} + 120)) "$python" -m benchmarks.run --suite "$suite" \
    --minutes "$minutes" --commit "$commit" --out "$out/$suite.json" 2>&1 | tee "$out/$suite.txt"
  local code=${PIPESTATUS[0]}
  note bench "$suite ended with $code"
  "$python" -m benchmarks.report "$out/$suite.json" | grep -E '\(goal' >>"$out/summary.txt"
  ((code == 0)) || status=1
}

sanitizer() {
  if ! command -v compute-sanitizer >/dev/null; then
    note sanitizer "compute-sanitizer is not here"
    return
  fi
  # Small shapes only: every kernel and variant once in bf16. Without torch's caching allocator each
  # tensor ends where it ends, so that memcheck sees one element too many.
  for tool in memcheck racecheck; do
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 TRITON_GRU_TEST_TIMEOUT=280 timeout 280 \
      compute-sanitizer --tool "$tool" --error-exitcode 9 --print-limit 20 \
      "$python" -m pytest -q -x -m gpu -p no:cacheprovider -k 'bfloat16 and every_kernel' \
      tests/gpu/test_scan.py >"$out/$tool.txt" 2>&1
    local code=$?
    tail -3 "$out/$tool.txt"
    note "$tool" "ended with $code; $(grep -E 'ERROR SUMMARY|RACECHECK SUMMARY' "$out/$tool.txt" | tail -1)"
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
  default="experiment=char_best trainer.precision=bf16-mixed trainer.max_steps=1500
    trainer.val_check_interval=250"
  # Jobs one after the other, so that each has the device to itself.
  # shellcheck disable=SC2086 - settings are words
  timeout 560 "$python" -m lightning_module.train -m ${TRAINING:-$default} trainer.max_time=null \
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
    tests | check | bench | sanitizer | training) begun=$SECONDS && "$part" && note "$part" "took $((SECONDS - begun)) s" ;;
    *) echo "unknown part $part" >&2 && exit 2 ;;
  esac
done
echo "--- summary, commit $commit"
cat "$out/summary.txt"
exit "$status"
