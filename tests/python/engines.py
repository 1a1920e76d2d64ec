"""What `flashcomm run --engine` sets means that, in the published source of the engine.

usage: engines.py vllm|sglang SOURCE NAME=VALUE... OPTION...
"""

import ast
import os
import pathlib
import re
import sys

import stubs


def text(path):
    return pathlib.Path(path).read_text()


def attributes_of(path, of):
    """X of every of.X that a file reads."""
    nodes = ast.walk(ast.parse(text(path)))
    return {n.attr for n in nodes if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name) and n.value.id == of}


def strings_of(path):
    return {n.value for n in ast.walk(ast.parse(text(path))) if isinstance(n, ast.Constant) and isinstance(n.value, str)}


def fields_of(path, name=None):
    """Annotated names of the classes of a file."""
    classes = [n for n in ast.walk(ast.parse(text(path))) if isinstance(n, ast.ClassDef) and name in (None, n.name)]
    return {s.target.id for c in classes for s in c.body if isinstance(s, ast.AnnAssign)}


def check_vllm(source, variables, options):
    for name in variables:
        os.environ.pop(name, None)
    envs, nccl, _ = stubs.vllm(source)
    by_default = {name: getattr(envs, name) for name in variables if name.startswith("VLLM_")}
    os.environ.update(variables | {"FLASHCOMM_BITS": "8"})
    assert by_default["VLLM_NCCL_SO_PATH"] is None
    assert nccl.find_nccl_library() == variables["VLLM_NCCL_SO_PATH"]
    # Workers that Ray starts get the shim's settings, and what the user had named.
    ray = stubs.load("vllm.ray.ray_env", f"{source}/ray/ray_env.py")
    lists = {name for name in by_default if name.startswith("VLLM_RAY_")}
    os.environ["MINE_TOO"] = "1"
    assert {"FLASHCOMM_BITS", "LD_PRELOAD", "VLLM_NCCL_SO_PATH", "MINE_TOO", *by_default} <= ray.get_env_vars_to_copy()
    switches = by_default.keys() - lists - {"VLLM_NCCL_SO_PATH"}
    for name in switches:
        assert getattr(envs, name) is False, name
    # At least these are on unless they are turned off: otherwise the launcher would do nothing of use.
    assert by_default["VLLM_ALLREDUCE_USE_SYMM_MEM"] is True and by_default["VLLM_ALLREDUCE_USE_FLASHINFER"] is True

    devices = f"{source}/distributed/device_communicators"
    read = attributes_of(f"{devices}/cuda_communicator.py", "envs") | attributes_of(f"{devices}/pynccl_allocator.py", "envs")
    assert switches <= read, f"its communicators do not read {switches - read}"
    # Whatever may do an all-reduce there is known to us; a new one must fail here.
    known = {"fi_pcie_ipc_ar_comm", "fi_ar_comm", "qr_comm", "aiter_ar_comm", "ca_comm", "symm_mem_comm", "pynccl_comm"}
    all_reduce = re.search(r"\n    def all_reduce\(self.*?\n    def ", text(f"{devices}/cuda_communicator.py"), re.S)[0]
    used = set(re.findall(r"self\.(\w+_comm)\b", all_reduce))
    assert used <= known, f"it has all-reduces that we do not know: {used - known}"

    assert options == ["--disable-custom-all-reduce", "-cc.pass_config.fuse_allreduce_rms=false"]
    assert {"--disable-custom-all-reduce", "-cc"} <= strings_of(f"{source}/engine/arg_utils.py")
    assert "fuse_allreduce_rms" in fields_of(f"{source}/config/compilation.py", "PassConfig")
    stubs.module("regex", **{name: getattr(re, name) for name in ["re", "match", "compile", "fullmatch", "Match"] if hasattr(re, name)})
    stubs.module("yaml")
    arguments = stubs.load("vllm.utils.argparse_utils", f"{source}/utils/argparse_utils.py")
    parser = arguments.FlexibleArgumentParser()
    parser.add_argument("words", nargs="*")
    parser.add_argument("--disable-custom-all-reduce", action="store_true")
    parser.add_argument("-cc", type=arguments.json.loads)
    parsed = parser.parse_args(["serve", "model", *options])
    assert parsed.disable_custom_all_reduce and parsed.cc == {"pass_config": {"fuse_allreduce_rms": False}}, parsed


def check_sglang(source, variables, options):
    for name in variables:
        os.environ.pop(name, None)
    # Its wrapper asks the environment itself.
    stubs.torch()
    wrapper_path = f"{source}/srt/distributed/device_communicators/pynccl_wrapper.py"
    wrapper = stubs.load("sglang_pynccl_wrapper", wrapper_path)
    assert wrapper.find_nccl_library() == "libnccl.so.2"
    os.environ.update(variables)
    assert wrapper.find_nccl_library() == variables["SGLANG_NCCL_SO_PATH"]

    environ = stubs.load("sglang_environ", f"{source}/srt/environ.py")
    switches = [name for name in variables if name.startswith("SGLANG_") and name != "SGLANG_NCCL_SO_PATH"]
    assert switches
    state = text(f"{source}/srt/distributed/parallel_state.py")
    for name in switches:
        assert getattr(environ.envs, name).get() is False, name
        os.environ[name] = "1"
        assert getattr(environ.envs, name).get() is True, name
        chosen_in = text(f"{source}/srt/distributed/device_communicators/pcie_ipc_ar.py")
        assert f"envs.{name}.get()" in chosen_in, f"{name} is not read where it is to turn something off"

    fields = fields_of(f"{source}/srt/arg_groups/fields/exec_.py")
    assert options == ["--disable-custom-all-reduce", "--enforce-disable-flashinfer-allreduce-fusion"]
    for option in options + ["--enable-mscclpp", "--enable-torch-symm-mem", "--enable-symm-mem"]:
        assert option[2:].replace("-", "_") in fields, option
    known = {"pymscclpp_comm", "ca_comm", "qr_comm", "torch_symm_mem_comm", "pcie_ipc_comm", "pynccl_comm"}
    chooser = re.search(r"\n    def _all_reduce_out_place\(.*?\n    def _all_reduce_in_place.*?\n    def ", state, re.S)[0]
    used = set(re.findall(r"self\.(\w+_comm)\b", chooser))
    assert used <= known, f"it has all-reduces that we do not know: {used - known}"


def main():
    engine, source, *words = sys.argv[1:]
    variables = dict(word.split("=", 1) for word in words if not word.startswith("-"))
    options = [word for word in words if word.startswith("-")]
    {"vllm": check_vllm, "sglang": check_sglang}[engine](source, variables, options)
    print(f"{engine}: {len(variables)} variables and {len(options)} options mean what they are set for")


main()
