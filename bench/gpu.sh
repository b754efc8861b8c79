#!/usr/bin/env bash
# Checks that need a GPU, from the source tree and with nothing from the network.
#   bash bench/gpu.sh test [pytest arguments]   kernel tests on the chip in under 9 minutes; updates bench/results/chip.json
# PYTHON names the interpreter (python3). Packages that it lacks are taken from wheels in .whl/, if there are any.
# With OUT set, the results are copied there too. Without a GPU it says so and ends with 0.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}

usage() {
    echo "usage: bash bench/gpu.sh test [pytest arguments]" >&2
    exit 2
}

take_wheels() {
    if "$PYTHON" -c 'import pytest, safetensors, torch, triton' 2>/dev/null; then return; fi
    if ! compgen -G '.whl/*.whl' >/dev/null; then return; fi
    local site
    site=$(mktemp -d)
    trap 'rm -rf "$site"' EXIT
    "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --target "$site" .whl/*.whl
    export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
}

case ${1:-} in
test)
    shift
    take_wheels
    if ! "$PYTHON" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
        echo "no GPU that PyTorch of $PYTHON can use: nothing ran, the ledger is as it was"
        exit 0
    fi
    status=0
    timeout 530 "$PYTHON" -m bench.chip test "$@" || status=$?
    if [ -n "${OUT:-}" ]; then cp bench/results/chip.json "$OUT"/; fi
    exit "$status"
    ;;
*) usage ;;
esac
