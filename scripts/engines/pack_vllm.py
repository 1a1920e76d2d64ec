#!/usr/bin/env python3
"""Packs vLLM for a GPU machine without a network: what that machine's Python lacks, GPU code for its architecture only.

    python3 -m pip list --format=freeze > have.txt                                   on the GPU machine
    pack_vllm.py --version 0.25.1 --have have.txt --arch 90 --out vllm.tar.xz        where there is a network
    tar xf vllm.tar.xz -C /opt && . /opt/site/env.sh                                 on the GPU machine

What have.txt names is left out in whatever version it is, so choose a vLLM that wants the PyTorch which is there: the versions that differ
are listed. What cannot be packed is named, and the rest is packed.
"""

import argparse
import pathlib
import tempfile

import packing

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


def pack(args, folder):
    packing.say(f"what vllm {args.version} needs")
    packages = packing.missing(packing.resolved(args, folder, "vllm"), args.have)
    site, wheels = folder / "site", folder / "wheels"
    packing.download(args, packages, wheels)
    packing.unpack(wheels, site)
    packing.trim_all(site, args.arch)
    (site / "bin").mkdir(exist_ok=True)
    (site / "bin/vllm").write_text(COMMAND)
    (site / "bin/vllm").chmod(0o755)
    has_flashinfer = any(packing.plain(name).startswith("flashinfer") for name, *_ in packages)
    (site / "env.sh").write_text(ENV + ("" if has_flashinfer else NO_FLASHINFER))
    packing.compress(site, args)


def main():
    parser = argparse.ArgumentParser(description="vLLM for a machine without a network")
    packing.options(parser, "vLLM")
    with tempfile.TemporaryDirectory() as folder:
        pack(parser.parse_args(), pathlib.Path(folder))


if __name__ == "__main__":
    main()
