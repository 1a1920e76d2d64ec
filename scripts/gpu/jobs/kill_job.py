"""A rank is killed (SIGKILL) amid all-reduces: the others' kernels wait until ncclCommAbort, end within a second of it, and a new
communicator of the survivors works. Three processes; several on a GPU where there are fewer GPUs.

Needs FLASHCOMM_LIB (the shim), FLASHCOMM_NCCL_LIB (a real NCCL 2.30.3 or newer where ranks share a GPU), FLASHCOMM_REFERENCE,
FLASHCOMM_SCRATCH and FLASHCOMM_BITS. Exits with an assertion where something is off.
"""

import ctypes
import os
import pathlib
import signal
import subprocess
import sys
import time

WORLD, VICTIM = 3, 2
COUNT = 4_000_003
FLOAT16, SUM = 6, 0
SCRATCH = pathlib.Path(os.environ["FLASHCOMM_SCRATCH"])


def rank_main(rank):
    import torch

    from ctypes import byref, c_char_p, c_int, c_void_p

    class UniqueId(ctypes.Structure):
        _fields_ = [("internal", ctypes.c_byte * 128)]

    shim = ctypes.CDLL(os.environ["FLASHCOMM_LIB"])
    shim.ncclCommInitRank.argtypes = [ctypes.POINTER(c_void_p), c_int, UniqueId, c_int]
    shim.ncclAllReduce.argtypes = [c_void_p, c_void_p, ctypes.c_size_t, c_int, c_int, c_void_p, c_void_p]
    shim.ncclCommGetAsyncError.argtypes = [c_void_p, ctypes.POINTER(c_int)]
    shim.ncclCommAbort.argtypes = shim.ncclCommDestroy.argtypes = [c_void_p]
    shim.flashcommGetLastError.argtypes, shim.flashcommGetLastError.restype = [c_void_p], c_char_p

    def call(name, *args):
        result = getattr(shim, name)(*args)
        assert result == 0, f"rank {rank}: {name}: {result}"

    def meet(name, ranks):
        (SCRATCH / f"{name}.{rank}").touch()
        end = time.monotonic() + 60
        while not all((SCRATCH / f"{name}.{other}").exists() for other in ranks):
            assert time.monotonic() < end, f"rank {rank} waits at {name}"
            time.sleep(0.001)

    def communicator(name, ranks):
        unique_id, path = UniqueId(), SCRATCH / f"{name}.id"
        if rank == ranks[0]:
            call("ncclGetUniqueId", byref(unique_id))
            path.with_suffix(".part").write_bytes(bytes(unique_id))
            path.with_suffix(".part").rename(path)
        while not path.exists():
            time.sleep(0.001)
        unique_id = UniqueId.from_buffer_copy(path.read_bytes())
        comm = c_void_p()
        call("ncclCommInitRank", byref(comm), len(ranks), unique_id, ranks.index(rank))
        return comm

    torch.cuda.set_device(rank % torch.cuda.device_count())
    x = torch.randn(COUNT, generator=torch.Generator().manual_seed(rank)).half()
    x.view(torch.int16).numpy().tofile(SCRATCH / f"input{rank}")
    x, y, stream = x.cuda(), torch.empty(COUNT, dtype=torch.half, device="cuda"), torch.cuda.Stream()

    def all_reduce(comm):
        call("ncclAllReduce", x.data_ptr(), y.data_ptr(), COUNT, FLOAT16, SUM, comm, stream.cuda_stream)

    def check(name, ranks):
        expected = SCRATCH / f"{name}.expected"
        meet(f"{name}.inputs", ranks)
        if rank == ranks[0]:
            files = [SCRATCH / f"input{other}" for other in ranks]
            part = expected.with_suffix(".part")
            subprocess.run([os.environ["FLASHCOMM_REFERENCE"], "sum", "fp16", os.environ["FLASHCOMM_BITS"], "auto", "64", part, *files], check=True)
            part.rename(expected)
        meet(f"{name}.expected", ranks)
        assert y.cpu().view(torch.int16).numpy().tobytes() == expected.read_bytes(), f"rank {rank}: {name} differs"

    everyone = list(range(WORLD))
    survivors = [other for other in everyone if other != VICTIM]
    comm = communicator("first", everyone)
    all_reduce(comm)
    stream.synchronize()
    check("first", everyone)
    meet("start", everyone)
    for _ in range(20 if rank == VICTIM else 200):
        all_reduce(comm)
    if rank == VICTIM:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(3)
    assert not stream.query(), f"rank {rank}: nothing waits for the killed rank"
    begun = time.monotonic()
    call("ncclCommAbort", comm)
    aborted = time.monotonic() - begun
    stream.synchronize()
    ended = time.monotonic() - begun
    print(f"rank {rank}: abort answered after {aborted:.3f} s, the kernels had ended after {ended:.3f} s", flush=True)
    print(f"rank {rank}: {shim.flashcommGetLastError(None).decode()}", flush=True)
    assert ended < 1
    comm = communicator("second", survivors)
    y.fill_(-1)
    torch.cuda.synchronize()
    all_reduce(comm)
    stream.synchronize()
    check("second", survivors)
    meet("end", survivors)
    call("ncclCommDestroy", comm)
    print(f"rank {rank}: a new communicator works", flush=True)


def main():
    if len(sys.argv) > 1:
        return rank_main(int(sys.argv[1]))
    ranks = [subprocess.Popen([sys.executable, __file__, str(rank)]) for rank in range(WORLD)]
    statuses = [rank.wait(120) for rank in ranks]
    assert statuses == [-signal.SIGKILL if rank == VICTIM else 0 for rank in range(WORLD)], statuses


main()
