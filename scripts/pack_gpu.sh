#!/usr/bin/env bash
# Collects in .gpu/ what scripts/test_gpu.sh needs on a machine that has a GPU but neither cargo nor a network:
# the release library, the GPU test binaries, and the programs that they are compared with.
#
# FLASHCOMM_CUDA_ARCHS narrows the architectures, which makes the library smaller and the build quicker.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

rm -rf .gpu
mkdir -p .gpu
cargo build --release --lib --example kernel_speed
cargo build --release -p flashcomm-wire --example reference
cargo build --release --tests --message-format=json 2>/dev/null |
    python3 -c '
import json, shutil, sys
for line in sys.stdin:
    message = json.loads(line)
    if message.get("executable") and message["target"]["name"].startswith("gpu_"):
        shutil.copy(message["executable"], ".gpu/" + message["target"]["name"])
'
cp target/release/libflashcomm.so target/release/examples/kernel_speed target/release/examples/reference .gpu/
strip .gpu/gpu_* .gpu/kernel_speed .gpu/reference
du -sh .gpu
