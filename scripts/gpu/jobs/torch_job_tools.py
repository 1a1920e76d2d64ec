"""What the PyTorch jobs share: who this rank is, what the shim has counted, and bits."""

import ctypes
import os

import torch

RANK, WORLD = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
BITS = os.environ["FLASHCOMM_BITS"]
SCRATCH = os.environ["FLASHCOMM_SCRATCH"]


class Stats(ctypes.Structure):
    """flashcommStats_t of flashcomm.h."""

    names = ["compressed", "forwarded", "others", "bytes_in", "bytes_wire", "bytes_forwarded"]
    _fields_ = [("size", ctypes.c_size_t)] + [(name, ctypes.c_uint64) for name in names]
    _fields_ += [("because", ctypes.c_uint64 * 16), ("sizes", ctypes.c_uint64 * 5 * 24)]
    _fields_ += [("exact", ctypes.c_uint64), ("bytes_exact", ctypes.c_uint64), ("exact_by_size", ctypes.c_uint64 * 24)]


def stats():
    shim = ctypes.CDLL(os.environ["FLASHCOMM_LIB"])
    s = Stats(size=ctypes.sizeof(Stats))
    assert shim.flashcommGetStats(ctypes.byref(s)) == 0
    return s


def raw(x):
    return x.view(torch.int16)


def say(*words):
    if RANK == 0:
        print(*words, flush=True)
