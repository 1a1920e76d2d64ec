#!/usr/bin/env bash
# Leaves this machine able to build flashcomm and, with --test, to test it. Safe to run again: what is there stays.
#
#   ./scripts/setup.sh          what a build needs: checks the compilers, fetches nvcc if there is none
#   ./scripts/setup.sh --test   also the real NCCL in two versions, cuobjdump, cargo-nextest, pytest, and the Python source of
#                               vLLM and SGLang, against which the launcher is tested
#   ./scripts/setup.sh --package  also maturin and auditwheel
#   ./scripts/setup.sh --miri   also a Rust nightly with Miri, where there is rustup
#
# Everything fetched goes to .toolkit/ (ignored by git; delete it to start over), nothing into the system, except
# cargo-nextest, which cargo installs where it installs everything.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# One CUDA release throughout: nvcc refuses the headers of another. cuobjdump is younger because pip has no older one.
toolkit_packages=(
    nvidia-cuda-nvcc==13.0.88
    nvidia-nvvm==13.0.88
    nvidia-cuda-crt==13.0.88
    nvidia-cuda-runtime==13.0.96
    nvidia-cuda-cccl==13.0.85
)
cuobjdump_package=nvidia-cuda-cuobjdump==13.2.86
pytest_packages=(pytest==9.2.0 pytest-timeout==2.4.0 pluggy==1.7.0 iniconfig==2.3.1 packaging==26.4 pygments==2.21.0)
nightly=nightly-2026-10-30
# The newest architecture that build.rs compiles for, so an nvcc that knows it knows them all.
newest_arch=sm_120

say() { echo "setup: $*"; }
die() {
    echo "setup: $*" >&2
    exit 1
}
have() { command -v "$1" >/dev/null; }

want_test=false want_miri=false want_package=false
for arg in "$@"; do
    case $arg in
        --test) want_test=true ;;
        --miri) want_miri=true ;;
        --package) want_package=true ;;
        *) die "unknown argument '$arg'; usage: ./scripts/setup.sh [--test] [--miri] [--package]" ;;
    esac
done

have cargo || die "cargo is missing. Install Rust 1.88 or newer from https://rustup.rs"
have cc || die "a C compiler (cc) is missing. On Debian or Ubuntu: apt-get install build-essential"
have g++ || die "g++ is missing. On Debian or Ubuntu: apt-get install build-essential"

# fetch TARGET PREFIX PACKAGE...: makes TARGET out of what the packages' wheels hold under PREFIX. TARGET appears only when
# complete, and is made anew when the list of packages has changed. `only` narrows it to names that match.
only='*'
fetch() {
    local target=$1 prefix=$2
    shift 2
    if [[ -f $target/.packages && $(<"$target/.packages") == "$*" ]]; then
        return
    fi
    python3 -m pip --version >/dev/null 2>&1 ||
        die "python3 with pip is missing. On Debian or Ubuntu: apt-get install python3 python3-pip"
    local partial=$target.partial
    rm -rf "$partial"
    mkdir -p "$partial/wheels" "$partial/tree"
    say "downloading $* for $target"
    python3 -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
        --dest "$partial/wheels" "$@" ||
        die "pip could not download $*. Check the network (and PIP_INDEX_URL if you use a mirror), then run this again"
    # Not `pip install --target`: it would compile and byte-compile nothing of use here, and drops the modes of some tools.
    python3 - "$prefix" "$partial" "$only" <<'PYTHON'
import fnmatch, pathlib, sys, zipfile

prefix, partial, only = sys.argv[1], pathlib.Path(sys.argv[2]), sys.argv[3]
for wheel in sorted((partial / "wheels").glob("*.whl")):
    with zipfile.ZipFile(wheel) as archive:
        for member in archive.infolist():
            if member.is_dir() or not member.filename.startswith(prefix) or not fnmatch.fnmatch(member.filename, only):
                continue
            path = partial / "tree" / member.filename.removeprefix(prefix)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(archive.read(member))
            # zipfile forgets the modes, and the tools must stay executable.
            path.chmod(0o755 if member.external_attr >> 16 & 0o100 else 0o644)
PYTHON
    echo "$*" >"$partial/tree/.packages"
    rm -rf "$target"
    mv "$partial/tree" "$target"
    rm -rf "$partial"
}

