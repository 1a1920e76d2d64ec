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

    def takes(self, pynccl, tensor, engine_would=lambda: False):
        """Whether the sum of `tensor` is for the shim, which `pynccl` has open.

        engine_would(): whether a kernel of the engine's own would take it. Such kernels write to other
        GPUs' memory. Where the shim does not, they are faster at any size that they take.
        """
        if pynccl is None or not pynccl.available or tensor.dtype not in self.dtypes:
            return False
        limit, is_peer = self.about(pynccl)
        n_bytes = tensor.numel() * tensor.element_size()
        return n_bytes >= limit and tensor.is_contiguous() and (is_peer or not engine_would())

    def about(self, pynccl):
        """What the shim says, asked once for each NCCL communicator, not for each sum."""
        comm, about = getattr(pynccl, "flashcomm_about", (None, None))
        if about is None or comm is not pynccl.comm:
            about = self.ask(pynccl)
            pynccl.flashcomm_about = (pynccl.comm, about)
        return about

    def ask(self, pynccl):
        try:
            limit, is_peer = shim.about(pynccl.nccl.lib, pynccl.comm)
        except AttributeError:
            why = "its NCCL is %s, not libflashcomm.so" % os.environ.get(self.path_variable)
            cure = "Unset %s, and name that library in FLASHCOMM_NCCL_LIB"
            asked.stay_out(self.engine, why, cure % self.path_variable)
            return shim.NEVER, False
        if limit != shim.NEVER:
            but = "" if is_peer else ", but for those that a kernel of its own takes"
            text = "plugin for %s: all-reduces from %d bytes on are the shim's%s"
            asked.say("INFO", text % (self.engine, limit, but))
        return limit, is_peer
