#!/usr/bin/env python3
"""Packs SGLang for a GPU machine without a network: what that machine's Python lacks.

Run the first and the last two where the GPUs are, the second where there is a network:

    python3 -m pip list --format=freeze > have.txt
    pack_sglang.py --version 0.5.17 --have have.txt --arch 90 --out sglang.tar.xz
    tar xf sglang.tar.xz -C /opt && . /opt/site/env.sh
    python3 -m sglang.launch_server --attention-backend triton --sampling-backend pytorch ...

What have.txt names is left out in whatever version it is, but for --replace. So choose an SGLang
that wants the PyTorch which is there: the versions that differ are listed.

SGLang compiles some of its kernels, and FlashInfer's norms, when they are first wanted. That takes
nvcc, a C++ compiler and ninja there.

Only a server of a dense model in fp16 or bf16 is looked after. What it neither imports nor calls is
left out (LEFT_OUT, UNUSED): kernels for FP8, FP4 and MLA, and other attention backends, among them
FlashAttention 3, whose library is larger than all the rest. GPU code is kept for one architecture.
"""

import argparse
import pathlib
import tempfile

import packing

ENV = """# . site/env.sh: puts this SGLang in front of what the machine has
_site=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export PYTHONPATH=$_site${PYTHONPATH:+:$PYTHONPATH}
export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1
# What is compiled is linked with these. PyTorch and the driver have them by other names.
python3 - "$_site/lib" <<'END'
import glob, importlib.util, os, sys
to, spec = sys.argv[1], importlib.util.find_spec("nvidia")
paths = os.environ.get("LD_LIBRARY_PATH", "").split(":") + glob.glob("/usr/lib/*-linux-gnu")
inside = list(spec.submodule_search_locations) if spec else []
runtime = [file for path in inside for file in glob.glob(path + "/*/lib/libcudart.so.*")]
driver = [file for path in paths for file in glob.glob(path + "/libcuda.so.1")]
os.makedirs(to, exist_ok=True)
for name, found in [("libcudart.so", runtime), ("libcuda.so", driver)]:
    if found and not os.path.lexists(to + "/" + name):
        os.symlink(found[0], to + "/" + name)
END
export LIBRARY_PATH=$_site/lib${LIBRARY_PATH:+:$LIBRARY_PATH}
"""
# Packages, by the beginning of their names, that a plain server does not import.
LEFT_OUT = [
    # To write kernels in, and kernels.
    *["nvidia-", "cuda-tile", "tilelang", "helion", "z3-solver", "torch-c-dlpack-ext", "kernels"],
    *["flash-attn-4", "quack-kernels", "humming-kernels", "tokenspeed-", "sgl-deep-gemm"],
    # Quantization, memory given back, another NCCL, pictures, sound, other grammars.
    *["torchao", "torch-memory-saver", "nccl4py", "torchcodec", "mistral-common", "pycountry"],
    *["llguidance", "outlines", "airportsdata"],
    # Hubs, clients, gRPC.
    *["modelscope", "anthropic", "smg-grpc", "grpcio-", "py-spy"],
    *["cryptography", "pycryptodomex"],
]
# Libraries of sgl_kernel that other attention backends want.
UNUSED = ["flash_ops", "flashmla_ops", "infllm_ops"]
# SGLang opens that of sm90 on sm_90, that of sm100 on all others.
KERNELS = "sgl_kernel/{}/common_ops.*"


def wanted(args, folder):
    needed = packing.resolved(args, folder, "sglang")
    packages = packing.missing(needed, args.have, args.replace.split(","))
    left_out = [one for one in packages if packing.plain(one[0]).startswith(tuple(LEFT_OUT))]
    for name, version, _ in left_out:
        packing.say(f"  {name} {version} is left out")
    return [one for one in packages if one not in left_out]


def leave_out_unused(site, arch):
    other = "sm100" if arch == 90 else "sm90"
    unused = [f"sgl_kernel/{name}.*" for name in UNUSED]
    for pattern in [*unused, KERNELS.format(other), "**/*.a"]:
        for file in filter(pathlib.Path.is_file, list(site.glob(pattern))):
            size = file.stat().st_size
            packing.say(f"  {file.relative_to(site)} is left out, {size / 1e6:.0f} MB")
            file.unlink()


def pack(args, folder):
    packing.say(f"what sglang {args.version} needs")
    site, wheels = folder / "site", folder / "wheels"
    packing.download(args, wanted(args, folder), wheels)
    packing.unpack(wheels, site)
    leave_out_unused(site, args.arch)
    packing.trim_all(site, args.arch)
    packing.strip_all(site)
    (site / "env.sh").write_text(ENV)
    packing.compress(site, args)


def main():
    parser = argparse.ArgumentParser(description="SGLang for a machine without a network")
    packing.options(parser, "SGLang")
    replaced = "packed even if there, where the version differs (%(default)s)"
    parser.add_argument("--replace", default="transformers,tokenizers", help=replaced)
    with tempfile.TemporaryDirectory() as folder:
        pack(parser.parse_args(), pathlib.Path(folder))


if __name__ == "__main__":
    main()
