#!/usr/bin/env python3
"""Reports registers and spills of every kernel, per architecture, of the library that embeds them; fails on a spill.

usage: check_spills.py target/release/libflashcomm.so

Reads what `cuobjdump --dump-resource-usage` says of the fatbin in the library: a spilled register shows as local
memory or a stack frame, and the kernels use neither for anything else.
"""

import collections
import pathlib
import re
import shutil
import subprocess
import sys

TOOLKIT = pathlib.Path(__file__).resolve().parent.parent / ".toolkit"


def cuobjdump():
    for folder in ["cuda", "cuobjdump"]:
        tool = TOOLKIT / folder / "bin" / "cuobjdump"
        if tool.exists():
            return str(tool)
    found = shutil.which("cuobjdump")
    if not found:
        sys.exit("cuobjdump is missing; run ./scripts/setup.sh --test")
    return found


def fatbin(library):
    """The embedded fatbin: from its magic number and header on."""
    data = library.read_bytes()
    at = data.find(b"\x50\xed\x55\xba\x01\x00\x10\x00")
    if at < 0:
        sys.exit(f"{library} holds no fatbin")
    size = int.from_bytes(data[at + 8 : at + 16], "little")
    return data[at : at + 16 + size]


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    image = pathlib.Path(sys.argv[1]).with_suffix(".fatbin")
    image.write_bytes(fatbin(pathlib.Path(sys.argv[1])))
    report = subprocess.run([cuobjdump(), "--dump-resource-usage", image], capture_output=True, text=True, check=True)
    arch, kernels, spilled = None, collections.defaultdict(list), []
    name = None
    for line in report.stdout.splitlines():
        if found := re.search(r"arch = (sm_\d+)", line):
            arch = found[1]
        elif found := re.search(r"Function (\w+)", line):
            name = found[1]
        elif found := re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", line):
            registers, stack, local = map(int, found.groups())
            kernels[arch].append((registers, name))
            if stack or local:
                spilled.append(f"{arch} {name}: stack {stack}, local {local} bytes")
    if not kernels:
        sys.exit("no kernels found")
    for arch, found in sorted(kernels.items()):
        registers, name = max(found)
        print(f"{arch}: {len(found)} kernels, at most {registers} registers ({name})")
    if spilled:
        sys.exit("spilled:\n" + "\n".join(spilled))
    print("no kernel spills on any architecture")


main()
