#!/usr/bin/env bash
# Tests on a GPU, then the benchmarks, in under 9 minutes and without a network.
#
#   bash bench/gpu.sh [--out DIR] [--seconds N] [--tests PATH] [--dry-run]
#
#   --out DIR     where results go (default: $OUT, else bench/results/<card>-<date>)
#   --seconds N   end by then (default 525)
#   --tests PATH  what pytest runs (default tests/kernels)
#   --dry-run     the same steps on a CPU, tiny shapes, into a temporary folder; its times mean nothing
#
# Needs python3 (or $PYTHON) with torch, triton, pytest, numpy and safetensors. Exit code 0 only when
# the tests are green and every contender gave right numbers. See bench/README.md.
set -uo pipefail

checkout=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
budget=525
out='' tests='' dry=''

die() {
    echo "bench/gpu.sh: $*" >&2
    exit 2
}
usage() { sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"; }

while (($#)); do
    case $1 in
        --dry-run) dry=1 ;;
        --out | --seconds | --tests)
            (($# > 1)) || die "$1 needs a value"
            case $1 in
                --out) out=$2 ;;
                --seconds) budget=$2 ;;
                --tests) tests=$2 ;;
            esac
            shift
            ;;
        -h | --help)
            usage
            exit 0
            ;;
        *) die "unknown argument $1; see --help" ;;
    esac
    shift
