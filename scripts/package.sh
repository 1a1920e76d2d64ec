#!/usr/bin/env bash
# Makes dist/flashcomm-VERSION-py3-none-manylinux_*.whl: the command on PATH, the library and its other name, the simulators,
# header, manual pages and completions, and the plugins of vLLM and SGLang. FLASHCOMM_CUDA_ARCHS narrows the architectures.
#
# The tag is the oldest glibc that auditwheel finds the files to need, so it depends on the machine that builds.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
./scripts/setup.sh --package

stage=target/package/flashcomm.data
rm -rf target/package dist
./scripts/install.sh $stage/data --simulators
# The list is of no use in an environment that pip keeps, and the command is maturin's to put.
rm -rf $stage/data/bin $stage/data/share/flashcomm

.toolkit/maturin/maturin build --release --strip --out dist
wheel=$(ls dist/flashcomm-*.whl)
shown=$(PYTHONPATH=.toolkit/auditwheel python3 -m auditwheel show "$wheel")
tag=$(sed -n 's/.*consistent with the following platform tag: "\([^"]*\)".*/\1/p' <<<"$(tr '\n' ' ' <<<"$shown")")
case $wheel in
    *-py3-none-*"$tag"*.whl) echo "made $wheel; auditwheel: $tag" ;;
    *)
        echo "package: $wheel has another platform tag than auditwheel finds:" >&2
        echo "$shown" >&2
        exit 1
        ;;
esac
