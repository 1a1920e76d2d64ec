"""Communicators of every making, on one GPU, with threads as ranks: the shim is opened by ctypes, as vLLM opens NCCL.

Needs FLASHCOMM_LIB (the shim), FLASHCOMM_NCCL_LIB (a real NCCL 2.30.3 or newer), NCCL_MULTI_RANK_GPU_ENABLE=1,
FLASHCOMM_REFERENCE, FLASHCOMM_SCRATCH and FLASHCOMM_BITS. Exits with an assertion where something is off.
"""

import ctypes
import os
import subprocess
import threading

import torch

WORLD = 3
COUNT = 100_003
FLOAT16, SUM = 6, 0
BITS, SCRATCH = os.environ["FLASHCOMM_BITS"], os.environ["FLASHCOMM_SCRATCH"]

shim = ctypes.CDLL(os.environ["FLASHCOMM_LIB"])


class UniqueId(ctypes.Structure):
    _fields_ = [("internal", ctypes.c_byte * 128)]


class Stats(ctypes.Structure):
    names = ["compressed", "forwarded", "others", "bytes_in", "bytes_wire"]
    _fields_ = [("size", ctypes.c_size_t)] + [(name, ctypes.c_uint64) for name in names]


def n_compressed():
    s = Stats(size=ctypes.sizeof(Stats))
    assert shim.flashcommGetStats(ctypes.byref(s)) == 0
    return s.compressed


pointer, c_int, size = ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t
shim.ncclCommInitRank.argtypes = [ctypes.POINTER(pointer), c_int, UniqueId, c_int]
shim.ncclCommInitRankConfig.argtypes = [ctypes.POINTER(pointer), c_int, UniqueId, c_int, pointer]
shim.ncclCommInitRankScalable.argtypes = [ctypes.POINTER(pointer), c_int, c_int, c_int, ctypes.POINTER(UniqueId), pointer]
shim.ncclCommInitAll.argtypes = [ctypes.POINTER(pointer), c_int, ctypes.POINTER(c_int)]
shim.ncclCommSplit.argtypes = [pointer, c_int, c_int, ctypes.POINTER(pointer), pointer]
shim.ncclCommShrink.argtypes = [pointer, ctypes.POINTER(c_int), c_int, ctypes.POINTER(pointer), pointer, c_int]
shim.ncclAllReduce.argtypes = [pointer, pointer, size, c_int, c_int, pointer, pointer]
shim.ncclCommRevoke.argtypes = [pointer, c_int]
shim.ncclCommGetAsyncError.argtypes = [pointer, ctypes.POINTER(c_int)]
shim.ncclGetLastError.restype = ctypes.c_char_p
for name in ["ncclCommFinalize", "ncclCommDestroy", "ncclCommAbort"]:
    getattr(shim, name).argtypes = [pointer]


def call(name, *args):
    result = getattr(shim, name)(*args)
    assert result == 0, f"{name}: {result}: {shim.ncclGetLastError(None)}"


def new_id():
    unique_id = UniqueId()
    call("ncclGetUniqueId", ctypes.byref(unique_id))
    return unique_id


