#!/usr/bin/env bash
# The host code under ThreadSanitizer: jobs of threads on the simulators, with the shim and them compiled for it. A race is a
# failure. What it cannot see is in scripts/tsan.supp.
#
#   ./scripts/tsan.sh          groups, life cycles, meeting, control, statistics, every code
#   ./scripts/tsan.sh --long   every other test of threads on the simulators, soaks of 18,000 operations (22 minutes on 2 cores)
#
# The standard library stays as it is shipped, so that its locks and channels are not seen: host code takes those of parking_lot
# and once_cell, which are compiled here, and tests join the threads that they start. -Z options are a nightly's; RUSTC_BOOTSTRAP
# lets the project's own toolchain take them.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# Its one test preloads the shim, also into the program that names the functions of a report.
leave_out="test(what_nccl_calls_of_itself_is_not_taken_twice)"
tests='test(/^(groups|lifecycle|meeting|control|stats)::/) or test(/^allreduce::.*every_code/) or test(/^exact::.*(turns|wait)/)'
packages=(-p flashcomm -p flashcomm-sim-cuda -p flashcomm-sim-nccl)
case ${1:-} in
    "") ;;
    --long)
        # What processes do to each other's memory it does not see, and each one is a hundred times as slow. Random programs
        # have limits of time, and tell each other things by channels of the standard library.
        tests="not test(processes_equal) and not test(/^programs::/)"
        packages+=(-p flashcomm-cli)
        export FLASHCOMM_TEST_SOAK_OPS=9000 FLASHCOMM_TEST_LIMIT_S=1500
        ;;
    *)
        echo "tsan: unknown argument '$1'; usage: ./scripts/tsan.sh [--long]" >&2
        exit 1
        ;;
esac
if ! compgen -G "$(rustc --print target-libdir)/librustc*_rt.tsan.a" >/dev/null; then
    echo "SKIPPED: this Rust toolchain has no ThreadSanitizer"
    exit 0
fi

CARGO_BUILD_TARGET=$(rustc -vV | sed -n 's/^host: //p')
# The libraries find the sanitizer's functions in the program that opens them.
RUSTFLAGS="-Zsanitizer=thread -Cunsafe-allow-abi-mismatch=sanitizer -Clink-arg=-Wl,--export-dynamic-symbol=__tsan*"
export CARGO_BUILD_TARGET RUSTFLAGS RUSTC_BOOTSTRAP=1 CARGO_TARGET_DIR=$PWD/target/tsan FLASHCOMM_CUDA_ARCHS=90
reports=$(mktemp -d)
trap 'rm -rf "$reports"' EXIT
export TSAN_OPTIONS="suppressions=$PWD/scripts/tsan.supp log_path=$reports/race exitcode=66 history_size=4"
# Some jobs are to panic. A backtrace is made under the lock of the dynamic linker, and so is a report, also one that is suppressed,
# with locks of the sanitizer's held: the two would wait for each other for ever.
export RUST_BACKTRACE=0

cargo build "${packages[@]}"
status=0
cargo nextest run -p flashcomm-test-support --test sim --no-fail-fast \
    -E "($tests) and not test(thousands_of_communicators) and not $leave_out" || status=$?
if compgen -G "$reports/race.*" >/dev/null; then
    cat "$reports"/race.* >&2
    exit 1
fi
exit "$status"
