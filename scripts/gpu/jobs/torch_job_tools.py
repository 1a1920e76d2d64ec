"""What the PyTorch jobs share: who this rank is, what the shim has counted, and bits."""

import ctypes
import os

import nccl_calls
import torch

RANK, WORLD = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
BITS = os.environ["FLASHCOMM_BITS"]
SCRATCH = os.environ["FLASHCOMM_SCRATCH"]


def stats():
    return nccl_calls.stats(ctypes.CDLL(os.environ["FLASHCOMM_LIB"]))


def raw(x):
    return x.view(torch.int16)


def say(*words):
    if RANK == 0:
        print(*words, flush=True)
