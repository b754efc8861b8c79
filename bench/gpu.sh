#!/usr/bin/env bash
# Checks that need a GPU, from the source tree and with nothing from the network.
#   bash bench/gpu.sh test [pytest arguments]   kernel tests on the chip in under 9 minutes; updates bench/results/chip.json
# PYTHON names the interpreter (python3). Packages that it lacks are taken from wheels in .whl/, if there are any.
# With OUT set, the results are copied there too. Without a GPU it says so and ends with 0. With pytest arguments of your
# own nothing is entered in the ledger, but ops that fail are taken out.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
LIMIT=530 # seconds, the installation of wheels included

usage() {
    echo "usage: bash bench/gpu.sh test [pytest arguments]" >&2
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

case ${1:-} in
test)
    shift
    take_wheels
    if ! sees_gpu=$("$PYTHON" -c 'import torch; print(torch.cuda.is_available())'); then
        echo "$PYTHON cannot import torch: nothing ran; name another with PYTHON=... or put wheels in .whl/" >&2
        exit 1
    fi
    if [ "$sees_gpu" != True ]; then
        echo "no GPU that PyTorch of $PYTHON can use: nothing ran, the ledger is as it was"
        exit 0
    fi
    status=0
    # Less inside, so that pytest ends by itself with its report.
    left=$((LIMIT - SECONDS))
    timeout "$left" "$PYTHON" -m bench.chip test --seconds $((left - 50)) "$@" || status=$?
    if [ -n "${OUT:-}" ]; then cp bench/results/chip.json "$OUT"/; fi
    exit "$status"
    ;;
*) usage ;;
esac
