"""Median time of all_reduce over fp16 sizes, one rank of it; rank 0 writes JSON to the file given."""

import json
import os
import sys
import time

import torch
import torch.distributed as dist


def main():
    torch.cuda.set_device(0)
    dist.init_process_group("nccl")
    result = {}
    for mib in [0.25, 1, 4, 16, 64]:
        x = torch.randn(int(mib * (1 << 19)), device="cuda").half()
        times = []
        for _ in range(3 + (15 if mib > 8 else 25)):
            dist.barrier()
            torch.cuda.synchronize()
            start = time.perf_counter()
            dist.all_reduce(x)
            torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
            x.normal_()
        times = sorted(times[3:])
        result[str(mib)] = times[len(times) // 2] * 1e3
    if dist.get_rank() == 0:
        with open(sys.argv[1], "w") as out:
            json.dump(result, out)
        print({mib: round(ms, 3) for mib, ms in result.items()}, "ms", flush=True)
    dist.destroy_process_group()


main()
