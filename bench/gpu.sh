#!/usr/bin/env bash
# Checks and measurements that need a GPU, from the source tree and with nothing from the network, each in under 9 minutes.
#   bash bench/gpu.sh test [pytest arguments]    kernel tests on the chip, compute-sanitizer where there is one;
#                                                updates bench/results/chip.json and sanitizer.json
#   bash bench/gpu.sh tune [--op NAME ...]       measures configs, into bench/results/tuned.json; goes on from what it has
# PYTHON names the interpreter (python3). Packages that it lacks are taken from wheels in .whl/, if there are any.
# With OUT set, the results are copied there too. Without a GPU it says so and ends with 0. With pytest arguments of your
# own nothing is entered in the ledger, but ops that fail are taken out.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
LIMIT=530 # seconds, the installation of wheels included
RESULTS=bench/results

usage() {
    echo "usage: bash bench/gpu.sh test [pytest arguments] | tune [options of python -m ditfast.kernels tune]" >&2
    exit 2
}

take_wheels() {
    if "$PYTHON" -c 'import pytest, safetensors, torch, triton' 2>/dev/null; then return; fi
    if ! compgen -G '.whl/*.whl' >/dev/null; then return; fi
    site=$(mktemp -d) # not local: the trap reads it when the function has returned
    trap 'rm -rf "$site"' EXIT
    timeout "$LIMIT" "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --target "$site" .whl/*.whl
    export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
}

need_gpu() {
    if ! sees_gpu=$("$PYTHON" -c 'import torch; print(torch.cuda.is_available())'); then
        echo "$PYTHON cannot import torch: nothing ran; name another with PYTHON=... or put wheels in .whl/" >&2
        exit 1
    fi
    if [ "$sees_gpu" != True ]; then
        echo "no GPU that PyTorch of $PYTHON can use: nothing ran, the results are as they were"
        exit 0
    fi
}

# run_for_the_rest MARGIN MODULE...: --seconds is less by MARGIN, so that the module ends by itself with its report.
run_for_the_rest() {
    local margin=$1 left=$((LIMIT - SECONDS))
    shift
    status=0
    timeout "$left" "$PYTHON" -m "$@" --seconds $((left - margin)) || status=$?
}

case ${1:-} in
test)
    shift
    take_wheels
    need_gpu
    run_for_the_rest 50 bench.chip test "$@"
    ;;
tune)
    shift
    take_wheels
    need_gpu
    run_for_the_rest 60 ditfast.kernels tune --cache "$RESULTS/tuned.json" "$@"
    ;;
*) usage ;;
esac
if [ -n "${OUT:-}" ]; then cp "$RESULTS"/*.json "$OUT"/; fi
exit "$status"
