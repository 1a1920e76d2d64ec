#!/usr/bin/env bash
# Everything that needs a GPU, on one GPU, with nothing but python3 with PyTorch: kernels against the reference,
# PyTorch jobs and other clients through the shim, and speed beside plain NCCL of the same run. What it runs comes from
# scripts/pack_gpu.sh. Results go to the folder named by OUT (default: .gpu/results).
#
#   ./scripts/test_gpu.sh [kernels] [sanitize] [torch-nccl] [torch-peer] [torch-host] [worlds] [soak] [settings] [lifecycle] [kill]
#                         [jobs] [example] [clients] [bench] [speed] [ttft] [gpus]                  default: all
#
# `gpus` gives each rank a GPU of its own, where there are several; the ranks of all other parts share one.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=${OUT:-.gpu/results}
mkdir -p "$out"
[[ -f .gpu/libflashcomm.so ]] || { echo "run ./scripts/pack_gpu.sh first, where cargo is, and bring .gpu/ along" >&2; exit 1; }
parts=${*:-kernels sanitize torch-nccl torch-peer torch-host worlds soak settings lifecycle kill jobs example clients bench speed ttft gpus}
wants() { [[ " $parts " == *" $1 "* ]]; }
failed=()
# check NAME COMMAND...: runs, reports, remembers a failure, goes on.
check() {
    local name=$1
    shift
    local start=$SECONDS
    echo "== $name" >&2 # what it prints itself may go to a file
    if "$@"; then echo "ok: $name, $((SECONDS - start)) s" >&2; else
        echo "FAILED: $name, after $((SECONDS - start)) s" >&2
        failed+=("$name")
    fi
}

chmod +x .gpu/gpu_* .gpu/sim_* .gpu/flashcomm .gpu/reference .gpu/control
export FLASHCOMM_REQUIRE_GPU=1
FLASHCOMM_LIB=$PWD/.gpu/libflashcomm.so
export FLASHCOMM_LIB FLASHCOMM_REFERENCE=$PWD/.gpu/reference

# mps COMMAND...: runs it while processes share the GPU. Without MPS they take turns on it: what waits for another rank
# then waits for a time slice.
mps() {
    export CUDA_MPS_PIPE_DIRECTORY=/tmp/mps CUDA_MPS_LOG_DIRECTORY=/tmp/mpslog
    mkdir -p "$CUDA_MPS_PIPE_DIRECTORY" "$CUDA_MPS_LOG_DIRECTORY"
    nvidia-cuda-mps-control -d
    "$@"
    echo quit | nvidia-cuda-mps-control
    unset CUDA_MPS_PIPE_DIRECTORY CUDA_MPS_LOG_DIRECTORY
}

# job RANKS BITS EXCHANGE PROGRAM ARGUMENT...: a PyTorch job with the shim preloaded, every size compressed.
job() {
    local ranks=$1 bits=$2 exchange=$3
    shift 3
    FLASHCOMM_SCRATCH=$(mktemp -d -p /dev/shm) || return
    export FLASHCOMM_SCRATCH
    local status=0
    LD_PRELOAD=$FLASHCOMM_LIB FLASHCOMM_BITS=$bits FLASHCOMM_EXCHANGE=$exchange FLASHCOMM_MIN_BYTES=0 \
        python3 scripts/gpu/launch.py "$ranks" 150 "$@" || status=$?
    rm -rf "$FLASHCOMM_SCRATCH"
    return $status
}

# The packed NCCL, which takes several ranks on a GPU; PyTorch's own is too old for that.
unpack_nccl() {
    [[ -f .gpu/libnccl.so.2 ]] && return
    python3 - <<'PYTHON' && mv .gpu/libnccl.so.2.part .gpu/libnccl.so.2
import lzma, shutil
with lzma.open(".gpu/libnccl.so.2.xz") as packed, open(".gpu/libnccl.so.2.part", "wb") as unpacked:
    shutil.copyfileobj(packed, unpacked)
PYTHON
}

# Ranks that share the GPU, as threads: the shim beside NCCL in the same run, and the kernels alone.
bench() {
    unpack_nccl || return
    timeout 400 .gpu/flashcomm bench --nccl .gpu/libnccl.so.2 --graph --crossover --kernels --json "$out/bench.json"
}

# PyTorch jobs of 2 and 4 ranks at 8 and 4 bits over an exchange.
torch_jobs() {
    local ranks bits
    for ranks in 2 4; do
        for bits in 8 4; do
            check "PyTorch, $ranks ranks, $bits bits, $1" job "$ranks" "$bits" "$1" scripts/gpu/torch_job.py
        done
    done
}