done
[[ $budget =~ ^[1-9][0-9]*$ ]] || die "--seconds must be a whole number above 0, got $budget"
[[ -z $tests || -e $tests ]] || die "--tests: $tests does not exist"
[[ -z $tests ]] || tests=$(cd -- "$(dirname -- "$tests")" && pwd -P)/$(basename -- "$tests")
python=$(command -v "${PYTHON:-python3}") || die "no ${PYTHON:-python3} on PATH; set PYTHON"
# The steps change folders, so the path is made absolute. A link is kept, because Python finds its
# virtual environment by the link's path.
[[ $python == /* ]] || python=$(cd -- "$(dirname -- "$python")" && pwd)/$(basename -- "$python")

# Nothing is written into the checkout, which may be read-only, or into the home folder.
scratch=$(mktemp -d) || die "no temporary folder"
trap 'rm -rf "$scratch"' EXIT
export PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
export TRITON_CACHE_DIR=$scratch/triton
export HF_HUB_OFFLINE=1 PIP_DISABLE_PIP_VERSION_CHECK=1
unset TRITON_INTERPRET

# Prints one line: cores, whether xdist is installed, and the card (or "none"). Fails with the name
# of what is missing.
probe=$(
    "$python" - <<'PY'
import importlib.util, os, re, sys
needed = ("torch", "triton", "pytest", "numpy", "safetensors")
missing = [name for name in needed if importlib.util.find_spec(name) is None]
if missing:
    sys.exit(f"{sys.executable} lacks {', '.join(missing)}")
import torch
card = "none"
if torch.cuda.is_available():
    card = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(0).lower()).strip("-")
cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
print(cores, int(importlib.util.find_spec("xdist") is not None), card)
PY
) || die "this Python will not do"
read -r cores xdist card <<<"${probe##*$'\n'}"
[[ -n $dry || $card != none ]] || die "torch sees no GPU; --dry-run runs the steps on a CPU"

if [[ -n $dry ]]; then
    out=${out:-$(mktemp -d)}
    where=(--device cpu --dry-run)
else
    out=${out:-${OUT:-$checkout/bench/results/$card-$(date +%Y%m%d-%H%M%S)}}
    where=(--device cuda)
fi
if ! mkdir -p "$out" 2>/dev/null || [[ ! -w $out ]]; then
    echo "cannot write to $out"
    out=$(mktemp -d) || die "no temporary folder"
fi
out=$(cd -- "$out" && pwd -P)

left() { echo $((budget - SECONDS)); }
say() { echo "--- [$SECONDS s] $*"; }

# boxed LIMIT COMMAND...: runs the command for at most LIMIT seconds, and never past the end
boxed() {
    local limit=$1 rest
    shift
    rest=$(left)
    ((limit < rest)) || limit=$rest
    ((limit > 0)) || return 124
    timeout -k 5 "$limit" "$@"
}

install_checkout() {
    local source=$scratch/source site=$scratch/site file
    mkdir -p "$source"
    for file in fastlora kernels bench setup.py pyproject.toml README.md LICENSE; do
        [[ ! -e $checkout/$file ]] || cp -R "$checkout/$file" "$source/"
    done
    # Into a folder, not a virtual environment: a venv within a venv does not see its packages.
    if boxed 90 "$python" -m pip install --quiet --no-index --no-deps --no-build-isolation \
        --no-cache-dir --target "$site" "$source" >"$scratch/pip.txt" 2>&1; then
        export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
    else
        tail -n 3 "$scratch/pip.txt"
        echo "pip cannot install the checkout here; importing it as it lies"
        export PYTHONPATH=$checkout${PYTHONPATH:+:$PYTHONPATH}
    fi
    (cd "$scratch" && "$python" -c \
        'import fastlora, fastlora.kernels.lora_linear; print("fastlora from", fastlora.__file__)')
}

# The tests that are most likely to fail on a GPU that has not run them before: sums over rows for
# d_lora_b at small ranks, dropout in bf16, mixed linears at 64 rows, cached launches, and
# shared-input groups in one grid.
likeliest=(test_cached_gpu_launches test_shared_input_launches test_shared_input_node test_at_once
    test_mixed_shared_input test_one_adapter test_mixed_forward test_mixed_lora_grad)

# run_tests LIMIT ARGUMENT...: runs pytest with the arguments; its output goes to tests.txt
run_tests() {
    local limit=$1 code
    shift
    # The installed package precedes the checkout, in which only `tests` is looked up.
    (
        cd "$checkout" || exit 2
        export PYTHONSAFEPATH=1 PYTHONPATH=$PYTHONPATH:$checkout OMP_NUM_THREADS=1
        [[ -z $dry ]] || export TRITON_INTERPRET=1
        boxed "$limit" "$python" -m pytest -o pythonpath= -q -rfE -p no:cacheprovider \
            --durations=5 "$@"
    ) >"$scratch/tests.txt" 2>&1
    code=$?
    cat "$scratch/tests.txt" >>"$out/tests.txt"
    grep -E '^(FAILED|ERROR) ' "$scratch/tests.txt" | tee -a "$scratch/red.txt" | head -n 20
    tail -n 1 "$scratch/tests.txt"
    ((code != 124 && code != 137)) || echo "stopped at the time limit"
    # Green requires that some tests ran: a run that skips everything proves nothing.
    ((code == 0)) && grep -Eq '(^|[^0-9])[1-9][0-9]* (passed|tests? collected)' "$scratch/tests.txt"
}

all_tests() {
    local many=(--maxfail=30) first=() rest=() name green=0
    ((xdist == 0 || cores < 4)) || [[ -n $dry ]] || many+=(-n $((cores < 8 ? cores : 8)))
    if [[ -n $tests ]]; then
        run_tests 240 "${many[@]}" "$tests"
        return
    fi
    for name in "${likeliest[@]}"; do
        first+=("tests/kernels/$name.py")
        rest+=("--ignore=tests/kernels/$name.py")
    done
    if [[ -n $dry ]]; then
        run_tests 120 --collect-only "${first[@]}"
        return
    fi
    run_tests 120 "${many[@]}" "${first[@]}" || green=1
    say "the other tests (at most 120 s)"
    run_tests 120 "${many[@]}" "${rest[@]}" tests/kernels || green=1
    return $green
}

# Runs every failed test alone, with a long trace, and then with fewer warps, with which a compiler
# fault often disappears.
look_at_red_tests() {
    local test warps
    sed -n 's/^[A-Z]* \([^ ]*\).*/\1/p' "$scratch/red.txt" | sort -u | head -n 4 >"$scratch/names.txt"
    while read -r test; do
        for warps in 8 4 1; do
            echo "=== $test, at most $warps warps" >>"$out/tests.txt"
            if run_tests 20 --tb=long --max-warps="$warps" "$test" </dev/null >/dev/null; then
                echo "$test: green alone with at most $warps warps"
                break
            fi
            echo "$test: red alone with at most $warps warps"
        done
    done <"$scratch/names.txt"
}

# measure SCRIPT SECONDS ARGUMENT...: restarts after a crash or a hang, without the cause of it
measure() {
    local script=$1 end=$((SECONDS + $2)) code=0 resume='' attempt seconds
    shift 2
    for attempt in 1 2 3 4 5 6; do
        seconds=$((end - SECONDS))
        ((attempt == 1 || seconds > 15)) || break
        ((seconds > 0)) || seconds=0
        boxed $((seconds + 60)) "$python" "$checkout/bench/$script" --tests "$verdict" \
            --checkout "$checkout" --seconds "$seconds" ${resume:+--resume} "$@"
        code=$?
        ((code != 0 && code != 3)) || break # finished; 3: some numbers were wrong
        echo "the benchmark ended with code $code (attempt $attempt)"
        resume=1
    done
    return $code
}

sanitize() {
    # Runs once without the sanitizer, which then finds all kernels compiled.
    boxed 40 "$python" "$checkout/bench/sanitize.py" || return
    boxed 60 compute-sanitizer --tool memcheck --error-exitcode 9 \
        "$python" "$checkout/bench/sanitize.py"
}

main() {
    local failed=() verdict=fail reserve=10 for_sweep for_mixed code
    local sweep=(--device cuda) layer
    [[ -z $dry ]] || sweep=(--dry-run --near 0 --max-points 1)
    say "results go to $out"
    {
        date -u +%FT%TZ
        "$python" -V
        timeout 20 nvidia-smi || echo "no nvidia-smi"
    } >"$out/machine.txt" 2>&1
    [[ -n $dry ]] || ! command -v compute-sanitizer >/dev/null || reserve=80

    say "install"
    install_checkout || failed+=(install)

    say "tests, the likeliest to be red first (at most 120 s)"
    : >"$scratch/red.txt"
    if all_tests; then verdict=pass; else failed+=(tests); fi
    echo "tests: $verdict"
    if [[ -s $scratch/red.txt ]]; then
        say "red tests alone"
        look_at_red_tests
    fi

    say "the host's cost of a linear (at most 60 s)"
    OMP_NUM_THREADS=1 boxed 60 "$python" "$checkout/bench/host.py" "${where[@]}" \
        --tests "$verdict" --out "$out/host.csv" || failed+=(host)

    say "sweep of tiles and plans (at most a third of what is left)"
    for_sweep=$(($(left) / 3))
    boxed $((for_sweep + 60)) "$python" "$checkout/bench/tune.py" --tests "$verdict" \
        --checkout "$checkout" --seconds "$for_sweep" "${sweep[@]}" --out "$out/measured" ||
        failed+=(sweep)
    # Everything that is timed from here on uses the measured table.
    export FASTLORA_MEASURED=$out/measured

    say "whole layers (at most 60 s)"
    layer=(boxed 90 "$python" "$checkout/bench/layer.py" "${where[@]}" --tests "$verdict"
        --seconds 60 --out "$out/layer.csv")
    if [[ -n $dry ]]; then
        TRITON_INTERPRET=1 "${layer[@]}" || failed+=(layer)
    else
        "${layer[@]}" || failed+=(layer)
    fi

    say "compile the kernels of the benchmark"
    if [[ -n $dry ]]; then
        OMP_NUM_THREADS=1 boxed 100 "$python" "$checkout/bench/precompile.py" "${where[@]}" --impl eager
    else
        OMP_NUM_THREADS=1 boxed 60 "$python" "$checkout/bench/precompile.py" "${where[@]}"
    fi || echo "not everything was compiled beforehand"

    say "benchmark"
    if [[ -n $dry ]]; then
        measure linear.py $(($(left) - reserve)) "${where[@]}" --out "$out/results.csv" \
            --dtype float32 --impl eager || failed+=(benchmark)
        say "benchmark of the kernels in Triton's interpreter"
        TRITON_INTERPRET=1 measure linear.py $(($(left) - reserve)) "${where[@]}" \
            --out "$out/interpreted.csv" --dtype float32 --max-points 2 || failed+=(interpreted)
        say "benchmark of mixed batches in Triton's interpreter"
        TRITON_INTERPRET=1 measure mixed_kernels.py $(($(left) - reserve)) "${where[@]}" \
            --out "$out/mixed.csv" --dtype float32 --max-points 2 || failed+=(mixed)
    else
        for_mixed=$(($(left) / 3))
        measure linear.py $(($(left) - reserve - for_mixed)) "${where[@]}" \
            --out "$out/results.csv" || failed+=(benchmark)
        say "benchmark of mixed batches"
        measure mixed_kernels.py $(($(left) - reserve)) "${where[@]}" \
            --out "$out/mixed.csv" || failed+=(mixed)
    fi

    if [[ -n $dry ]]; then
        say "the cases for compute-sanitizer, without it"
        TRITON_INTERPRET=1 boxed 60 "$python" "$checkout/bench/sanitize.py" --device cpu ||
            failed+=(sanitizer)
    elif ! command -v compute-sanitizer >/dev/null; then
        echo "compute-sanitizer is not on PATH" | tee "$out/sanitizer.txt"
    elif (($(left) < 30)); then
        echo "no time left for compute-sanitizer" | tee "$out/sanitizer.txt"
    else
        say "compute-sanitizer (at most 60 s)"
        sanitize >"$out/sanitizer.txt" 2>&1
        code=$?
        tail -n 3 "$out/sanitizer.txt"
        if ((code == 124 || code == 137)); then
            echo "stopped at the time limit" | tee -a "$out/sanitizer.txt"
        elif ((code != 0)); then
            failed+=(sanitizer)
        fi
    fi

    say "summary"
    timeout 10 "$python" "$checkout/bench/summary.py" "$out/results.csv" || failed+=(summary)
    timeout 10 "$python" "$checkout/bench/summary.py" "$out/mixed.csv" || failed+=(summary)

    say "done: $out"
    if ((${#failed[@]})); then
        echo "FAILED: ${failed[*]}"
        return 1
    fi
    echo "all green"
}

main 2>&1 | tee "$out/log.txt"
exit "${PIPESTATUS[0]}"
