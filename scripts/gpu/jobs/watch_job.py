"""One rank of a job in which rank 1 is 2 ms late for the first of two sums, again and again for more than a minute.

Rank 0 always waits for the small one, and never for the large one that follows it. Started by torchrun under `flashcomm run`.
"""

import os
import time

import torch
import torch.distributed as dist

SECONDS, LATE_S = 66, 0.002
SMALL, LARGE = 32 << 10, 8 << 20  # elements: 64 KiB and 16 MiB

torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
dist.init_process_group("nccl")
small, large = (torch.zeros(count, dtype=torch.float16, device="cuda") for count in [SMALL, LARGE])
dist.all_reduce(small)
torch.cuda.synchronize()
end = time.monotonic() + SECONDS
is_over = torch.zeros(1, dtype=torch.int32, device="cuda")
while not is_over.item():
    for _ in range(100):
        if dist.get_rank() == 1:
            time.sleep(LATE_S)
        dist.all_reduce(small)
        dist.all_reduce(large)
        torch.cuda.synchronize()
    is_over.fill_(time.monotonic() > end)
    dist.all_reduce(is_over)  # an integer, by NCCL: all ranks end together
dist.destroy_process_group()