# sharing_gpu COMMAND...: with what NCCL and the driver need where threads of one process are ranks that share a GPU
# (docs/troubleshooting.md).
sharing_gpu() {
    NCCL_MULTI_RANK_GPU_ENABLE=1 NCCL_MAX_CTAS=8 NCCL_SET_STACK_SIZE=1 CUDA_DEVICE_MAX_CONNECTIONS=32 CUDA_MODULE_LOADING=EAGER "$@"
}

# lifecycle EXCHANGE
lifecycle() {
    FLASHCOMM_SCRATCH=$(mktemp -d -p /dev/shm) || return
    export FLASHCOMM_SCRATCH
    local status=0
    unpack_nccl || return
    sharing_gpu env FLASHCOMM_NCCL_LIB=$PWD/.gpu/libnccl.so.2 FLASHCOMM_MIN_BYTES=0 \
        FLASHCOMM_BITS=4:8 FLASHCOMM_EXCHANGE=$1 timeout 100 python3 scripts/gpu/lifecycle_job.py || status=$?
    rm -rf "$FLASHCOMM_SCRATCH"
    return $status
}

# client RANKS BITS PROGRAM ARGUMENT...: an unmodified client of NCCL under `flashcomm run`, and whether the shim counted what
# the client issued. With PROGRAM mpirun the ranks are MPI's own.
client() {
    local ranks=$1 bits=$2 status=0
    shift 2
    FLASHCOMM_SCRATCH=$(mktemp -d -p /dev/shm) || return
    export FLASHCOMM_SCRATCH FLASHCOMM_BITS=$bits
    # CuPy wants its libnccl.so.2 from the loader; the one of PyTorch's packages serves it.
    local nccl
    nccl=$(python3 -c 'import nvidia.nccl; print(list(nvidia.nccl.__path__)[0] + "/lib")' 2>/dev/null) || nccl=
    local run=(.gpu/flashcomm run --quiet --bits "$bits" --exchange nccl --min-bytes 0
        --stats-file "$FLASHCOMM_SCRATCH/stats.%p.json" --)
    if [[ $1 == mpirun ]]; then
        mpirun -n "$ranks" --allow-run-as-root --oversubscribe "${run[@]}" python3 "$2" || status=$?
    else
        LD_LIBRARY_PATH=$nccl${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH} "${run[@]}" \
            python3 scripts/gpu/launch.py "$ranks" 120 "$@" || status=$?
    fi
    ((status)) || python3 scripts/gpu/expected.py "$FLASHCOMM_SCRATCH" "$ranks" "$bits" || status=$?
    rm -rf "$FLASHCOMM_SCRATCH"
    unset FLASHCOMM_BITS
    return $status
}

clients() {
    local ranks bits
    for ranks in 2 4; do
        for bits in 8 4; do
            check "DDP, $ranks ranks, $bits bits" client $ranks $bits scripts/gpu/ddp_step.py
        done
    done
    for bits in 8 4; do
        check "vLLM's wrapper of NCCL, $bits bits" client 2 $bits scripts/gpu/vllm_pynccl.py
        check "CuPy, $bits bits" client 2 $bits scripts/gpu/cupy_nccl.py
        check "ranks of mpirun, $bits bits" client 2 $bits mpirun scripts/gpu/mpi_job.py
    done
}

# soak RANKS BITS EXCHANGE CTAS OPERATIONS: two communicators, whose kernels must fit on the GPU together.
soak() { FLASHCOMM_MAX_CTAS=$4 job "$1" "$2" "$3" scripts/gpu/soak_job.py "$5"; }

# Processes of the other worlds, over every exchange: a thousand graphs replayed amid eager operations, each with the reference's bits.
worlds() {
    local ranks exchange
    for ranks in 3 5 8; do
        for exchange in peer host nccl; do
            check "$ranks ranks, $exchange" soak $ranks 4:8 $exchange 8 5000
        done
    done
}

# kill_job EXCHANGE: a rank is killed amid all-reduces.
kill_job() {
    unpack_nccl || return
    FLASHCOMM_SCRATCH=$(mktemp -d -p /dev/shm) || return
    export FLASHCOMM_SCRATCH
    local status=0
    sharing_gpu env FLASHCOMM_NCCL_LIB=$PWD/.gpu/libnccl.so.2 FLASHCOMM_MIN_BYTES=0 FLASHCOMM_BITS=4 FLASHCOMM_EXCHANGE=$1 \
        timeout 100 python3 scripts/gpu/kill_job.py || status=$?
    rm -rf "$FLASHCOMM_SCRATCH"
    return $status
}

