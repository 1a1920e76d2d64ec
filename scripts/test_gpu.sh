#!/usr/bin/env bash
# Everything that needs a GPU, on one GPU, with nothing but python3 with PyTorch: kernels against the reference,
# PyTorch jobs through the shim, and speed beside plain NCCL of the same run. What it runs comes from
# scripts/pack_gpu.sh. Results go to the folder named by OUT (default: .gpu/results).
#
#   ./scripts/test_gpu.sh [kernels] [sanitize] [torch] [settings] [speed]     default: all
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=${OUT:-.gpu/results}
mkdir -p "$out"
[[ -f .gpu/libflashcomm.so ]] || { echo "run ./scripts/pack_gpu.sh first, where cargo is, and bring .gpu/ along" >&2; exit 1; }
parts=${*:-kernels sanitize torch settings speed}
wants() { [[ " $parts " == *" $1 "* ]]; }
failed=()
# check NAME COMMAND...: runs, reports, remembers a failure, goes on.
check() {
    local name=$1
    shift
    echo "== $name"
    if "$@"; then echo "ok: $name"; else
        echo "FAILED: $name"
        failed+=("$name")
    fi
}

chmod +x .gpu/gpu_* .gpu/kernel_speed .gpu/reference
export FLASHCOMM_REQUIRE_GPU=1
FLASHCOMM_LIB=$PWD/.gpu/libflashcomm.so
export FLASHCOMM_LIB FLASHCOMM_REFERENCE=$PWD/.gpu/reference

# job RANKS BITS PROGRAM ARGUMENT...: a PyTorch job with the shim preloaded, every size compressed.
job() {
    local ranks=$1 bits=$2
    shift 2
    FLASHCOMM_SCRATCH=$(mktemp -d -p /dev/shm) || return
    export FLASHCOMM_SCRATCH
    local status=0
    LD_PRELOAD=$FLASHCOMM_LIB FLASHCOMM_BITS=$bits FLASHCOMM_MIN_BYTES=0 \
        python3 scripts/gpu/launch.py "$ranks" 150 "$@" || status=$?
    rm -rf "$FLASHCOMM_SCRATCH"
    return $status
}

if wants kernels; then
    for test in .gpu/gpu_*; do check "$(basename "$test")" timeout 200 "$test"; done
fi
if wants sanitize; then
    check "memcheck of the kernels" timeout 200 compute-sanitizer --tool memcheck --error-exitcode 1 \
        .gpu/gpu_kernels at_every_border >"$out/memcheck.txt" 2>&1
    tail -n 3 "$out/memcheck.txt"
fi
if wants torch; then
    for ranks in 2 4; do
        for bits in 8 4; do check "PyTorch, $ranks ranks, $bits bits" job "$ranks" "$bits" scripts/gpu/torch_job.py; done
    done
fi
if wants settings; then
    check "ranks with different settings" timeout 100 python3 scripts/gpu/settings_job.py
fi
if wants speed; then
    check "kernel speed" timeout 100 .gpu/kernel_speed >"$out/kernel_speed.json"
    cat "$out/kernel_speed.json"
    check "plain NCCL" python3 scripts/gpu/launch.py 2 100 scripts/gpu/torch_speed.py "$out/speed_plain.json"
    for bits in 4 8; do
        check "$bits bits" job 2 "$bits" scripts/gpu/torch_speed.py "$out/speed_$bits.json"
    done
    python3 - "$out" <<'PYTHON'
import json, sys
plain, four, eight = (json.load(open(f"{sys.argv[1]}/speed_{name}.json")) for name in ["plain", "4", "8"])
print("MiB    plain ms   4 bits ms       8 bits ms       (2 ranks over NCCL's sockets, fp16)")
for mib in plain:
    p, a, b = plain[mib], four[mib], eight[mib]
    print(f"{mib:>5} {p:9.3f} {a:9.3f} {p / a:5.2f}x {b:9.3f} {p / b:5.2f}x")
PYTHON
fi

if ((${#failed[@]})); then
    printf 'FAILED: %s\n' "${failed[@]}"
    exit 1
fi
echo "all GPU checks passed: $parts"
