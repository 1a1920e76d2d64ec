#!/usr/bin/env bash
# The whole test of a machine without a GPU: sets up, checks the format and the lints, compiles the kernels for every
# architecture with a report on registers and spills, and runs the tests against two real NCCLs.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
step() { printf '\n== %s\n' "$*"; }

step "setup"
./scripts/setup.sh --test
export FLASHCOMM_TEST_NCCL=$PWD/.toolkit/nccl-2.32.3/lib/libnccl.so.2
export FLASHCOMM_TEST_NCCL_OLD=$PWD/.toolkit/nccl-2.18.3/lib/libnccl.so.2

step "format"
cargo fmt --all --check

# The release library below is compiled for every architecture; one is enough for lints and tests.
step "clippy"
FLASHCOMM_CUDA_ARCHS=90 cargo clippy --workspace --all-targets -- -D warnings

step "aarch64 jumps"
python3 scripts/check_aarch64.py

step "tests"
FLASHCOMM_CUDA_ARCHS=90 cargo build --workspace
FLASHCOMM_CUDA_ARCHS=90 cargo nextest run --workspace --no-fail-fast
echo "tests/gpu_*.rs ran no kernel unless this machine has a GPU: ./scripts/test_gpu.sh is for one that has"

step "release build, all architectures"
cargo build --release
python3 scripts/check_spills.py target/release/libflashcomm.so
