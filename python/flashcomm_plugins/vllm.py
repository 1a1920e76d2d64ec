"""The plugin of vLLM, of the entry point group vllm.general_plugins.

vLLM calls `load` before it makes devices and groups. It reads VLLM_NCCL_SO_PATH when it makes its
first communicator, and `CudaCommunicator.all_reduce` runs inside an opaque operator: neither
torch.compile nor a graph sees which way a sum goes.
"""

import functools
import inspect
import os

from flashcomm_plugins import asked, shim
from flashcomm_plugins.routing import Routing

# Read at both ends; tests hold it to the source of the newest.
OLDEST, NEWEST = (0, 25), (0, 33)
PATH = "VLLM_NCCL_SO_PATH"
CURE = "`flashcomm run --engine vllm` does without it; or install flashcomm for this vLLM"

stay_out = functools.partial(asked.stay_out, "vLLM")


def load():
    asked.when_asked("vLLM", install, CURE)


def install():
    from vllm import envs
    from vllm.version import __version__

    if not asked.is_known(__version__, OLDEST, NEWEST):
        known = "%d.%d to %d.%d" % (OLDEST + NEWEST)
        return stay_out("it knows vLLM %s, not %s" % (known, __version__), CURE)
    if envs.VLLM_BATCH_INVARIANT:
        cure = "Unset that, or use `flashcomm run --engine vllm --batch-invariant 1`"
        return stay_out("VLLM_BATCH_INVARIANT wants sums that do not depend on the batch", cure)
    import torch
    from vllm.distributed.device_communicators.cuda_communicator import CudaCommunicator
    from vllm.distributed.device_communicators.pynccl import PyNcclCommunicator

    if torch.version.cuda is None:
        return stay_out("this PyTorch is not for CUDA", asked.UNSET)
    theirs = CudaCommunicator.all_reduce
    if hasattr(theirs, "flashcomm"):
        return None
    names = [list(inspect.signature(f).parameters) for f in (theirs, PyNcclCommunicator.all_reduce)]
    if names[0] != ["self", "input_"] or names[1][:3] != ["self", "in_tensor", "out_tensor"]:
        return stay_out("this vLLM has other all-reduces than %s" % __version__, CURE)
    if not envs.VLLM_NCCL_SO_PATH:
        library = shim.path()
        if library is None:
            return stay_out("no libflashcomm.so is installed with it", "Install flashcomm's wheel")
        os.environ[PATH] = library
    CudaCommunicator.all_reduce = routed(theirs, Routing("vLLM", PATH, torch))
    return None


# vLLM's own kernels over NVLink or PCIe, each with the method that says whether it takes a sum.
OWN = [
    ("ca_comm", "should_custom_ar"),
    ("fi_ar_comm", "should_use_fi_ar"),
    ("fi_pcie_ipc_ar_comm", "should_use"),
    ("symm_mem_comm", "should_use_symm_mem"),
]


def own_takes(communicator, tensor):
    for name, method in OWN:
        own = getattr(communicator, name, None)
        asks = getattr(own, method, None)
        if asks is not None and not getattr(own, "disabled", False) and asks(tensor):
            return True
    return False


def routed(theirs, routing):
    @functools.wraps(theirs)
    def all_reduce(self, input_):
        pynccl = self.pynccl_comm
        if pynccl is not None and not pynccl.disabled:
            if routing.takes(pynccl, input_, lambda: own_takes(self, input_)):
                return pynccl.all_reduce(input_)
        return theirs(self, input_)

    all_reduce.flashcomm = True
    return all_reduce