def on_threads(ranks, body):
    """Runs body(rank) on a thread for each rank; what each returned."""
    results, errors = [None] * len(ranks), []

    def run(i, rank):
        try:
            torch.cuda.set_device(0)
            results[i] = body(rank)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(i, rank)) for i, rank in enumerate(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "a rank hangs"
    if errors:
        raise errors[0]
    return results


inputs = [torch.randn(COUNT, generator=torch.Generator().manual_seed(r)).half().cuda() for r in range(WORLD)]
outputs = [torch.empty_like(x) for x in inputs]
streams = [torch.cuda.Stream() for _ in range(WORLD)]


def reference(ranks):
    files = []
    for i, rank in enumerate(ranks):
        files.append(f"{SCRATCH}/life{i}")
        inputs[rank].view(torch.int16).cpu().numpy().tofile(files[-1])
    subprocess.run([os.environ["FLASHCOMM_REFERENCE"], "sum", "fp16", BITS, "auto", "64", f"{SCRATCH}/life", *files], check=True)
    return torch.frombuffer(bytearray(open(f"{SCRATCH}/life", "rb").read()), dtype=torch.int16).cuda()


def all_reduce(rank, comm):
    """On the rank's stream; nothing here may wait for the device, where another rank's kernel may wait for this one."""
    out = outputs[rank]
    with torch.cuda.stream(streams[rank]):
        out.fill_(-1)
    call("ncclAllReduce", inputs[rank].data_ptr(), out.data_ptr(), COUNT, FLOAT16, SUM, comm, streams[rank].cuda_stream)
    return out


def use(comms, expected):
    """comms: rank -> communicator. Everyone gets the reference's bits, compressed."""
    before = n_compressed()
    outs = on_threads(list(comms), lambda rank: all_reduce(rank, comms[rank]))
    torch.cuda.synchronize()
    assert n_compressed() == before + len(comms), "not compressed"
    assert all(torch.equal(out.view(torch.int16), expected) for out in outs)
    for comm in comms.values():
        state = c_int(-1)
        call("ncclCommGetAsyncError", comm, ctypes.byref(state))
        assert state.value == 0


def make(creator):
    """A communicator of all ranks, each rank made by creator(comm, rank)."""

    def body(rank):
        comm = pointer()
        creator(ctypes.byref(comm), rank)
        return comm

    return dict(enumerate(on_threads(range(WORLD), body)))


def end(comms, *functions):
    def body(rank):
        for function in functions:
            call(function, comms[rank])

    on_threads(list(comms), body)


def main():
    torch.cuda.synchronize()
    everyone, first_two = reference(range(WORLD)), reference([0, 1])
    addresses = set()
    for function in ["ncclCommInitRank", "ncclCommInitRankConfig", "ncclCommInitRankScalable"]:
        unique_id = new_id()
        more = {"ncclCommInitRank": [], "ncclCommInitRankConfig": [None]}.get(function)

        def creator(comm, rank):
            if more is None:
                call(function, comm, WORLD, rank, 1, ctypes.byref(unique_id), None)
            else:
                call(function, comm, WORLD, unique_id, rank, *more)

        comms = make(creator)
        use(comms, everyone)
        end(comms, "ncclCommFinalize", "ncclCommDestroy")
        addresses.update(comm.value for comm in comms.values())
        print(function, "ok", flush=True)

    # The first use from threads that have set no device, one of them on the default stream.
    unique_id = new_id()
    comms = make(lambda comm, rank: call("ncclCommInitRank", comm, WORLD, unique_id, rank))
    torch.cuda.synchronize()
    before = n_compressed()

    def bare(rank):
        arguments = [inputs[rank].data_ptr(), outputs[rank].data_ptr(), COUNT, FLOAT16, SUM, comms[rank]]
        call("ncclAllReduce", *arguments, None if rank == 0 else streams[rank].cuda_stream)

    threads = [threading.Thread(target=bare, args=(rank,)) for rank in range(WORLD)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "a rank hangs"
    torch.cuda.synchronize()
    assert n_compressed() == before + WORLD, "not compressed"
    assert all(torch.equal(out.view(torch.int16), everyone) for out in outputs)
    end(comms, "ncclCommDestroy")
    print("threads without a device of their own ok", flush=True)

    # One thread that makes all communicators and drives them in a group: the first must not wait for the second.
    array = (pointer * WORLD)()
    call("ncclCommInitAll", array, WORLD, (c_int * WORLD)(*[0] * WORLD))
    before = n_compressed()
    call("ncclGroupStart")
    outs = [all_reduce(rank, array[rank]) for rank in range(WORLD)]
    call("ncclGroupEnd")
    torch.cuda.synchronize()
    assert n_compressed() == before + WORLD
    assert all(torch.equal(out.view(torch.int16), everyone) for out in outs)
    comms = {rank: pointer(array[rank]) for rank in range(WORLD)}
    print("ncclCommInitAll and a group from one thread ok", flush=True)

    # Children of a communicator that is attached, and the parent beside them.
    def split(rank):
        child = pointer()
        call("ncclCommSplit", comms[rank], 0 if rank < 2 else -1, rank, ctypes.byref(child), None)
        return child

    children = dict(enumerate(on_threads(range(WORLD), split)))
    assert not children.pop(2)
    use(children, first_two)
    use(comms, everyone)

    def shrink(rank):
        child = pointer()
        call("ncclCommShrink", comms[rank], (c_int * 1)(2), 1, ctypes.byref(child), None, 0)
        return child

    shrunk = dict(enumerate(on_threads([0, 1], shrink)))
    use(shrunk, first_two)
    use(children, first_two)
    end(children, "ncclCommFinalize", "ncclCommDestroy")
    end(shrunk, "ncclCommAbort")
    print("split and shrink ok", flush=True)

    # After a revocation the real NCCL answers, whatever it answers; nothing is compressed.
    on_threads(range(WORLD), lambda rank: call("ncclCommRevoke", comms[rank], 0))
    before = n_compressed()
    arguments = [inputs[0].data_ptr(), outputs[0].data_ptr(), COUNT, FLOAT16, SUM, comms[0], streams[0].cuda_stream]
    answer = shim.ncclAllReduce(*arguments)
    assert answer != 0 and n_compressed() == before, answer
    end(comms, "ncclCommAbort")
    print("revoke and abort ok", flush=True)

    seen = 0
    for _ in range(10):
        unique_id = new_id()
        comms = make(lambda comm, rank: call("ncclCommInitRank", comm, WORLD, unique_id, rank))
        seen += sum(comm.value in addresses for comm in comms.values())
        addresses.update(comm.value for comm in comms.values())
        use(comms, everyone)
        end(comms, "ncclCommDestroy")
    print(f"10 rounds of create, use, destroy ok; an address came back {seen} times", flush=True)


main()