# gpu_each RANKS BITS EXCHANGE PROGRAM ARGUMENT...: a PyTorch job as users start it, with a GPU for each rank.
gpu_each() {
    local ranks=$1 bits=$2 exchange=$3 status=0
    shift 3
    FLASHCOMM_SCRATCH=$(mktemp -d -p /dev/shm) || return
    export FLASHCOMM_SCRATCH
    timeout 150 .gpu/flashcomm run --quiet --engine torch --bits "$bits" --exchange "$exchange" --min-bytes 0 -- \
        python3 -m torch.distributed.run --standalone --nproc-per-node "$ranks" "$@" || status=$?
    rm -rf "$FLASHCOMM_SCRATCH"
    return $status
}

gpus() {
    local n exchange ranks_are
    n=$(nvidia-smi --list-gpus | grep -c ^GPU) || true
    ((n > 1)) || { echo "a GPU for each rank: not run, there is only one" >&2; return; }
    nvidia-smi topo -m
    check "doctor" .gpu/flashcomm doctor
    check "the packed NCCL" unpack_nccl
    for exchange in auto host; do check "a GPU each, PyTorch, 4 bits, $exchange" gpu_each "$n" 4 $exchange scripts/gpu/torch_job.py; done
    check "a GPU each, random operations" gpu_each "$n" 4:8 auto scripts/gpu/soak_job.py 20000
    for ranks_are in "" --processes; do
        check "a GPU each, beside NCCL $ranks_are" timeout 100 .gpu/flashcomm bench --nccl .gpu/libnccl.so.2 --worlds "$n" \
            --exchanges peer --sizes 1M,4M,16M,64M --rounds 1 --batches 7 $ranks_are --json "$out/gpus$ranks_are.json"
    done
    # As where GPUs cannot reach each other's memory: NCCL goes over shared memory of the host, too.
    check "a GPU each, over host memory, beside NCCL" timeout 100 env NCCL_P2P_DISABLE=1 .gpu/flashcomm bench --nccl .gpu/libnccl.so.2 \
        --worlds "$n" --exchanges host --bits 8,4,4-plain,16 --sizes 256K,1M,4M,16M,64M --rounds 1 --batches 7 --json "$out/gpus-host.json"
    local ttft=(timeout 300 python3 scripts/gpu/ttft.py --ranks "$n" --bits 8,4 --gpu-each)
    check "a GPU each, time to first token" "${ttft[@]}" --json "$out/gpus-ttft-auto.json"
    check "a GPU each, time to first token, over host memory" env NCCL_P2P_DISABLE=1 "${ttft[@]}" --exchange host --json "$out/gpus-ttft-host.json"
}

# The C++ example with two ranks that share the GPU, over an exchange.
example() {
    unpack_nccl || return
    sharing_gpu env FLASHCOMM_NCCL_LIB=$PWD/.gpu/libnccl.so.2 \
        LD_LIBRARY_PATH=$PWD/.gpu FLASHCOMM_EXCHANGE=$1 FLASHCOMM_MIN_BYTES=0 timeout 60 .gpu/control 2
}

# Two ranks over sockets, plain and at 4 and 8 bits, three times in turn; medians of each and their ratios.
sockets_speed() {
    local to=$1 round bits
    mkdir -p "$to"
    for round in 1 2 3; do
        check "plain NCCL" python3 scripts/gpu/launch.py 2 100 scripts/gpu/torch_speed.py "$to/speed_plain_$round.json"
        for bits in 4 8; do
            check "$bits bits" job 2 "$bits" nccl scripts/gpu/torch_speed.py "$to/speed_${bits}_$round.json"
        done
    done
    python3 - "$to" <<'PYTHON'
import json, statistics, sys
def runs(name):
    return [json.load(open(f"{sys.argv[1]}/speed_{name}_{i}.json")) for i in (1, 2, 3)]
plain, four, eight = runs("plain"), runs("4"), runs("8")
print("2 ranks over NCCL's sockets, fp16, in", sys.argv[1], "(medians of three runs; the ratios of each run behind)")
print("  MiB  plain ms  4 bits ms         8 bits ms")
for mib in plain[0]:
    p, a, b = ([run[mib] for run in kind] for kind in (plain, four, eight))
    P, A, B = map(statistics.median, (p, a, b))
    each = "  ".join(f"{x / y:.2f} {x / z:.2f}" for x, y, z in zip(p, a, b))
    print(f"{mib:>5} {P:9.3f} {A:9.3f} {P / A:5.2f}x {B:9.3f} {P / B:5.2f}x    {each}")
PYTHON
}

if wants kernels; then
    for test in .gpu/gpu_*; do check "$(basename "$test")" timeout 200 "$test"; done
