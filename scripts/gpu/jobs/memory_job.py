"""What communicators cost of a GPU's memory, and that nothing is left after the last one, beside plain NCCL.

A process for each GPU (two at least; more where there are more), once with the shim and once with the real NCCL. Each makes a
communicator and uses none, a second one and sums over it, and destroys both. Of each GPU the bytes in use are read before and
after each step, and the milliseconds of each creation.

Needs FLASHCOMM_LIB (the shim), FLASHCOMM_NCCL_LIB (a real NCCL), FLASHCOMM_SCRATCH. Prints one line of JSON for each library.
Exits with an assertion where an unused communicator costs more than plain NCCL's by 64 MiB, or where more is left than with
plain NCCL by 32 MiB: the kernels, which stay loaded as NCCL's do, and their local memory.
"""

import ctypes
import json
import os
import subprocess
import sys

import nccl_calls
from nccl_calls import FLOAT16, SUM, ok

COUNT = 4 << 20
MIB = 1 << 20
STEPS = ["unused", "used", "left"]


class Rank(nccl_calls.Rank):
    def __init__(self, case, library, rank, world):
        super().__init__(case, rank, world, 2 * COUNT)
        self.nccl = ctypes.CDLL(library)

    def in_use(self):
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        ok(self.cuda.cuMemGetInfo_v2, ctypes.byref(free), ctypes.byref(total))
        return total.value - free.value

    def all_reduce(self, comm):
        for _ in range(3):
            ok(self.nccl.ncclAllReduce, self.memory, self.memory, ctypes.c_size_t(COUNT), FLOAT16, SUM, comm, self.stream)
        self.wait()

    def run(self):
        self.meet("begin")
        before = self.in_use()
        unused, first_ms = self.create(self.nccl, "first")
        steps = [self.in_use() - before]
        used, second_ms = self.create(self.nccl, "second")
        self.all_reduce(used)
        steps.append(self.in_use() - before)
        for comm in [used, unused]:
            ok(self.nccl.ncclCommDestroy, comm)
        steps.append(self.in_use() - before)
        self.meet("end")
        return dict(zip(STEPS, (round(step / MIB, 1) for step in steps)), create_ms=[first_ms, second_ms])


def all_ranks(case, library, world):
    """The MiB after each step, of the rank that has most, and the longest milliseconds of a creation."""
    command = [sys.executable, __file__, case, library]
    ranks = [
        subprocess.Popen([*command, str(rank), str(world)], stdout=subprocess.PIPE, text=True) for rank in range(world)
    ]
    told = [json.loads(rank.communicate(timeout=90)[0]) for rank in ranks]
    assert not any(rank.returncode for rank in ranks)
    most = {step: max(rank[step] for rank in told) for step in STEPS}
    most["create_ms"] = [round(max(rank["create_ms"][i] for rank in told), 1) for i in range(2)]
    print(json.dumps({"library": case, "world": world, "mib": most}), flush=True)
    return most


def main():
    if len(sys.argv) > 1:
        case, library, rank, world = sys.argv[1:]
        print(json.dumps(Rank(case, library, int(rank), int(world)).run()))
        return
    cuda, n_devices = ctypes.CDLL("libcuda.so.1"), ctypes.c_int()
    ok(cuda.cuInit, 0)
    ok(cuda.cuDeviceGetCount, ctypes.byref(n_devices))
    plain = all_ranks("plain", os.environ["FLASHCOMM_NCCL_LIB"], n_devices.value)
    shim = all_ranks("shim", os.environ["FLASHCOMM_LIB"], n_devices.value)
    assert shim["unused"] <= plain["unused"] + 64, "an unused communicator"
    assert shim["left"] <= plain["left"] + 32, "what is left after the last one"


if __name__ == "__main__":
    main()
