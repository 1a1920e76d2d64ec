"""A stand-in for as much of torch as the engines' own wrappers of NCCL touch: tensors in memory of the simulated driver.

A rank is a thread with a context and a stream of its own.
"""

import contextlib
import ctypes
import threading
import types

import stubs

SIZES = {"float16": 2, "bfloat16": 2, "float32": 4}
rank = threading.local()


def driver(name, *arguments):
    result = getattr(ctypes.CDLL("libcuda.so.1"), name)(*arguments)
    assert result == 0, f"{name}: {result}"


class Tensor:
    """Its contents do not matter here."""

    def __init__(self, dtype, n_bytes, contiguous=True):
        self.dtype, self.n_bytes, self.contiguous = dtype, n_bytes, contiguous
        self.device, self.is_cpu, self.memory = rank.device, False, ctypes.c_void_p()
        driver("cuMemAlloc_v2", ctypes.byref(self.memory), ctypes.c_size_t(n_bytes))

    def numel(self):
        return self.n_bytes // SIZES[self.dtype]

    def element_size(self):
        return SIZES[self.dtype]

    def is_contiguous(self):
        return self.contiguous

    def data_ptr(self):
        return self.memory.value

    def clone(self):
        return Tensor(self.dtype, self.n_bytes)


class Device:
    def __init__(self, index):
        self.index = index


class Stream:
    def __init__(self):
        self.memory = ctypes.c_void_p()
        driver("cuStreamCreate", ctypes.byref(self.memory), 1)
        self.cuda_stream = self.memory.value

    def synchronize(self):
        driver("cuStreamSynchronize", self.memory)


def within(*_):
    return contextlib.nullcontext()


def torch():
    made = stubs.torch()
    made.device, made.Size = Device, tuple
    made.empty_like = lambda tensor: Tensor(tensor.dtype, tensor.n_bytes)
    made.zeros = lambda n, device: Tensor("float32", 4 * n)
    made.cuda = types.SimpleNamespace(Stream=Stream, stream=within, device=within)
    made.accelerator = types.SimpleNamespace(device_index=within)
    made.ByteTensor = lambda data: data
    return made


class Group:
    """StatelessProcessGroup: threads that tell each other what rank 0 says."""

    said, ready = {}, threading.Event()

    def __init__(self, rank, world_size):
        self.rank, self.world_size = rank, world_size

    def broadcast_obj(self, value, src):
        if self.rank == src:
            self.said["value"] = value
            self.ready.set()
        assert self.ready.wait(60)
        return self.said["value"]


def each_rank(world, job):
    """What `job(group, device)` answers on each rank."""
    answers = [None] * world

    def run(i):
        context = ctypes.c_void_p()
        driver("cuDevicePrimaryCtxRetain", ctypes.byref(context), i)
        driver("cuCtxSetCurrent", context)
        rank.device, rank.stream = Device(i), Stream()
        answers[i] = job(Group(i, world), rank.device)
        rank.stream.synchronize()

    driver("cuInit", 0)
    threads = [threading.Thread(target=run, args=(i,)) for i in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert None not in answers
    return answers


class Own:
    """A kernel of the engine's: takes sums up to 8 MiB."""

    disabled = False

    def should_custom_ar(self, tensor):
        return tensor.n_bytes <= 8 << 20

    def custom_all_reduce(self, tensor):
        return "own"


def compressed(library):
    """All-reduces that the shim has compressed in this process."""
    stats = (ctypes.c_uint64 * 6)(48)
    assert library.flashcommGetStats(stats) == 0
    return stats[1]


barrier = threading.Barrier(2, timeout=60)


def sums(call, library):
    """What takes a sum: where its result is, and whether the shim, if it is there, has compressed it on both ranks."""

    def one(*tensor):
        barrier.wait()
        before = compressed(library) if library else 0
        barrier.wait()
        tensor = Tensor(*tensor)
        given = call(tensor)
        rank.stream.synchronize()
        barrier.wait()
        n_compressed = compressed(library) - before if library else 0
        assert n_compressed in (0, 2), n_compressed
        place = given if isinstance(given, str) else "in place" if given is tensor else "out of place"
        return [place, n_compressed == 2]

    return one


MIB = 1 << 20
SUMS = {
    "fp16 512K": ("float16", MIB // 2),
    "fp16 1M": ("float16", MIB),
    "fp16 2M": ("float16", 2 * MIB),
    "fp16 2M in strides": ("float16", 2 * MIB, False),
    "bf16 4M": ("bfloat16", 4 * MIB),
    "fp32 4M": ("float32", 4 * MIB),
    "fp16 16M": ("float16", 16 * MIB),
}
