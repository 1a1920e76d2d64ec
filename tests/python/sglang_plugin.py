"""SGLang's own loader of plugins and hooks, `GroupCoordinator` and wrapper of NCCL, with the plugin that SITE has.

usage: sglang_plugin.py SOURCE SITE [VERSION]     on the simulated driver, two threads as ranks

VERSION may be `deterministic`, which SGLang learns from an option after it has loaded its plugins. Prints what the plugin
has changed, and who takes which sum: eager, where SGLang has no kernel of its own, and as compiled.
"""

import enum
import json
import os
import sys
import types

import fake_gpu
import stubs

source, site, *version = sys.argv[1:]
sys.path.insert(0, site)
torch = fake_gpu.torch()
torch.Stream = fake_gpu.Stream
torch.compiler = types.SimpleNamespace(is_compiling=lambda: False)
distributed = stubs.module(
    "torch.distributed",
    Backend=object,
    ProcessGroup=object,
    Work=object,
    ReduceOp=enum.IntEnum("ReduceOp", "SUM PRODUCT MAX MIN AVG"),
    all_reduce=lambda tensor, group: None,
)


def no(*_):
    return False


def as_it_is(**_):
    return lambda function: function


srt = f"{source}/srt"
names = "is_cpu is_cuda is_cuda_alike is_gfx95_supported is_hip is_musa is_npu is_shm_available is_xpu get_int_env_var"
stream = {"get_current_device_stream_fast": lambda: fake_gpu.rank.stream}
stubs.module("sglang.srt.utils", **dict.fromkeys(names.split(), no), **stream)
stubs.module("sglang.srt.utils.common", **stream)
stubs.module("sglang.srt.utils.custom_op", register_custom_op=as_it_is)
stubs.module("sglang.srt.utils.network", get_local_ip_auto=no)
stubs.module("sglang.srt.utils.stale_shm_cleanup", make_shm_name=no)
stubs.module("sglang.srt.platforms")
stubs.module("sglang.srt.platforms.device_mixin", _DEVICE_TO_DISTRIBUTED_BACKEND={})
stubs.module("sglang.srt.compilation.compilation_config", register_split_op=as_it_is)
pieces = "sglang.srt.model_executor.runner_backend_utils.tc_piecewise_cuda_graph"
stubs.module(pieces, is_in_tc_piecewise_cuda_graph=no)
context = "derive_parallel_widths get_flags get_global_dwdp_manager get_parallel set_global_dwdp_manager"
stubs.module("sglang.srt.runtime_context", **dict.fromkeys(context.split(), no))
helpers = "all_gather_single reduce_scatter_single set_global_tcp_store"
stubs.module("sglang.srt.distributed.utils", StatelessProcessGroup=fake_gpu.Group, **dict.fromkeys(helpers.split(), no))
envs = stubs.load("sglang.srt.environ", f"{srt}/environ.py").envs
devices = "sglang.srt.distributed.device_communicators"
for name in ["pynccl_wrapper", "pynccl"]:
    pynccl = stubs.load(f"{devices}.{name}", f"{srt}/distributed/device_communicators/{name}.py")
state = stubs.load("sglang.srt.distributed.parallel_state", f"{srt}/distributed/parallel_state.py")
stubs.load("sglang._version", f"{source}/_version.py")
stubs.load("sglang.version", f"{source}/version.py")
if version == ["other"]:
    state.GroupCoordinator._all_reduce_in_place = lambda self, input_, stream=None: None
elif version == ["rocm"]:
    torch.version.cuda = None
elif version and version != ["deterministic"]:
    sys.modules["sglang.version"].__version__ = version[0]


def init(self, group, device, own):
    """As much of a group as an all-reduce needs, in the order of SGLang's."""
    others = "hpu_communicator xpu_communicator pymscclpp_comm qr_comm pcie_ipc_comm torch_symm_mem_comm"
    self.__dict__.update(dict.fromkeys(others.split()), ca_comm=fake_gpu.Own() if own else None)
    self.world_size, self.device_group, self._fi_workspace_hint = group.world_size, None, None
    self.is_symmetric_memory_enabled = no
    self.unique_name = f"{group.rank} {own}"
    state._register_group(self)
    self.pynccl_comm = pynccl.PyNcclCommunicator(group, device) if own is None else None


state.GroupCoordinator.__init__ = init
stubs.load("sglang.srt.plugins.hook_registry", f"{srt}/plugins/hook_registry.py")
plugins = stubs.load("sglang.srt.plugins", f"{srt}/plugins/__init__.py")
plugins.load_plugins()
wraps = hasattr(state.GroupCoordinator._all_reduce_in_place, "__wrapped__")
if version == ["deterministic"]:
    envs.SGLANG_ENABLE_DETERMINISTIC_INFERENCE.set("1")


def rank_of(group, device):
    made = state.GroupCoordinator(group, device, None)
    # Without the plugin no NCCL is found here, and SGLang goes on without its wrapper of it.
    library = made.pynccl_comm.nccl.lib if made.pynccl_comm.available else None
    has_shim = hasattr(library, "flashcommGetStats")
    answers = {}
    for kind in ["own", "eager", "compiled"] if library else ["own", "eager"]:
        made.ca_comm = fake_gpu.Own() if kind != "eager" else None
        torch.compiler.is_compiling = lambda: kind == "compiled"
        take = fake_gpu.sums(made.all_reduce, library if has_shim else None)
        answers[kind] = {name: take(*what) for name, what in fake_gpu.SUMS.items()}
    # A group without a communicator of its own, as those of MoE.
    torch.compiler.is_compiling = no
    other = state.GroupCoordinator(group, device, False)
    answers["no pynccl"] = fake_gpu.sums(other.all_reduce, None)("float16", 16 << 20)
    assert made.pynccl_comm.disabled, "for SGLang it is as it was"
    return answers


first, second = fake_gpu.each_rank(2, rank_of)
assert first == second, (first, second)
variables = {"path": os.environ.get("SGLANG_NCCL_SO_PATH"), "variable": os.environ.get("FLASHCOMM_PLUGIN")}
print(json.dumps({"wraps": wraps, **variables, "sums": first}))