# The same order as in build.rs. Prints nothing where there is none.
find_nvcc() {
    local candidate
    if [[ -n ${NVCC:-} ]]; then
        command -v "$NVCC" || die "NVCC is set to '$NVCC', which cannot be run. Correct it, or unset it"
        return
    fi
    for candidate in ${CUDA_HOME:+"$CUDA_HOME/bin/nvcc"} ${CUDA_PATH:+"$CUDA_PATH/bin/nvcc"} .toolkit/cuda/bin/nvcc; do
        if [[ -x $candidate ]]; then
            echo "$candidate"
            return
        fi
    done
    command -v nvcc || true
}

nvcc=$(find_nvcc)
case $nvcc in
    "" | .toolkit/*)
        fetch .toolkit/cuda nvidia/cu13/ "${toolkit_packages[@]}"
        nvcc=.toolkit/cuda/bin/nvcc
        ;;
    *)
        if ! "$nvcc" --list-gpu-code | grep -qx "$newest_arch"; then
            say "$nvcc is too old for $newest_arch: install CUDA 12.8 or newer, or unset NVCC, CUDA_HOME and CUDA_PATH and take" \
                "nvcc off PATH to have one fetched, or name what it can do in FLASHCOMM_CUDA_ARCHS (for example 80,90)" >&2
            [[ -n ${FLASHCOMM_CUDA_ARCHS:-} ]] || exit 1
        fi
        ;;
esac
say "nvcc: $nvcc ($("$nvcc" --version | sed -n 's/.*release \(.*\),.*/\1/p'))"

if $want_test; then
    fetch .toolkit/cuobjdump nvidia/cu13/ "$cuobjdump_package"
    fetch .toolkit/nccl-2.32.3 nvidia/nccl/ nvidia-nccl-cu13==2.32.3
    if [[ $(uname -m) == x86_64 ]]; then
        fetch .toolkit/nccl-2.18.3 nvidia/nccl/ nvidia-nccl-cu12==2.18.3
    else
        say "no NCCL 2.18.3 for $(uname -m) on PyPI: the tests against an old NCCL will be skipped"
    fi
    # Whatever this machine is: of these only the Python is read.
    any_machine=(--python-version 3.11 --platform manylinux_2_28_x86_64 --platform manylinux_2_34_x86_64)
    only='*.py' fetch .toolkit/vllm-0.33.0 vllm/ "${any_machine[@]}" vllm==0.33.0
    only='*.py' fetch .toolkit/sglang-0.5.23 sglang/ "${any_machine[@]}" sglang==0.5.23
    fetch .toolkit/pytest "" "${pytest_packages[@]}"
    if ! cargo nextest --version >/dev/null 2>&1; then
        say "installing cargo-nextest"
        cargo install --locked cargo-nextest
    fi
    say "NCCL: .toolkit/nccl-2.32.3, .toolkit/nccl-2.18.3"
fi
if $want_package; then
    fetch .toolkit/maturin maturin-1.16.0.data/scripts/ maturin==1.16.0
    fetch .toolkit/auditwheel "" auditwheel==6.8.2 pyelftools==0.33 packaging==26.3
fi
if $want_miri && have rustup && ! cargo "+$nightly" miri --version >/dev/null 2>&1; then
    say "installing Rust $nightly with Miri"
    rustup toolchain install "$nightly" --profile minimal --component miri --component rust-src ||
        say "no $nightly with Miri to be had: its step will be skipped"
fi
say "done"
