#!/usr/bin/env bash
# Tests on a GPU, then the benchmarks, in under 9 minutes and without a network.
#
#   bash bench/gpu.sh [--out DIR] [--seconds N] [--tests PATH] [--dry-run]
#
#   --out DIR     where results go (default: $OUT, else bench/results/<card>-<date>)
#   --seconds N   end by then (default 525); what the steps leave of it goes to single linears
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

# boxed LIMIT COMMAND...: runs the command for at most LIMIT seconds, and never past the end. A dry
# run may take longer, because Triton's interpreter is slow.
boxed() {
    local limit=$1 rest
    shift
    [[ -z $dry ]] || limit=$((4 * limit))
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
    if boxed 15 "$python" -m pip install --quiet --no-index --no-deps --no-build-isolation \
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

# The first tests cover what no CPU can: cached launches call Triton's real launcher. They also cover
# shared-input groups in one grid, which the rules are measured on. The next tests are the most
# likely to fail on a GPU that has not run them before: sums over rows for d_lora_b at small ranks,
# dropout in bf16, and mixed linears at 64 rows.
cached=(tests/kernels/test_{cached_gpu_launches,shared_input_launches}.py)
likeliest=(tests/kernels/test_{shared_input_node,at_once,mixed_shared_input}.py
    tests/kernels/test_{one_adapter,mixed_forward,mixed_lora_grad}.py)

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

# test_step LIMIT ARGUMENT...: runs pytest, and in the rest of the limit each failed test alone
test_step() {
    local end=$((SECONDS + $1)) limit=$1 many=(--maxfail=30) code=0
    shift
    ((xdist == 0 || cores < 4)) || [[ -n $dry ]] || many+=(-n $((cores < 8 ? cores : 8)))
    [[ -z $dry || -n $tests ]] || many=(--collect-only)
    : >"$scratch/red.txt"
    run_tests "$limit" "${many[@]}" "$@" || code=1
    [[ ! -s $scratch/red.txt ]] || look_at_red_tests "$end"
    return $code
}

# look_at_red_tests END: runs every failed test alone, with a long trace, and then with fewer warps,
# with which a compiler fault often disappears.
look_at_red_tests() {
    local end=$1 test warps rest
    say "red tests alone"
    sed -n 's/^[A-Z]* \([^ ]*\).*/\1/p' "$scratch/red.txt" | sort -u | head -n 4 >"$scratch/names.txt"
    while read -r test; do
        for warps in 8 4 1; do
            rest=$((end - SECONDS))
            ((rest > 0)) || return
            echo "=== $test, at most $warps warps" >>"$out/tests.txt"
            if run_tests $((rest < 20 ? rest : 20)) --tb=long --max-warps="$warps" "$test" \
                </dev/null >/dev/null; then
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

# interpreted COMMAND...: runs the command, and in a dry run in Triton's interpreter
interpreted() {
    if [[ -n $dry ]]; then
        TRITON_INTERPRET=1 "$@"
    else
        "$@"
    fi
}

# assumptions NAME LIMIT RULES: measures what predictions assume, and writes NAME.csv
assumptions() {
    interpreted boxed "$2" "$python" "$checkout/bench/assumptions.py" "${where[@]}" \
        --tests "$verdict" --seconds "$2" --only "$3" --out "$out/$1.csv"
}

# layers LIMIT: times whole layers at two ranks
layers() {
    local rank ranks=(16 64) share=$(($1 / 2)) code=0
    [[ -z $dry ]] || ranks=(16)
    for rank in "${ranks[@]}"; do
        interpreted boxed "$share" "$python" "$checkout/bench/layer.py" "${where[@]}" \
            --tests "$verdict" --seconds "$share" --rank "$rank" --out "$out/layer_r$rank.csv" ||
            code=1
    done
    return $code
}

# profile LIMIT: profiles three kernels with Nsight Compute
profile() {
    local command=("$python" "$checkout/bench/profiled.py" "${where[@]}")
    if [[ -n $dry ]]; then
        interpreted boxed "$1" "${command[@]}"
    elif ! command -v ncu >/dev/null; then
        echo "ncu is not on PATH"
    else
        boxed "$1" ncu --kernel-name "regex:lora_grad_b|mixed_lora_expand|lora_linear" \
            --launch-count 4 --section SpeedOfLight --section MemoryWorkloadAnalysis \
            --section WarpStateStats "${command[@]}" >"$out/ncu.txt" 2>&1
        tail -n 3 "$out/ncu.txt" # Some machines forbid the counters, which is no failure.
    fi
}

# sanitize TOOL LIMIT: runs small cases under compute-sanitizer
sanitize() {
    local code
    if [[ -n $dry ]]; then
        interpreted boxed "$2" "$python" "$checkout/bench/sanitize.py" --device cpu
        return
    fi
    if ! command -v compute-sanitizer >/dev/null; then
        echo "compute-sanitizer is not on PATH" | tee -a "$out/sanitizer.txt"
        return
    fi
    boxed "$2" compute-sanitizer --tool "$1" --error-exitcode 9 \
        "$python" "$checkout/bench/sanitize.py" >>"$out/sanitizer.txt" 2>&1
    code=$?
    tail -n 3 "$out/sanitizer.txt"
    ((code == 124 || code == 137)) || return $code
    echo "stopped at the time limit" | tee -a "$out/sanitizer.txt"
}

# single_linears SECONDS: times single linears, and mixed batches in a third of the time
single_linears() {
    local end=$((SECONDS + $1)) compile=(--impl eager) options=(--dtype float32 --impl eager) code=0
    [[ -n $dry ]] || compile=() options=()
    OMP_NUM_THREADS=1 boxed 60 "$python" "$checkout/bench/precompile.py" "${where[@]}" \
        "${compile[@]}" || echo "not everything was compiled beforehand"
    measure linear.py $((2 * (end - SECONDS) / 3)) "${where[@]}" "${options[@]}" \
        --out "$out/results.csv" || code=1
    if [[ -n $dry ]]; then
        options=(--dtype float32 --max-points 2)
        interpreted measure linear.py $((end - SECONDS)) "${where[@]}" "${options[@]}" \
            --out "$out/interpreted.csv" || code=1
    fi
    interpreted measure mixed_kernels.py $((end - SECONDS)) "${where[@]}" "${options[@]}" \
        --out "$out/mixed.csv" || code=1
    timeout 10 "$python" "$checkout/bench/summary.py" "$out/results.csv" || code=1
    timeout 10 "$python" "$checkout/bench/summary.py" "$out/mixed.csv" || code=1
    return $code
}

# step NAME LIMIT COMMAND...: runs a step of the plan, which takes at most LIMIT seconds. The limit
# is also the first or second argument of the command.
step() {
    say "$1 (at most $2 s)"
    "${@:3}"
}

# The limits of the steps add up to 525 s. The first steps answer what only a GPU can answer.
main() {
    local failed=() verdict=fail sweep=(--device cuda --seconds 190) reserve=0
    [[ -z $dry ]] || sweep=(--dry-run --near 0 --max-points 1)
    [[ -n $dry ]] || ! command -v compute-sanitizer >/dev/null || reserve=60
    say "results go to $out"
    {
        date -u +%FT%TZ
        "$python" -V
        timeout 20 nvidia-smi || echo "no nvidia-smi"
    } >"$out/machine.txt" 2>&1

    step "install" 20 install_checkout || failed+=(install)

    if [[ -n $tests ]]; then
        if step "the given tests" 85 test_step 85 "$tests"; then verdict=pass; fi
    elif step "tests of cached launches" 25 test_step 25 "${cached[@]}"; then
        verdict=pass
    fi
    step "rules: reads of the L2 cache, tiles, partial sums" 50 \
        assumptions rules 50 l2,tiles,planes || failed+=(rules)
    if [[ -z $tests ]]; then
        step "the other tests that are likely to be red" 60 test_step 60 "${likeliest[@]}" ||
            verdict=fail
    fi
    [[ $verdict == pass ]] || failed+=(tests)
    echo "tests: $verdict"

    OMP_NUM_THREADS=1 step "the host's cost of a linear" 20 boxed 20 "$python" \
        "$checkout/bench/host.py" "${where[@]}" --tests "$verdict" --out "$out/host.csv" ||
        failed+=(host)
    step "cuBLAS with beta 1, layers without PDL" 30 assumptions beta_pdl 30 beta,pdl ||
        failed+=(beta_pdl)
    step "sweep of tiles and plans" 200 boxed 200 "$python" "$checkout/bench/tune.py" \
        --tests "$verdict" --checkout "$checkout" "${sweep[@]}" --out "$out/measured" ||
        failed+=(sweep)
    # Everything that is timed from here on uses the measured table.
    export FASTLORA_MEASURED=$out/measured
    step "whole layers" 70 layers 70 || failed+=(layer)
    step "profiles of three kernels" 30 profile 30
    step "races" 20 sanitize racecheck 20 || failed+=(races)

    if (($(left) > 30 + reserve)); then
        if [[ -z $dry && -z $tests ]]; then
            say "what is left: all other tests"
            test_step 120 "${cached[@]/#/--ignore=}" "${likeliest[@]/#/--ignore=}" tests/kernels ||
                failed+=(tests)
        fi
        say "what is left: single linears"
        single_linears $(($(left) - reserve)) || failed+=(benchmark)
        ((reserve == 0)) || sanitize memcheck 60 || failed+=(sanitizer)
    fi

    say "done: $out"
    if ((${#failed[@]})); then
        echo "FAILED: ${failed[*]}"
        return 1
    fi
    echo "all green"
}

main 2>&1 | tee "$out/log.txt"
exit "${PIPESTATUS[0]}"
