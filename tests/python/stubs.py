"""Stand-ins for what vLLM's and SGLang's sources import besides what is tested: no PyTorch is installed for a test.

load(name, path) loads one file of a package as the module that it is, without running the package's __init__.
"""

import enum
import importlib.util
import logging
import sys
import types


def module(name, **contents):
    made = types.ModuleType(name)
    made.__dict__.update(contents)
    made.__path__ = []
    sys.modules[name] = made
    parent, _, child = name.rpartition(".")
    if parent:
        setattr(sys.modules.get(parent) or module(parent), child, made)
    return made


def load(name, path):
    parent = name.rpartition(".")[0]
    if parent and parent not in sys.modules:
        module(parent)
    spec = importlib.util.spec_from_file_location(name, path)
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[name] = loaded
    spec.loader.exec_module(loaded)
    if parent:
        setattr(sys.modules[parent], name.rpartition(".")[2], loaded)
    return loaded


def torch():
    """As much of torch as a wrapper of NCCL names: types, and that this is a build for CUDA."""
    names = "int8 uint8 int32 int64 float16 float32 float64 bfloat16".split()
    made = module("torch", dtype=str, Tensor=object, version=types.SimpleNamespace(cuda="13.0", hip=None))
    made.__dict__.update({name: name for name in names})
    module("torch.distributed", ReduceOp=enum.Enum("ReduceOp", "SUM PRODUCT MAX MIN AVG"), ProcessGroup=object)
    return made


def vllm(root, has_torch=False):
    """vLLM's settings and its wrapper of NCCL, from its published source."""
    if not has_torch:
        torch()
    envs = load("vllm.envs", f"{root}/envs.py")
    logger = logging.getLogger("vllm")
    logger.debug_once, logger.info_once, logger.warning_once = logger.debug, logger.info, logger.warning
    module("vllm.logger", init_logger=lambda name: logger)
    platform = types.SimpleNamespace(is_rocm=lambda: False, is_cuda=lambda: True, fp8_dtype=lambda: "float8_e4m3fn")
    module("vllm.platforms", current_platform=platform)
    nccl = load("vllm.utils.nccl", f"{root}/utils/nccl.py")
    name = "vllm.distributed.device_communicators.pynccl_wrapper"
    wrapper = load(name, f"{root}/distributed/device_communicators/pynccl_wrapper.py")
    return envs, nccl, wrapper
