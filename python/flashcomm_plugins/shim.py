"""libflashcomm.so: where the wheel has put it, and what it says of a communicator."""

import ctypes
import importlib.metadata
import os

NEVER = 2**64 - 1  # minBytes of a communicator that compresses nothing


class CommInfo(ctypes.Structure):
    """flashcommCommInfo_t of flashcomm.h, the earliest version, which every shim takes."""

    _ints = ["state", "enabled", "reduceBits", "gatherBits", "rank", "nRanks"]
    _fields_ = (
        [("size", ctypes.c_size_t)]
        + [(name, ctypes.c_int) for name in _ints]
        + [("minBytes", ctypes.c_uint64), ("exchange", ctypes.c_char_p), ("code", ctypes.c_char_p)]
    )


def path():
    """The library of the wheel that this package is from, or None."""
    files = importlib.metadata.files("flashcomm") or []
    found = [os.path.realpath(str(f.locate())) for f in files if f.name == "libflashcomm.so"]
    return next(filter(os.path.exists, found), None)


def about(library, comm):
    """Of `comm`, an ncclComm_t: from how many bytes on all-reduces are compressed, NEVER if none is,
    and whether they go through the GPUs' own memory.

    AttributeError where `library`, of ctypes, is not the shim.
    """
    info = CommInfo(size=ctypes.sizeof(CommInfo))
    answered = library.flashcommGetCommInfo(comm, ctypes.byref(info)) == 0
    return (info.minBytes, info.exchange == b"peer") if answered else (NEVER, False)