fi
# sanitize TOOL NAME PROGRAM ARGUMENT...
sanitize() {
    local tool=$1 name=$2
    shift 2
    local options=(--tool "$tool" --target-processes all --error-exitcode 1)
    [[ $tool == memcheck ]] && options+=(--report-api-errors no) # the packed NCCL asks for kernels that were trimmed away
    timeout 200 compute-sanitizer "${options[@]}" "$@" >"$out/$tool-$name.txt" 2>&1
}

if wants sanitize; then
    check "memcheck of the kernels" sanitize memcheck kernels .gpu/gpu_kernels
    # The fused kernel with ranks that share the GPU, small jobs of it: under these tools everything takes a hundred times as long.
    check "the packed NCCL" unpack_nccl
    export FLASHCOMM_TEST_REAL=1 FLASHCOMM_TEST_NCCL=$PWD/.gpu/libnccl.so.2
    for tool in memcheck racecheck; do
        check "$tool of the fused kernel" sanitize $tool fused .gpu/sim_groups --test-threads 1 --exact a_simulated_end_discards_the_group
        for memory in gpu host; do
            check "$tool of its rings in $memory memory" sanitize $tool rings-$memory .gpu/sim_allreduce --test-threads 1 --exact rings_go_round_in_${memory}_memory
        done
    done
    unset FLASHCOMM_TEST_REAL FLASHCOMM_TEST_NCCL
fi
if wants torch-nccl; then torch_jobs nccl; fi
if wants torch-peer; then mps torch_jobs peer; fi
if wants torch-host; then mps torch_jobs host; fi
if wants soak; then mps check "100,000 random operations of 4 ranks, peer" soak 4 4 peer 12 100000; fi
if wants worlds; then mps worlds; fi
if wants settings; then
    check "ranks with different settings" env FLASHCOMM_EXCHANGE=nccl timeout 100 python3 scripts/gpu/settings_job.py
fi
if wants lifecycle; then
    # Threads as ranks of one GPU need a newer NCCL than PyTorch brings along.
    for exchange in nccl peer; do check "communicators of every making, $exchange" lifecycle "$exchange"; done
fi
if wants kill; then
    # Without MPS, whose server a killed client may take along.
    for exchange in peer host; do check "a killed rank, $exchange" kill_job "$exchange"; done
fi
if wants jobs; then
    # The simulators' jobs, threads as ranks of this GPU, on the real driver and the packed NCCL.
    export FLASHCOMM_TEST_REAL=1 FLASHCOMM_TEST_NCCL=$PWD/.gpu/libnccl.so.2 FLASHCOMM_TEST_SOAK_OPS=2000
    check "the packed NCCL" unpack_nccl
    check "groups and captures" timeout 120 .gpu/sim_groups --test-threads 1
    check "children, revocation, addresses used again" timeout 60 .gpu/sim_lifecycle --test-threads 1 \
        children revoked address another_thread_captures
    check "sizes at every border" timeout 60 .gpu/sim_allreduce --test-threads 1 two_to_five rings_go replays
    check "every code and width, host memory" timeout 60 .gpu/sim_allreduce --test-threads 1 every_code_equals_the_reference_over_host every_width
    check "what is not finite, in every code" timeout 60 .gpu/sim_allreduce --test-threads 1 every_code_shows
    check "recorded inputs" timeout 60 .gpu/sim_record --test-threads 1 threads_save
    check "statistics" timeout 60 .gpu/sim_stats --test-threads 1 counts_are_its_calls
    check "widths that change" timeout 100 .gpu/sim_control --test-threads 1 \
        threads_change graphs_keep one_thread captures_may_follow
    check "a soak" timeout 60 .gpu/sim_soak --test-threads 1
    unset FLASHCOMM_TEST_REAL FLASHCOMM_TEST_NCCL FLASHCOMM_TEST_SOAK_OPS
fi
if wants clients; then
    check "doctor" .gpu/flashcomm doctor
    mps clients
fi
if wants example; then
    for exchange in peer host nccl; do check "the C++ example, $exchange" example "$exchange"; done
fi
if wants gpus; then gpus; fi
if wants bench; then
    check "all-reduces beside NCCL" bench
fi
if wants speed; then
    # On two hosts the ranks run at the same time, as they do here under MPS only.
    sockets_speed "$out"
    mps sockets_speed "$out/mps"
fi
if wants ttft; then
    # Under MPS the ranks run at the same time, as on two hosts.
    mps check "time to first token" python3 scripts/gpu/ttft.py --json "$out/ttft.json"
fi

if ((${#failed[@]})); then
    printf 'FAILED: %s\n' "${failed[@]}"
    exit 1
fi
echo "all GPU checks passed: $parts"
