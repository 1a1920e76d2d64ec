"""One rank of sums of many sizes, each compared with the sum in fp64; what the error is in all.

usage: exact_error_job.py

Started by launch.py, by plain NCCL or with LD_PRELOAD of the shim. Rank 0 prints one line of JSON: by type
the root mean square of the error and the largest, over the root mean square of the sums, and how many calls
were exact.
"""

import json
import os

import torch
import torch.distributed as dist

from torch_job_tools import RANK, WORLD, say, stats

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
COUNTS = [1, 7, 1000, 4096, 20_001, 1 << 17]


def error_of(dtype, seed):
    """Squares of the error and of the sums, and the largest error, over all sizes."""
    squares, power, largest = 0.0, 0.0, 0.0
    for count in COUNTS:
        draw = torch.Generator(device="cuda").manual_seed(seed + count)  # the same on every rank
        inputs = [torch.randn(count, device="cuda", generator=draw).to(dtype) for _ in range(WORLD)]
        exact = torch.stack(inputs).double().sum(0)
        mine = inputs[RANK].clone()
        dist.all_reduce(mine)
        error = (mine.double() - exact).abs()
        squares += error.square().sum().item()
        power += exact.square().sum().item()
        largest = max(largest, error.max().item())
    scale = (power / sum(COUNTS)) ** 0.5
    return {"rms": (squares / power) ** 0.5, "largest": largest / scale}


def main():
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl")
    errors = {name: error_of(dtype, 17) for name, dtype in DTYPES.items()}
    n_exact = stats().exact if "LD_PRELOAD" in os.environ else 0
    say(json.dumps({"world": WORLD, "errors": errors, "exact": n_exact}))
    dist.barrier()
    dist.destroy_process_group()


main()
