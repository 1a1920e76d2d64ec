#!/usr/bin/env python3
"""Packs vLLM for a GPU machine without a network: what that machine's Python lacks, GPU code for its architecture only.

    python3 -m pip list --format=freeze > have.txt                                   on the GPU machine
    pack_vllm.py --version 0.25.1 --have have.txt --arch 90 --out vllm.tar.xz        where there is a network
    tar xf vllm.tar.xz -C /opt && . /opt/site/env.sh                                 on the GPU machine

What have.txt names is left out in whatever version it is, so choose a vLLM that wants the PyTorch which is there: the versions that differ
are listed. What cannot be packed is named, and the rest is packed.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tarfile
import tempfile
import zipfile

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
import trim_nccl

ENV = """# . site/env.sh: puts this vLLM in front of what the machine has
_site=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export PYTHONPATH=$_site${PYTHONPATH:+:$PYTHONPATH} PATH=$_site/bin:$PATH
export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 VLLM_NO_USAGE_STATS=1
"""
# Without the package FlashInfer vLLM's worker ends, unless it is told not to use its sampler.
NO_FLASHINFER = "export VLLM_USE_FLASHINFER_SAMPLER=${VLLM_USE_FLASHINFER_SAMPLER:-0}\n"
COMMAND = """#!/usr/bin/env python3
import sys
from vllm.entrypoints.cli.main import main
sys.exit(main())
"""


def say(text):
    print(text, file=sys.stderr, flush=True)


def plain(name):
    """A package's name as pip compares it."""
    return name.lower().replace("_", "-").replace(".", "-")


def pip(*words):
    return subprocess.run([sys.executable, "-m", "pip", "--disable-pip-version-check", *words], check=True)


def target(args):
    """pip's options for a machine that is not this one."""
    tags = [f"manylinux_2_{minor}_{args.machine}" for minor in range(args.glibc, 4, -1)]
    tags += [f"{name}_{args.machine}" for name in ["manylinux2014", "manylinux2010", "manylinux1", "linux"]]
    options = ["--python-version", args.python, "--only-binary=:all:"]
    return options + [word for tag in tags for word in ("--platform", tag)]


def resolved(args, folder):
    """(name, version, address of the wheel) of vLLM and of all that it needs."""
    report = folder / "report.json"
    dry = ["install", "--dry-run", "--quiet", "--ignore-installed", "--target", str(folder / "none"), "--report", str(report)]
    pip(*dry, *target(args), f"vllm=={args.version}")
    installs = json.loads(report.read_text())["install"]
    return [(one["metadata"]["name"], one["metadata"]["version"], one["download_info"]["url"]) for one in installs]


def missing(packages, have):
    """What the machine lacks. What it has in another version is told."""
    there = dict(line.strip().split("==", 1) for line in have.read_text().splitlines() if "==" in line)
    there = {plain(name): version for name, version in there.items()}
    for name, version, _ in packages:
        if there.get(plain(name), version).split("+")[0] != version.split("+")[0]:
            say(f"  {name}: there it is {there[plain(name)]}, pip would take {version}")
    return [package for package in packages if plain(package[0]) not in there]


def trim(library, arch):
    """Zeroes the GPU code of other architectures. Answers the bytes kept; None where there is no GPU code."""
    image = bytearray(library.read_bytes())
    found = trim_nccl.sections(image)
    if trim_nccl.LOADED not in found:
        return None
    kept = 0
    for its_arch, start, end in trim_nccl.entries(image, *found[trim_nccl.LOADED]):
        if its_arch == arch:
            kept += end - start
        else:
            image[start:end] = bytes(end - start)
    if kept == 0:
        return 0
    offset, size = found.get(trim_nccl.FOR_LINKERS, (0, 0))
    image[offset : offset + size] = bytes(size)
    library.write_bytes(image)
    return kept


def trim_all(site, arch):
    for library in sorted(site.rglob("*.so")):
        try:
            kept = trim(library, arch)
        except ValueError as problem:
            say(f"  {library.relative_to(site)} is left as it is: {problem}")
            continue
        if kept == 0:
            say(f"  {library.relative_to(site)} has no code for sm_{arch} and is left out")
            library.unlink()
        elif kept:
            say(f"  {library.relative_to(site)}: {kept / 1e6:.1f} MB of sm_{arch}")


def pack(args, folder):
    say(f"what vllm {args.version} needs")
    packages = missing(resolved(args, folder), args.have)
    site, wheels = folder / "site", folder / "wheels"
    for i, (name, version, address) in enumerate(packages, 1):
        say(f"[{i}/{len(packages)}] {name} {version}")
        try:
            pip("download", "--quiet", "--no-deps", "--dest", str(wheels), *target(args), address)
        except subprocess.CalledProcessError:
            say(f"  cannot be had, and is not packed: {address}")
    for wheel in sorted(wheels.glob("*.whl")):
        zipfile.ZipFile(wheel).extractall(site)
    trim_all(site, args.arch)
    (site / "bin").mkdir(exist_ok=True)
    (site / "bin/vllm").write_text(COMMAND)
    (site / "bin/vllm").chmod(0o755)
    has_flashinfer = any(plain(name).startswith("flashinfer") for name, *_ in packages)
    (site / "env.sh").write_text(ENV + ("" if has_flashinfer else NO_FLASHINFER))
    say("compressing")
    with tarfile.open(args.out, "w:xz", preset=args.preset) as to:
        to.add(site, "site")
    say(f"{args.out}: {args.out.stat().st_size / 1e6:.0f} MB")


def main():
    parser = argparse.ArgumentParser(description="vLLM for a machine without a network")
    parser.add_argument("--version", required=True, help="of vLLM")
    parser.add_argument("--have", required=True, type=pathlib.Path, help="pip list --format=freeze of the GPU machine")
    parser.add_argument("--arch", type=int, default=90, help="of its GPUs, as in sm_90 (%(default)s)")
    parser.add_argument("--python", default="3.12", help="of that machine (%(default)s)")
    parser.add_argument("--glibc", type=int, default=39, help="of that machine, the number behind 2. (%(default)s)")
    parser.add_argument("--machine", default="x86_64")
    parser.add_argument("--preset", type=int, default=6, help="of xz (%(default)s)")
    parser.add_argument("--out", required=True, type=pathlib.Path)
    with tempfile.TemporaryDirectory() as folder:
        pack(parser.parse_args(), pathlib.Path(folder))


if __name__ == "__main__":
    main()
