"""What jobs share that call the driver and an NCCL, or the shim in its place, by ctypes."""

import ctypes
import os
import pathlib
import time

FLOAT16, INT32, FLOAT32 = 6, 2, 7
SUM = 0


class UniqueId(ctypes.Structure):
    _fields_ = [("internal", ctypes.c_byte * 128)]


class Stats(ctypes.Structure):
    """flashcommStats_t of flashcomm.h."""

    names = ["compressed", "forwarded", "others", "bytes_in", "bytes_wire", "bytes_forwarded"]
    _fields_ = [("size", ctypes.c_size_t)] + [(name, ctypes.c_uint64) for name in names]
    _fields_ += [("because", ctypes.c_uint64 * 16), ("sizes", ctypes.c_uint64 * 5 * 24)]
    _fields_ += [("exact", ctypes.c_uint64), ("bytes_exact", ctypes.c_uint64), ("exact_by_size", ctypes.c_uint64 * 24)]


def stats(shim):
    counts = Stats(size=ctypes.sizeof(Stats))
    ok(shim.flashcommGetStats, ctypes.byref(counts))
    return counts


def ok(function, *arguments):
    result = function(*arguments)
    assert result == 0, f"{function.__name__} answers {result}"


def wait_for(path):
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline, f"nobody writes {path}"
        time.sleep(0.001)
    return path.read_bytes()


def tell(path, content):
    part = path.with_suffix(".part")
    part.write_bytes(content)
    part.rename(path)


class Rank:
    """A process with a GPU, a stream and memory of its own.

    The ranks of a job meet over files in FLASHCOMM_SCRATCH.
    """

    def __init__(self, job, rank, world, n_bytes):
        self.job, self.rank, self.world = job, rank, world
        self.scratch = pathlib.Path(os.environ["FLASHCOMM_SCRATCH"])
        self.cuda = ctypes.CDLL("libcuda.so.1")
        ok(self.cuda.cuInit, 0)
        context, self.stream, self.memory = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_uint64()
        ok(self.cuda.cuDevicePrimaryCtxRetain, ctypes.byref(context), rank)
        ok(self.cuda.cuCtxSetCurrent, context)
        ok(self.cuda.cuStreamCreate, ctypes.byref(self.stream), 1)
        ok(self.cuda.cuMemAlloc_v2, ctypes.byref(self.memory), ctypes.c_size_t(n_bytes))
        ok(self.cuda.cuMemsetD8_v2, self.memory, ctypes.c_ubyte(0), ctypes.c_size_t(n_bytes))

    def meet(self, name):
        """All ranks are here."""
        tell(self.scratch / f"{self.job}-{name}-{self.rank}", b"")
        for rank in range(self.world):
            wait_for(self.scratch / f"{self.job}-{name}-{rank}")

    def create(self, nccl, name):
        """A communicator of all ranks, and the milliseconds that it took."""
        unique, comm = UniqueId(), ctypes.c_void_p()
        if self.rank == 0:
            ok(nccl.ncclGetUniqueId, ctypes.byref(unique))
            tell(self.scratch / f"{self.job}-id-{name}", bytes(unique))
        unique = UniqueId.from_buffer_copy(wait_for(self.scratch / f"{self.job}-id-{name}"))
        self.meet(f"create-{name}")
        start = time.perf_counter()
        ok(nccl.ncclCommInitRank, ctypes.byref(comm), self.world, unique, self.rank)
        return comm, 1000 * (time.perf_counter() - start)

    def wait(self):
        ok(self.cuda.cuStreamSynchronize, self.stream)
