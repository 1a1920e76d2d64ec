"""What pack_vllm.py and pack_sglang.py share: what an engine needs and a machine lacks, without the code of other GPUs."""

import json
import pathlib
import shutil
import subprocess
import sys
import tarfile
import zipfile

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
import trim_nccl


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


def resolved(args, folder, engine):
    """(name, version, address of the wheel) of the engine and of all that it needs."""
    report = folder / "report.json"
    dry = ["install", "--dry-run", "--quiet", "--ignore-installed", "--target", str(folder / "none"), "--report", str(report)]
    pip(*dry, *target(args), f"{engine}=={args.version}")
    installs = json.loads(report.read_text())["install"]
    return [(one["metadata"]["name"], one["metadata"]["version"], one["download_info"]["url"]) for one in installs]


def missing(packages, have, replaced=()):
    """What the machine lacks. What it has in another version is told, and is missing if it is to be replaced."""
    there = dict(line.strip().split("==", 1) for line in have.read_text().splitlines() if "==" in line)
    there = {plain(name): version for name, version in there.items()}
    wanted = []
    for package in packages:
        name, version = plain(package[0]), package[1]
        is_same = there.get(name, version).split("+")[0] == version.split("+")[0]
        if name not in there or (name in replaced and not is_same):
            wanted.append(package)
        elif not is_same:
            say(f"  {name}: there it is {there[name]}, pip would take {version}")
    return wanted


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


def download(args, packages, wheels):
    for i, (name, version, address) in enumerate(packages, 1):
        say(f"[{i}/{len(packages)}] {name} {version}")
        try:
            pip("download", "--quiet", "--no-deps", "--dest", str(wheels), *target(args), address)
        except subprocess.CalledProcessError:
            say(f"  cannot be had, and is not packed: {address}")


def unpack(wheels, site):
    for wheel in sorted(wheels.glob("*.whl")):
        zipfile.ZipFile(wheel).extractall(site)


def strip_all(site):
    """Leaves out what is for debuggers, where there is a `strip` and it saves much."""
    if not shutil.which("strip"):
        say("  no strip is installed: what is for debuggers stays in the libraries")
        return
    for library in sorted(site.rglob("*.so")):
        stripped = library.with_suffix(".stripped")
        subprocess.run(["strip", "--strip-unneeded", "-o", stripped, library], capture_output=True, check=False)
        saved = library.stat().st_size - stripped.stat().st_size if stripped.exists() else 0
        if saved > 1e6:
            say(f"  {library.relative_to(site)}: {saved / 1e6:.1f} MB of it were for debuggers")
            stripped.replace(library)
        stripped.unlink(missing_ok=True)


def compress(site, args):
    say("compressing")
    with tarfile.open(args.out, "w:xz", preset=args.preset) as to:
        to.add(site, "site")
    say(f"{args.out}: {args.out.stat().st_size / 1e6:.0f} MB")


def options(parser, engine):
    parser.add_argument("--version", required=True, help=f"of {engine}")
    parser.add_argument("--have", required=True, type=pathlib.Path, help="pip list --format=freeze of the GPU machine")
    parser.add_argument("--arch", type=int, default=90, help="of its GPUs, as in sm_90 (%(default)s)")
    parser.add_argument("--python", default="3.12", help="of that machine (%(default)s)")
    parser.add_argument("--glibc", type=int, default=39, help="of that machine, the number behind 2. (%(default)s)")
    parser.add_argument("--machine", default="x86_64")
    parser.add_argument("--preset", type=int, default=6, help="of xz (%(default)s)")
    parser.add_argument("--out", required=True, type=pathlib.Path)
