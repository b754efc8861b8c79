#!/usr/bin/env bash
# Checks and measurements that need a GPU, from the source tree and with nothing from the network, each in under 9 minutes.
#   bash bench/gpu.sh test [pytest arguments]    kernel tests on the chip, compute-sanitizer where there is one;
#                                                updates bench/results/chip.json and sanitizer.json
#   bash bench/gpu.sh tune [--op NAME ...]       measures configs, into bench/results/tuned.json
#   bash bench/gpu.sh bench [--only REGEX]       the suites ops, model, sample, memory, and the report of them
#   bash bench/gpu.sh tables [--only REGEX]      the suites scale, feed, fast-dit, mindone, and the report of them
#   bash bench/gpu.sh profile                    a step's time by kernel class, a trace of it, counters by ncu
# Each goes on from the results that are there and past a piece that fails, and prints a table of its pieces last; its
# status is that of the first that failed.
# PYTHON names the interpreter (python3). Packages that it lacks are taken from wheels in .whl/, where `python -m
# bench.wheels` puts them. With OUT set, the results are copied there too: at most 8 files, none above 16 MiB. Without a
# GPU it says so and ends with 0. With pytest arguments of your own nothing is entered in the ledger, but ops that fail
# are taken out.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
LIMIT=530 # seconds, the installation of wheels included
RESULTS=bench/results
MODULES="jsonargparse pytest safetensors torch triton diffusers liger_kernel xformers"
LARGEST=$((16 * 1024 * 1024)) FILES=8
status=0 ended=""

usage() {
    echo "usage: bash bench/gpu.sh test [pytest arguments] | tune [options of python -m ditfast.kernels tune] |" \
        "bench | tables [options of python -m bench SUITE] | profile" >&2
    exit 2
}

take_wheels() {
    local lacks='import sys, importlib.util as i; sys.exit(any(i.find_spec(name) is None for name in sys.argv[1:]))'
    # shellcheck disable=SC2086
    if "$PYTHON" -c "$lacks" $MODULES 2>/dev/null; then return; fi
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

# piece NAME SHARE COMMAND...: runs it for at most SHARE percent of the time that is left, and notes how it ended.
piece() {
    local name=$1 seconds=$(((LIMIT - SECONDS) * $2 / 100)) began=$SECONDS code=0 how
    shift 2
    timeout "$seconds" "$@" || code=$?
    case $code:$part in
    0:*) how=ok ;;
    124:*) how="out of time" ;;
    5:bench | 5:tables) how="no job of that name" code=0 ;; # One --only is for all suites.
    *) how="failed, status $code" ;;
    esac
    ended+="$name|$how|$((SECONDS - began)) s"$'\n'
    if [ "$status" = 0 ]; then status=$code; fi
}

# module NAME SHARE MARGIN MODULE...: a piece that ends by itself, with its report, MARGIN seconds before it must.
module() {
    local name=$1 share=$2 margin=$3 seconds=$(((LIMIT - SECONDS) * $2 / 100))
    shift 3
    piece "$name" "$share" "$PYTHON" -m "$@" --seconds $((seconds > margin ? seconds - margin : 1))
}

# give FILE...: copies those that are there to OUT.
give() {
    local file given=0
    for file in "$@"; do
        if [ -z "${OUT:-}" ] || [ ! -e "$file" ]; then continue; fi
        if [ "$(stat -c %s "$file")" -gt "$LARGEST" ] || [ "$given" = "$FILES" ]; then
            echo "$file stays here: OUT takes $FILES files, none above $((LARGEST / 1024 / 1024)) MiB"
            continue
        fi
        if [ ! "$file" -ef "$OUT/$(basename "$file")" ]; then cp "$file" "$OUT"/; fi
        given=$((given + 1))
    done
}

part=${1:-}
case $part in
test | tune | bench | tables | profile) shift ;;
*) usage ;;
esac
take_wheels
need_gpu
case $part in
test)
    module test 100 50 bench.chip test "$@"
    give "$RESULTS"/{chip,sanitizer}.json
    ;;
tune)
    module tune 100 60 ditfast.kernels tune --cache "$RESULTS/tuned.json" "$@"
    give "$RESULTS/tuned.json"
    ;;
bench | tables)
    # Percent of what is left then; the rest is the report's.
    suites="ops:25 model:65 sample:60 memory:80"
    if [ "$part" = tables ]; then suites="scale:25 feed:30 fast-dit:55 mindone:85"; fi
    files=()
    for suite in $suites; do
        name=${suite%:*}
        module "$name" "${suite#*:}" 10 bench "$name" --json "$RESULTS/$name.json" "$@"
        if [ -e "$RESULTS/$name.json" ]; then files+=("$RESULTS/$name.json"); fi
    done
    if [ ${#files[@]} != 0 ]; then
        piece report 100 "$PYTHON" -m bench report "${files[@]}" --out runs/report
    fi
    give "${files[@]}" runs/report/report.html
    ;;
profile)
    traces=runs/profile
    mkdir -p "$traces"
    module breakdown 50 10 bench breakdown --json "$RESULTS/breakdown.json"
    piece trace 60 "$PYTHON" -m bench.trace --out "$traces"
    if command -v ncu >/dev/null; then
        # The clocks are left as they are: others may share the chip.
        piece ncu 100 ncu --clock-control none --target-processes all --profile-from-start off --launch-count 500 \
            --csv --log-file "$traces/ncu.csv" --metrics "$(
                printf %s gpu__time_duration.sum,dram__bytes_read.sum,dram__bytes_write.sum, \
                    dram__throughput.avg.pct_of_peak_sustained_elapsed, \
                    sm__throughput.avg.pct_of_peak_sustained_elapsed,launch__registers_per_thread
            )" "$PYTHON" -m bench.trace --range --batch 32
    else
        ended+="ncu|is not installed here|0 s"$'\n'
    fi
    give "$RESULTS/breakdown.json" "$traces"/*
    ;;
esac
printf '\n'
while IFS='|' read -r name how took; do
    printf '%-10s %-24s %8s\n' "$name" "$how" "$took"
done <<<"${ended%$'\n'}"
exit "$status"
