#!/usr/bin/env bash
# Collects in .gpu/ what scripts/test_gpu.sh needs on a machine that has a GPU but neither cargo nor a network:
# the release library, the command, the GPU test binaries, and the programs that they are compared with.
#
# FLASHCOMM_CUDA_ARCHS narrows the architectures, which makes the library smaller and the build quicker.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

rm -rf .gpu
mkdir -p .gpu
cargo build --release
cargo build --release -p flashcomm-wire --example reference
cargo build --release -p flashcomm --test gpu -p flashcomm-test-support --test sim --message-format=json-render-diagnostics |
    python3 -c '
import json, shutil, sys
for line in sys.stdin:
    message = json.loads(line)
    if message.get("executable") and message["target"]["name"] in ("gpu", "sim"):
        shutil.copy(message["executable"], ".gpu/" + message["target"]["name"])
'
# The C++ example. The simulated driver stands for the real one while it is linked.
cargo build --release -p flashcomm-sim-cuda
mkdir .gpu/link
ln -s "$PWD/target/release/libflashcomm_sim_cuda.so" .gpu/link/libcuda.so.1
make -C examples/cpp OUT="$PWD/.gpu" FLASHCOMM_LIB="$PWD/target/release" CUDA_INCLUDE="${CUDA_HOME:-$PWD/.toolkit/cuda}/include" \
    NCCL_INCLUDE="$PWD/.toolkit/nccl-2.32.3/include" LDFLAGS="-L$PWD/.gpu/link -static-libstdc++ -static-libgcc"
rm -r .gpu/link
cp target/release/libflashcomm.so target/release/libflashcomm_soname.so target/release/flashcomm target/release/examples/reference .gpu/
git describe --always --dirty --abbrev=10 >.gpu/commit 2>/dev/null || echo unknown >.gpu/commit # for the results
# vLLM's own wrapper of NCCL, and what of its source that needs.
vllm=.toolkit/vllm-0.33.0
if [[ -d $vllm ]]; then
    for file in envs.py utils/nccl.py distributed/device_communicators/pynccl_wrapper.py; do
        install -D -m 644 $vllm/$file .gpu/vllm/$file
    done
else
    echo "no source of vLLM packed: run setup.sh --test"
fi
# A real NCCL for the tests that PyTorch's own is too old for. Whole it would be 300 MB; carry one architecture.
if [[ ${FLASHCOMM_CUDA_ARCHS:-} =~ ^[0-9]+$ && -f .toolkit/nccl-2.32.3/lib/libnccl.so.2 ]]; then
    python3 scripts/trim_nccl.py .toolkit/nccl-2.32.3/lib/libnccl.so.2 .gpu/libnccl.so.2 "$FLASHCOMM_CUDA_ARCHS"
    xz -1 -T0 .gpu/libnccl.so.2
else
    echo "no trimmed NCCL packed: set FLASHCOMM_CUDA_ARCHS to the one architecture of the GPU and run setup.sh --test"
fi
strip .gpu/gpu .gpu/sim .gpu/flashcomm .gpu/reference .gpu/control
du -sh .gpu
