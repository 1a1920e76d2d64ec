"""One rank of a job that calls NCCL as vLLM does: by its own pynccl_wrapper.py, which opens VLLM_NCCL_SO_PATH.

Started by launch.py under `flashcomm run`. The wrapper is that of the published package (.gpu/vllm); the rest of vLLM, of
which it takes its settings, a logger and the platform, is not installed there.
"""

import os
import pathlib
import sys

import torch
import torch.distributed as dist

ROOT = pathlib.Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT / "tests/python"))
import stubs
from expected import Issued

RANK, WORLD = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
TOLERANCE = {"8": 0.02, "4": 0.3}[os.environ["FLASHCOMM_BITS"]]
HALF, FLOAT = torch.float16, torch.float32


def main():
    envs, _, wrapper = stubs.vllm(str(ROOT / ".gpu/vllm"), has_torch=True)
    issued = Issued(RANK, WORLD)
    torch.cuda.set_device(0)
    nccl = wrapper.NCCLLibrary()
    assert envs.VLLM_NCCL_SO_PATH == nccl.lib._name, nccl.lib._name
    # As vLLM does: the unique id goes by another backend.
    dist.init_process_group("gloo")
    unique_id = [bytes(nccl.ncclGetUniqueId().internal) if RANK == 0 else None]
    dist.broadcast_object_list(unique_id)
    comm = nccl.ncclCommInitRank(WORLD, nccl.unique_id_from_bytes(unique_id[0]), RANK)
    types, ops = wrapper.ncclDataTypeEnum, wrapper.ncclRedOpTypeEnum
    stream = torch.cuda.Stream()
    handle = wrapper.cudaStream_t(stream.cuda_stream)

    def address(x):
        return wrapper.buffer_type(x.data_ptr())

    def all_reduce(x, op=ops.ncclSum):
        y = torch.empty_like(x)
        nccl.ncclAllReduce(address(x), address(y), x.numel(), types.from_torch(x.dtype), op, comm, handle)
        if x.dtype == FLOAT or op != ops.ncclSum:
            issued.other_all_reduce()
        else:
            issued.sum16(2 * x.numel())
        return y

    def inputs(count):
        return [torch.randn(count, generator=torch.Generator("cuda").manual_seed(r), device="cuda").half() for r in range(WORLD)]

    with torch.cuda.stream(stream):
        # vLLM warms a new communicator up with one element.
        all_reduce(torch.zeros(1, device="cuda"))
        everyone = inputs(1 << 22)
        x, exact = everyone[RANK], sum(each.double() for each in everyone)
        y = all_reduce(x)
        error = float((y.double() - exact).norm() / exact.norm())
        assert 0 < error < TOLERANCE, error
        whole = torch.arange(100_003, device="cuda", dtype=FLOAT)
        assert torch.equal(all_reduce(whole + RANK), whole * WORLD + WORLD * (WORLD - 1) / 2)
        assert torch.equal(all_reduce(x, ops.ncclMax), torch.stack(everyone).amax(0))

        count, half = x.numel(), types.from_torch(HALF)
        gathered = torch.empty(WORLD * count, device="cuda", dtype=HALF)
        nccl.ncclAllGather(address(x), address(gathered), count, half, comm, handle)
        assert torch.equal(gathered, torch.cat(everyone))
        received = torch.empty_like(x)
        nccl.ncclBroadcast(address(x), address(received), count, half, 0, comm, handle)
        assert torch.equal(received, everyone[0])
        numbers = torch.full((WORLD * 1000,), 1.0 + RANK, device="cuda", dtype=HALF)
        part = torch.empty(1000, device="cuda", dtype=HALF)
        nccl.ncclReduceScatter(address(numbers), address(part), 1000, half, ops.ncclSum, comm, handle)
        assert (part == WORLD * (WORLD + 1) / 2).all()
        nccl.ncclGroupStart()
        nccl.ncclSend(address(x), count, half, (RANK + 1) % WORLD, comm, handle)
        nccl.ncclRecv(address(received), count, half, (RANK - 1) % WORLD, comm, handle)
        nccl.ncclGroupEnd()
        assert torch.equal(received, everyone[(RANK - 1) % WORLD])
    stream.synchronize()

    # Captured, as vLLM captures its forward, and replayed on new inputs.
    graph = torch.cuda.CUDAGraph()
    static = x.clone()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        out = all_reduce(static)
    for _ in range(5):
        graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out.view(torch.int16), y.view(torch.int16)), "a replay gives other bits"
    static.mul_(2)
    graph.replay()
    torch.cuda.synchronize()
    error = float((out.double() - 2 * exact).norm() / (2 * exact).norm())
    assert 0 < error < TOLERANCE, error

    del graph  # NCCL's destroy waits for graphs that hold its kernels
    dist.barrier()
    nccl.ncclCommDestroy(comm)
    issued.write()
    print(f"rank {RANK}: vLLM's wrapper, NCCL {nccl.ncclGetVersion()} by {nccl.lib._name}: ok, relative error {error:.4f}", flush=True)


main()
