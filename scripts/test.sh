#!/usr/bin/env bash
# The whole test of a machine without a GPU: sets up, checks the format and the lints, compiles the kernels for every
# architecture with a report on registers and spills, runs the tests against two real NCCLs and whole jobs on the
# simulators, some of these under ThreadSanitizer, and makes and tries the package for Python.
#
#   ./scripts/test.sh          what CI runs
#   ./scripts/test.sh --long   also Miri, every job under ThreadSanitizer, a rank killed at every single step, 10,000 random
#                              programs, 10,000 communicators, soaks of 100,000 operations, and ten more of them (hours)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# step NAME: begins a step, and says how long the one before took. All of them are listed at the end.
seconds=()
step() {
    if [[ ${name:-} ]]; then
        seconds+=("$(printf '%5d s  %s' $((SECONDS - begun)) "$name")")
        echo "${seconds[-1]}"
    fi
    name=$1 begun=$SECONDS
    [[ -z $name ]] || printf '\n== %s\n' "$name"
}
trap 'step ""; printf "\n== %d s\n" "$SECONDS"; printf "%s\n" "${seconds[@]}"' EXIT

long=false
case ${1:-} in
    "") ;;
    --long) long=true ;;
    *)
        echo "test: unknown argument '$1'; usage: ./scripts/test.sh [--long]" >&2
        exit 1
        ;;
esac

# The longest jobs, shortened.
$long || export FLASHCOMM_TEST_SOAK_OPS=30000 FLASHCOMM_TEST_COMMUNICATORS=2000

step "setup"
./scripts/setup.sh --test
export FLASHCOMM_TEST_NCCL=$PWD/.toolkit/nccl-2.32.3/lib/libnccl.so.2
export FLASHCOMM_TEST_NCCL_OLD=$PWD/.toolkit/nccl-2.18.3/lib/libnccl.so.2

# The library with the kernels of every architecture takes longest. It is built with what the tests leave of the processor.
release_log=$(mktemp)
nice -n 19 cargo build --release >"$release_log" 2>&1 &
release=$!

step "format"
cargo fmt --all --check

# One architecture is enough for lints and tests.
step "clippy"
FLASHCOMM_CUDA_ARCHS=90 cargo clippy --workspace --all-targets -- -D warnings

step "aarch64 jumps"
python3 scripts/check_aarch64.py

step "the harness of the GPU machine"
PYTHONPATH=$PWD/.toolkit/pytest python3 -m pytest -q -p no:cacheprovider tests/python

step "tests"
FLASHCOMM_CUDA_ARCHS=90 cargo build --workspace
FLASHCOMM_CUDA_ARCHS=90 cargo nextest run --workspace --no-fail-fast
echo "tests/gpu ran no kernel unless this machine has a GPU: ./scripts/test_gpu.sh is for one that has"

step "ThreadSanitizer: the host code"
if $long; then ./scripts/tsan.sh --long; else ./scripts/tsan.sh; fi

if $long; then
    ./scripts/setup.sh --miri
    step "Miri: the wire format"
    nightly=$(sed -n 's/^nightly=//p' scripts/setup.sh)
    if cargo "+$nightly" miri --version >/dev/null 2>&1; then
        # One case of each property: Miri takes some ten seconds for a tile. (Isolation: proptest asks for the directory.)
        MIRIFLAGS=-Zmiri-disable-isolation PROPTEST_CASES=1 \
            cargo "+$nightly" miri nextest run -p flashcomm-wire --target-dir target/miri
    else
        echo "SKIPPED: no $nightly with Miri here"
    fi

    step "a rank killed at every step; random programs; soaks"
    export FLASHCOMM_CUDA_ARCHS=90
    FLASHCOMM_TEST_STRIDE=1 cargo nextest run -p flashcomm-test-support -E 'test(/^faults::/)'
    FLASHCOMM_TEST_PROGRAMS=10000 cargo nextest run -p flashcomm-test-support -E 'test(/^programs::/)' --no-capture
    for seed in $(seq 100 100 1000); do
        FLASHCOMM_TEST_SOAK_SEED=$seed cargo nextest run -p flashcomm-test-support -E 'test(/^soak::/)' --no-capture
    done
    unset FLASHCOMM_CUDA_ARCHS
fi

step "release build, all architectures: what was left of it"
wait "$release" || { cat "$release_log" >&2 && exit 1; }
rm "$release_log"
python3 scripts/check_spills.py target/release/libflashcomm.so

step "the package for Python, in a fresh environment"
./scripts/package.sh
./scripts/test_wheel.sh
