#!/usr/bin/env bash
# Builds flashcomm and installs it under a prefix: command, library (and its other name), header, pkg-config file, manual
# pages, completions.
#
#   ./scripts/install.sh PREFIX                 for example /usr/local, or $HOME/.local
#   ./scripts/install.sh PREFIX --simulators    also the simulators, for `flashcomm demo` on a machine without a GPU
#
# FLASHCOMM_CUDA_ARCHS narrows the architectures. To remove it again: the list of what was installed is in
# PREFIX/share/flashcomm/files.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

usage="usage: ./scripts/install.sh PREFIX [--simulators]"
prefix=${1:?$usage}
case ${2:-} in
    "") simulators=false ;;
    --simulators) simulators=true ;;
    *)
        echo "install: unknown argument '$2'; $usage" >&2
        exit 1
        ;;
esac
mkdir -p "$prefix"
prefix=$(cd "$prefix" && pwd)

packages=(-p flashcomm -p flashcomm-soname -p flashcomm-cli)
$simulators && packages+=(-p flashcomm-sim-cuda -p flashcomm-sim-nccl)
cargo build --release "${packages[@]}"

files=()
# put MODE FROM TO
put() {
    install -D -m "$1" "$2" "$prefix/$3"
    files+=("$3")
}
# library FROM TO: without what only a debugger reads
library() {
    put 644 "target/release/$1" "$2"
    strip --strip-unneeded "$prefix/$2"
}

put 755 target/release/flashcomm bin/flashcomm
strip "$prefix/bin/flashcomm"
for name in libflashcomm.so libflashcomm_soname.so; do library $name lib/$name; done
if $simulators; then
    for name in libflashcomm_sim_cuda.so libflashcomm_sim_nccl.so; do library $name lib/flashcomm/$name; done
fi
put 644 include/flashcomm.h include/flashcomm.h

made=$(mktemp -d)
trap 'rm -rf "$made"' EXIT
version=$(sed -n '/^\[workspace.package\]/,/^$/s/^version = "\(.*\)"/\1/p' Cargo.toml)
cat >"$made/flashcomm.pc" <<PC
# From where this file is, so that the tree may be moved.
prefix=\${pcfiledir}/../..
libdir=\${prefix}/lib
includedir=\${prefix}/include

Name: flashcomm
Description: NCCL whose fp16 and bf16 sum all-reduces travel at 2 to 8 bits an element
Version: $version
Libs: -L\${libdir} -lflashcomm
Cflags: -I\${includedir}
PC
put 644 "$made/flashcomm.pc" lib/pkgconfig/flashcomm.pc
target/release/flashcomm pages --man "$made/man"
for page in "$made"/man/*.1; do put 644 "$page" "share/man/man1/$(basename "$page")"; done
# completions SHELL TO
completions() {
    target/release/flashcomm pages --completions "$1" >"$made/completions"
    put 644 "$made/completions" "$2"
}
completions bash share/bash-completion/completions/flashcomm
completions zsh share/zsh/site-functions/_flashcomm
completions fish share/fish/vendor_completions.d/flashcomm.fish
printf '%s\n' "${files[@]}" >"$made/files"
put 644 "$made/files" share/flashcomm/files
echo "installed flashcomm $version in $prefix"
