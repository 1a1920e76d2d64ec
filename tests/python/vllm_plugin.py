"""vLLM's own loader of plugins, `CudaCommunicator.all_reduce` and wrapper of NCCL, with the plugin that SITE has.

usage: vllm_plugin.py SOURCE SITE [VERSION]     on the simulated driver, two threads as ranks

Prints what the plugin has changed, and who takes which sum.
"""

import json
import os
import sys

import fake_gpu
import stubs

source, site, *version = sys.argv[1:]
sys.path.insert(0, site)
torch = fake_gpu.torch()
envs, _, wrapper = stubs.vllm(source, has_torch=True)
# The simulated NCCL is older than vLLM wants one to be; what it lacks is not used here.
newer = ["ncclCommSuspend", "ncclCommResume", "ncclCommWindowRegister", "ncclCommWindowDeregister"]
functions = wrapper.NCCLLibrary.exported_functions
wrapper.NCCLLibrary.exported_functions = [function for function in functions if function.name not in newer]
devices = "vllm.distributed.device_communicators"
stubs.module("vllm._aiter_ops", rocm_aiter_ops=None)
stubs.module("vllm.config", get_current_vllm_config_or_none=None)
stubs.module("vllm.utils.torch_utils", current_stream=lambda: fake_gpu.rank.stream)
stubs.module("vllm.distributed.utils", StatelessProcessGroup=fake_gpu.Group)
stubs.module(
    f"{devices}.all_reduce_utils",
    NCCL_SYMM_MEM_ALL_REDUCE_CONFIG=None,
    should_nccl_symm_mem_ag_rs=None,
    should_nccl_symm_mem_allreduce=lambda world, tensor: False,
)
stubs.module(f"{devices}.pynccl_allocator", is_symmetric_memory_enabled=None, is_symmetric_memory_tensor=None)
stubs.module(f"{devices}.aiter_custom_all_reduce", AiterCustomAllreduce=None)
stubs.module(f"{devices}.base_device_communicator", DeviceCommunicatorBase=object)
folder = f"{source}/distributed/device_communicators"
pynccl = stubs.load(f"{devices}.pynccl", f"{folder}/pynccl.py")
CudaCommunicator = stubs.load(f"{devices}.cuda_communicator", f"{folder}/cuda_communicator.py").CudaCommunicator
stubs.load("vllm._version", f"{source}/_version.py")
stubs.load("vllm.version", f"{source}/version.py")
if version == ["other"]:
    CudaCommunicator.all_reduce = lambda self, input_, group=None: None
elif version == ["rocm"]:
    torch.version.cuda = None
elif version:
    sys.modules["vllm.version"].__version__ = version[0]

theirs = CudaCommunicator.all_reduce
plugins = stubs.load("vllm.plugins", f"{source}/plugins/__init__.py")
plugins.load_general_plugins()
# As in a process that loads them once more.
plugins.plugins_loaded = False
plugins.load_general_plugins()
wrapped = CudaCommunicator.all_reduce
assert wrapped is theirs or wrapped.__wrapped__ is theirs
said = {"wraps": wrapped is not theirs, "path": envs.VLLM_NCCL_SO_PATH}


def rank_of(group, device):
    made = object.__new__(CudaCommunicator)
    others = ["fi_ar_comm", "qr_comm", "fi_pcie_ipc_ar_comm", "aiter_ar_comm", "symm_mem_comm"]
    made.__dict__.update(dict.fromkeys(others), use_aiter_allreduce=False, ca_comm=fake_gpu.Own())
    made.pynccl_comm = pynccl.PyNcclCommunicator(group, device)
    assert not made.pynccl_comm.disabled
    library = made.pynccl_comm.nccl.lib
    take = fake_gpu.sums(made.all_reduce, library if hasattr(library, "flashcommGetStats") else None)
    return {name: take(*what) for name, what in fake_gpu.SUMS.items()}


if said["path"]:
    first, second = fake_gpu.each_rank(2, rank_of)
    assert first == second, (first, second)
    said["sums"] = first
print(json.dumps({"variable": os.environ.get("FLASHCOMM_PLUGIN"), **said}))
