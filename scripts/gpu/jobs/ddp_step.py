"""One rank of a DistributedDataParallel training job, gradients in bf16; started by launch.py under `flashcomm run`.

The replicas must stay the same bit for bit, since every rank gets the same bits from an all-reduce; the loss must fall;
and what is not a gradient (DDP's broadcast of the parameters, a metric in fp32) must be exact.
"""

import os

import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from expected import Issued

RANK, WORLD = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
STEPS = 30


def main():
    issued = Issued(RANK, WORLD)
    torch.cuda.set_device(0)
    dist.init_process_group("nccl")
    torch.manual_seed(RANK)  # other parameters on each rank, until DDP broadcasts those of rank 0
    width = 2048
    layers = [module for _ in range(4) for module in (torch.nn.Linear(width, width), torch.nn.GELU())]
    model = torch.nn.Sequential(*layers, torch.nn.Linear(width, 1)).to("cuda", torch.bfloat16)
    ddp = torch.nn.parallel.DistributedDataParallel(model, device_ids=[0])

    def hook(group, bucket):
        issued.sum16(bucket.buffer().numel() * bucket.buffer().element_size())
        return allreduce_hook(group, bucket)

    ddp.register_comm_hook(None, hook)

    def same_everywhere(what):
        bits = torch.cat([p.detach().view(torch.uint8).flatten() for p in model.parameters()])  # a type that NCCL takes
        first = bits.clone()
        dist.broadcast(first, 0)
        assert torch.equal(bits, first), f"rank {RANK}'s parameters differ from rank 0's {what}"

    same_everywhere("after DDP's broadcast")
    optimizer = torch.optim.Adam(ddp.parameters(), lr=1e-3)  # plain SGD would be lost in the rounding of bf16
    losses = []
    for step in range(STEPS):
        torch.manual_seed(1000 * step + RANK)
        x = torch.randn(256, width, device="cuda", dtype=torch.bfloat16)
        target = x[:, :8].sum(1, keepdim=True)
        loss = torch.nn.functional.mse_loss(ddp(x).float(), target.float())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        total = torch.tensor([step + RANK], device="cuda", dtype=torch.float32)
        dist.all_reduce(total)
        issued.other_all_reduce()
        assert total.item() == WORLD * step + WORLD * (WORLD - 1) / 2
        losses.append(loss.item())
    same_everywhere(f"after {STEPS} steps")
    first, last = sum(losses[:5]) / 5, sum(losses[-5:]) / 5
    assert last < 0.7 * first, (first, last)
    torch.cuda.synchronize()
    dist.destroy_process_group()
    issued.write()
    if RANK == 0:
        print(f"DDP, {WORLD} ranks: {STEPS} steps, replicas the same, loss {first:.3f} -> {last:.3f}", flush=True)


main()
