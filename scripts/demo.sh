#!/usr/bin/env bash
# Builds flashcomm and shows it: ranks sum the same numbers at every width. Arguments go to `flashcomm demo`.
#
# Where there is no GPU it runs on the simulator, which is built then, too. The first run compiles for some minutes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

./scripts/setup.sh
packages=(-p flashcomm -p flashcomm-cli)
# One architecture builds soonest: that of the GPU, or any one where no kernel will run.
if capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -n 1) && [[ $capability ]]; then
    architecture=${capability/./}
else
    architecture=90
    packages+=(-p flashcomm-sim-cuda -p flashcomm-sim-nccl)
fi
export FLASHCOMM_CUDA_ARCHS=${FLASHCOMM_CUDA_ARCHS:-$architecture}
cargo build "${packages[@]}"
echo
exec target/debug/flashcomm demo "$@"
