"""A process whose GPU state is checkpointed between two communicators, by the driver, as cuda-checkpoint and CRIU have it.

A process for each GPU (two at least), once with the real NCCL and once with the shim. Each makes a communicator, sums over it
and destroys it. Then all are locked, checkpointed, restored and unlocked from outside. After that they make a second communicator and
sum again. The driver takes no checkpoint of a process that has memory of other processes mapped.

Needs FLASHCOMM_LIB (the shim), FLASHCOMM_NCCL_LIB (a real NCCL), FLASHCOMM_SCRATCH. Prints one line of JSON for each library.
Exits with an assertion where plain NCCL comes through this and the shim does not; where plain NCCL does not, its last line is
CANNOT and why.
"""

import ctypes
import json
import os
import pathlib
import struct
import subprocess
import sys

import nccl_calls
from nccl_calls import FLOAT16, SUM, ok, tell, wait_for

COUNT = 4 << 20
STEPS = ["Lock", "Checkpoint", "Restore", "Unlock"]


class LockArgs(ctypes.Structure):
    _fields_ = [("timeout_ms", ctypes.c_uint), ("reserved", ctypes.c_uint), ("reserved_words", ctypes.c_uint64 * 7)]


def bits(number):
    """Of fp16."""
    return struct.unpack("H", struct.pack("e", number))[0]


class Rank(nccl_calls.Rank):
    def __init__(self, case, library, rank, world):
        super().__init__(case, rank, world, 2 * COUNT)
        self.nccl = ctypes.CDLL(library)

    def sum_over(self, name):
        """Ones over a new communicator: as many as there are ranks, everywhere."""
        comm, _ = self.create(self.nccl, name)
        ok(self.cuda.cuMemsetD16_v2, self.memory, ctypes.c_ushort(bits(1)), ctypes.c_size_t(COUNT))
        ok(self.cuda.cuCtxSynchronize)
        ok(self.nccl.ncclAllReduce, self.memory, self.memory, ctypes.c_size_t(COUNT), FLOAT16, SUM, comm, self.stream)
        self.wait()
        sums = (ctypes.c_ushort * COUNT)()
        ok(self.cuda.cuMemcpyDtoH_v2, sums, self.memory, ctypes.c_size_t(2 * COUNT))
        assert set(sums) == {bits(self.world)}, f"{name}: sums of ones are not their number"
        ok(self.nccl.ncclCommDestroy, comm)

    def run(self):
        self.sum_over("before")
        tell(self.scratch / f"{self.job}-idle-{self.rank}", b"")
        wait_for(self.scratch / f"{self.job}-restored")
        self.sum_over("after")
        if self.job == "shim":
            assert nccl_calls.stats(self.nccl).compressed == 2, "sums were not compressed"


def checkpoint(pids):
    """What each step answered, of the process that did worst; nothing after one that failed."""
    cuda, answers = ctypes.CDLL("libcuda.so.1"), {}
    for step in STEPS:
        function = getattr(cuda, f"cuCheckpointProcess{step}", None)
        if function is None:
            return {step: "not in this driver"}
        arguments = ctypes.byref(LockArgs(timeout_ms=20_000)) if step == "Lock" else None
        answers[step] = max(function(pid, arguments) for pid in pids)
        if answers[step] != 0:
            break
    return answers


def all_ranks(case, library, world):
    """The steps' answers, and whether every rank came to its end."""
    command = [sys.executable, __file__, case, library]
    ranks = [subprocess.Popen([*command, str(rank), str(world)]) for rank in range(world)]
    scratch = pathlib.Path(os.environ["FLASHCOMM_SCRATCH"])
    try:
        for rank in range(world):
            wait_for(scratch / f"{case}-idle-{rank}")
        answers = checkpoint([rank.pid for rank in ranks])
        whole = all(answers.get(step) == 0 for step in STEPS)
        if whole:
            tell(scratch / f"{case}-restored", b"")
            whole = all(rank.wait(60) == 0 for rank in ranks)
    finally:
        for rank in ranks:
            rank.kill()
    print(json.dumps({"library": case, "world": world, "answers": answers, "whole": whole}), flush=True)
    return whole


def main():
    if len(sys.argv) > 1:
        case, library, rank, world = sys.argv[1:]
        Rank(case, library, int(rank), int(world)).run()
        return
    cuda, n_devices = ctypes.CDLL("libcuda.so.1"), ctypes.c_int()
    ok(cuda.cuInit, 0)
    ok(cuda.cuDeviceGetCount, ctypes.byref(n_devices))
    if not all_ranks("plain", os.environ["FLASHCOMM_NCCL_LIB"], n_devices.value):
        print("CANNOT: plain NCCL does not come through a checkpoint here")
        return
    assert all_ranks("shim", os.environ["FLASHCOMM_LIB"], n_devices.value), "plain NCCL comes through a checkpoint, the shim does not"


if __name__ == "__main__":
    main()
