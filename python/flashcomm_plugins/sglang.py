"""The plugin of SGLang, of the entry point group sglang.srt.plugins.

SGLang calls `load` before it reads its options. Whether it is to be deterministic is known when
it makes a group, so the shim's path is set there, before the group's communicator opens NCCL.

A sum keeps the place that SGLang gives it. What a kernel of its own would have taken goes out of
place, as there; what torch.distributed would have taken in place stays in place, for which
pynccl, which SGLang keeps for graphs, is enabled as long as the call takes.
"""

import functools
import inspect
import os

from flashcomm_plugins import asked, shim
from flashcomm_plugins.routing import Routing

# Read at 0.5.16, 0.5.20 and the newest, to whose source tests hold it.
OLDEST, NEWEST = (0, 5, 16), (0, 5, 23)
PATH = "SGLANG_NCCL_SO_PATH"
GROUP = "sglang.srt.distributed.parallel_state.GroupCoordinator"
CURE = "`flashcomm run --engine sglang` does without it; or install flashcomm for this SGLang"
# What is hooked, or relied on, and its first parameters.
METHODS = {
    "_resolve_outplace_all_reduce_method": ["self", "input_", "should_use_pymscclpp_allreduce"],
    "_all_reduce_in_place": ["self", "input_"],
    "_all_reduce_out_place": ["self", "input_", "outplace_all_reduce_method"],
}

stay_out = functools.partial(asked.stay_out, "SGLang")


def load():
    asked.when_asked("SGLang", install, CURE)


def install():
    from sglang.version import __version__

    if not asked.is_known(__version__, OLDEST, NEWEST):
        known = "%d.%d.%d to %d.%d.%d" % (OLDEST + NEWEST)
        return stay_out("it knows SGLang %s, not %s" % (known, __version__), CURE)
    import torch
    from sglang.srt.distributed.parallel_state import GroupCoordinator
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    if torch.version.cuda is None:
        return stay_out("this PyTorch is not for CUDA", asked.UNSET)
    for name, parameters in METHODS.items():
        if list(inspect.signature(getattr(GroupCoordinator, name)).parameters) != parameters:
            return stay_out("this SGLang has another %s than %s" % (name, __version__), CURE)
    library = os.environ.get(PATH) or shim.path()
    if library is None:
        return stay_out("no libflashcomm.so is installed with it", "Install flashcomm's wheel")
    hooks = Hooks(Routing("SGLang", PATH, torch), library)
    for name, hook, kind in [
        ("__init__", hooks.before_group, HookType.BEFORE),
        ("_resolve_outplace_all_reduce_method", hooks.resolve, HookType.AROUND),
        ("_all_reduce_in_place", hooks.in_place, HookType.AROUND),
    ]:
        HookRegistry.register(GROUP + "." + name, hook, kind)
    return None


class Hooks:
    def __init__(self, routing, library):
        self.routing, self.library, self.is_on = routing, library, True

    def before_group(self, *_args, **_options):
        from sglang.srt.environ import envs

        if not self.is_on:
            return
        # Where an option asks for it, SGLang has set this by now.
        if envs.SGLANG_ENABLE_DETERMINISTIC_INFERENCE.get():
            self.is_on = False
            cure = "Leave that out, or use `flashcomm run --engine sglang --batch-invariant 1`"
            stay_out("deterministic inference wants sums that do not depend on the batch", cure)
        else:
            os.environ[PATH] = self.library

    def takes(self, group, tensor, method=None):
        own = method not in (None, "pynccl")
        return self.is_on and self.routing.takes(group.pynccl_comm, tensor, lambda: own)

    def resolve(self, theirs, group, input_, *args, **options):
        method = theirs(group, input_, *args, **options)
        # None is left alone: pynccl where that is a graph, and in place otherwise.
        return "pynccl" if method is not None and self.takes(group, input_, method) else method

    def in_place(self, theirs, group, input_):
        if not self.takes(group, input_):
            return theirs(group, input_)
        with group.pynccl_comm.change_state(enable=True):
            return group.pynccl_comm.all_reduce(input_)
