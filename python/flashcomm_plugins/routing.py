"""Which all-reduces are the shim's."""

import os

from flashcomm_plugins import asked, shim

NAMES = {"fp16": "float16", "bf16": "bfloat16"}


class Routing:
    """For one engine. Its communicators are those of `PyNcclCommunicator`, SGLang's or vLLM's.

    The shim's answer is the same on all ranks of a communicator: they have agreed on it when it
    was made, and ranks that do not agree compress nothing. So all ranks route alike, without
    asking each other, also while a graph is captured.
    """

    def __init__(self, engine, path_variable, torch):
        self.engine, self.path_variable = engine, path_variable
        names = os.environ.get("FLASHCOMM_DTYPES", "").replace(" ", "").split(",")
        # The shim warns of a malformed list, and its default holds.
        names = names if set(names) <= set(NAMES) else NAMES
        self.dtypes = {getattr(torch, NAMES[name]) for name in names}

    def takes(self, pynccl, tensor):
        """Whether the sum of `tensor` is for the shim, which `pynccl` has open."""
        if pynccl is None or not pynccl.available or tensor.dtype not in self.dtypes:
            return False
        n_bytes = tensor.numel() * tensor.element_size()
        return n_bytes >= self.limit_of(pynccl) and tensor.is_contiguous()

    def limit_of(self, pynccl):
        """Asked once for each NCCL communicator, not for each sum."""
        comm, limit = getattr(pynccl, "flashcomm_limit", (None, shim.NEVER))
        if comm is not pynccl.comm:
            limit = self.ask(pynccl)
            pynccl.flashcomm_limit = (pynccl.comm, limit)
        return limit

    def ask(self, pynccl):
        try:
            limit = shim.min_bytes(pynccl.nccl.lib, pynccl.comm)
        except AttributeError:
            why = "its NCCL is %s, not libflashcomm.so" % os.environ.get(self.path_variable)
            cure = "Unset %s, and name that library in FLASHCOMM_NCCL_LIB"
            asked.stay_out(self.engine, why, cure % self.path_variable)
            return shim.NEVER
        if limit != shim.NEVER:
            text = "plugin for %s: all-reduces from %d bytes on are the shim's"
            asked.say("INFO", text % (self.engine, limit))
        return limit
