#!/usr/bin/env bash
# The wheel as a user gets it: in a fresh environment, away from this repository, with nothing in the way of variables.
# Wants a wheel in dist/ (scripts/package.sh) and the NCCL that scripts/setup.sh --test fetches.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
wheel=$(ls "$PWD"/dist/flashcomm-*.whl)
nccl=$(realpath .toolkit/nccl-2.32.3/lib/libnccl.so.2)
version=$(sed -n '/^\[workspace.package\]/,/^$/s/^version = "\(.*\)"/\1/p' Cargo.toml)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
fail() {
    echo "test_wheel: $*" >&2
    exit 1
}
# has TEXT WHAT: WHAT must hold TEXT
has() { [[ $2 == *"$1"* ]] || fail "no '$1' in: $2"; }

python3 -m venv venv
venv/bin/pip install --quiet --no-index --disable-pip-version-check "$wheel"
# The environment of a user who has activated it, and no more.
user() { env -i HOME="$work" PATH="$work/venv/bin:/usr/bin:/bin" "$@"; }

has "flashcomm $version" "$(user flashcomm --version)"
[[ -z $(venv/bin/pip show flashcomm | sed -n 's/^Requires: *//p') ]] || fail "it wants other packages"

echo "- demo"
# Where there is no GPU it takes the simulator by itself.
where=()
[[ -e /dev/nvidia0 ]] && where=(--simulator)
demo=$(user flashcomm demo "${where[@]}" --ranks 2 --bits 4 --size 256K) || fail "demo: $demo"
has "the simulator" "$demo"
has "3.37x" "$demo"
has "$work/venv/lib/libflashcomm.so" "$demo"

echo "- doctor"
status=0
doctor=$(user flashcomm doctor --nccl-lib "$nccl" 2>&1) || status=$?
has "2.32.3 at $nccl" "$doctor"
if [[ -e /dev/nvidia0 ]]; then
    ((status == 0)) || fail "doctor ends with $status: $doctor"
else
    has "no GPU" "$doctor"
    ((status == 2)) || fail "doctor ends with $status and not 2: $doctor"
fi
user flashcomm doctor --simulator >/dev/null || fail "doctor is not content with the simulator"

echo "- run"
shim=$(user flashcomm run --quiet --bits 4 --nccl-lib "$nccl" -- sh -c 'echo "$LD_PRELOAD $FLASHCOMM_BITS $FLASHCOMM_NCCL_LIB"')
[[ $shim == "$work/venv/lib/libflashcomm.so:$work/venv/lib/libflashcomm_soname.so 4 $nccl" ]] || fail "run gives $shim"
# The exports win the lookup of a Python, and answer with the real library's version.
answer=$(user flashcomm run -q --nccl-lib "$nccl" -- python3 -c '
import ctypes
version = ctypes.c_int()
process = ctypes.CDLL(None)
assert process.flashcommGetVersion(ctypes.byref(version)) == 0 and process.ncclGetVersion(ctypes.byref(version)) == 0
print(version.value)')
[[ $answer == 23203 ]] || fail "a Python under run sees NCCL $answer"
# Who opens NCCL by its name meets the shim, too, and that is told.
answer=$(user flashcomm run -q --check --nccl-lib "$nccl" -- python3 -c '
import ctypes
version = ctypes.c_int()
opened = ctypes.CDLL("libnccl.so.2")
assert opened.flashcommGetVersion(ctypes.byref(version)) == 0 and opened.ncclGetVersion(ctypes.byref(version)) == 0
print(version.value)' 2>&1)
[[ $answer == 23203* ]] || fail "a Python that opens libnccl.so.2 under run sees NCCL $answer"
has "NCCL was reached by 1 process" "$answer"
# An NCCL that is installed in the same environment is found without being named.
site=$(user python3 -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
mkdir -p "$site/nvidia/nccl/lib"
ln -s "$nccl" "$site/nvidia/nccl/lib/libnccl.so.2"
has "in front of NCCL 2.32.3 at $site" "$(user flashcomm run -- python3 -c '' 2>&1)"
status=0
refused=$(user flashcomm run --bits 9 -- true 2>&1) || status=$?
((status == 125)) || fail "run --bits 9 ends with $status: $refused"

echo "- plugins"
# As an engine finds them, by any Python from 3.8 on; without the variable nothing of an engine or of torch is looked for.
user python3 - "$work/venv/lib/libflashcomm.so" <<'PYTHON' || fail "plugins"
import ast, importlib.metadata, os, pathlib, sys

groups = {"vllm.general_plugins": "vllm", "sglang.srt.plugins": "sglang"}
points = importlib.metadata.distribution("flashcomm").entry_points
found = {point.group: point.value for point in points}
assert found == {group: f"flashcomm_plugins.{name}:load" for group, name in groups.items()}, found

class Asked:
    names = set()

    def find_spec(self, name, *_):
        self.names.add(name.partition(".")[0])

sys.meta_path.insert(0, Asked())
assert [point.load()() for point in points] == [None, None]
assert "flashcomm_plugins" in Asked.names and not Asked.names & {"torch", "vllm", "sglang"}, Asked.names
os.environ["FLASHCOMM_PLUGIN"] = "1"
import flashcomm_plugins.shim

assert flashcomm_plugins.shim.path() == os.path.realpath(sys.argv[1]), flashcomm_plugins.shim.path()
for path in pathlib.Path(flashcomm_plugins.__file__).parent.glob("*.py"):
    ast.parse(path.read_text(), feature_version=(3, 8))
PYTHON
# Where there is no engine they say so, and do no harm.
said=$(user FLASHCOMM_PLUGIN=1 python3 -c 'import flashcomm_plugins.vllm; flashcomm_plugins.vllm.load()' 2>&1)
has "the plugin for vLLM stays out: this vLLM is unknown to it: ModuleNotFoundError" "$said"
[[ -z $(find "$site" -path '*flashcomm_plugins*' -name '*.so') ]] || fail "a library in the plugins"

echo "- header and library"
echo '#include <flashcomm.h>
int main(void) { int v = 0; return flashcommGetVersion(&v) == FLASHCOMM_SUCCESS && v >= 0 ? 0 : 1; }' >c.c
cc c.c -o c -I venv/include -L venv/lib -lflashcomm
LD_LIBRARY_PATH=venv/lib ./c || fail "a C program that links it"
if command -v pkg-config >/dev/null; then
    flags=$(PKG_CONFIG_PATH=venv/lib/pkgconfig pkg-config --cflags --libs flashcomm)
    # shellcheck disable=SC2086
    cc c.c -o c $flags
fi
for page in flashcomm flashcomm-run flashcomm-doctor; do [[ -s venv/share/man/man1/$page.1 ]] || fail "no $page.1"; done

echo "- uninstall"
venv/bin/pip uninstall --quiet --yes flashcomm
left=$(find venv -name '*flashcomm*')
[[ -z $left ]] || fail "left behind: $left"
echo "test_wheel: $(basename "$wheel") is fine"
