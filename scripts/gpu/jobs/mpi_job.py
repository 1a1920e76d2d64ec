"""One rank of a PyTorch job that mpirun starts, `flashcomm run` in front of each; sums are checked against MPI's own."""

import os
import socket

from mpi4py import MPI

RANK, WORLD = MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size
# Before anything opens NCCL: ranks of one GPU pass for ranks of several hosts.
os.environ.update(NCCL_HOSTID=f"host{RANK}", NCCL_SOCKET_IFNAME="lo", MASTER_ADDR="127.0.0.1")

import numpy as np
import torch
import torch.distributed as dist

from expected import Issued

TOLERANCE = {"8": 0.02, "4": 0.3}[os.environ["FLASHCOMM_BITS"]]


def free_port():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return str(unused.getsockname()[1])


def main():
    issued = Issued(RANK, WORLD)
    os.environ["MASTER_PORT"] = MPI.COMM_WORLD.bcast(free_port() if RANK == 0 else None)
    torch.cuda.set_device(0)
    dist.init_process_group("nccl", rank=RANK, world_size=WORLD)
    for dtype in [torch.float16, torch.bfloat16]:
        mine = torch.randn(1 << 20, generator=torch.Generator().manual_seed(RANK)).to(dtype)
        exact = np.empty(mine.numel(), np.float64)
        MPI.COMM_WORLD.Allreduce(mine.double().numpy(), exact)
        x = mine.cuda()
        dist.all_reduce(x)
        issued.sum16(2 * x.numel())
        got = x.double().cpu().numpy()
        error = np.linalg.norm(got - exact) / np.linalg.norm(exact)
        assert 0 < error < TOLERANCE, error
        # The same bits on every rank, says MPI.
        mine_bits = x.view(torch.int16).cpu().numpy()
        assert np.array_equal(MPI.COMM_WORLD.bcast(mine_bits), mine_bits), "ranks differ"
    x = torch.arange(100_000, device="cuda", dtype=torch.float32) + RANK
    dist.all_reduce(x)
    issued.other_all_reduce()
    assert torch.equal(x, torch.arange(100_000, device="cuda") * WORLD + WORLD * (WORLD - 1) / 2)
    torch.cuda.synchronize()
    dist.destroy_process_group()
    issued.write()
    if RANK == 0:
        print(f"{WORLD} ranks of {MPI.Get_library_version().split(',')[0]}: ok, relative error {error:.4f}", flush=True)


main()
