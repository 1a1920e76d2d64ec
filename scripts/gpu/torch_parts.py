"""Median times of the transfers that the two hops are made of, beside each other: which calls of NCCL are the faster."""

import time

import torch
import torch.distributed as dist


def main():
    torch.cuda.set_device(0)
    dist.init_process_group("nccl")
    rank, world = dist.get_rank(), dist.get_world_size()
    for mib in [4.25, 8.5, 16.5, 33]:
        n = int(mib * (1 << 20))
        mine, all_ = torch.zeros(n, device="cuda", dtype=torch.uint8), torch.zeros(world * n, device="cuda", dtype=torch.uint8)

        def gather():
            dist.all_gather_into_tensor(all_, mine)

        def exchange():
            peers = [p for p in range(world) if p != rank]
            ops = [dist.P2POp(dist.isend, mine, p) for p in peers]
            ops += [dist.P2POp(dist.irecv, all_[p * n : (p + 1) * n], p) for p in peers]
            for work in dist.batch_isend_irecv(ops):
                work.wait()

        for name, call in [("all_gather", gather), ("send/recv", exchange)]:
            times = []
            for _ in range(18):
                dist.barrier()
                torch.cuda.synchronize()
                start = time.perf_counter()
                call()
                torch.cuda.synchronize()
                times.append(time.perf_counter() - start)
            if rank == 0:
                print(f"{mib} MiB {name}: {sorted(times[3:])[7] * 1e3:.3f} ms", flush=True)
    dist.destroy_process_group()


main()
