"""One rank of a long random PyTorch job: all-reduces of many sizes and both types over two communicators, eager, coalesced and in
graphs that are replayed between them, each result compared on the GPU with the reference's bits. Below FLASHCOMM_MIN_BYTES, a number,
they are to be exact.

usage: soak_job.py N [SEED]      N operations or a few more; every rank draws the same ones

Started by launch.py with LD_PRELOAD of the shim. Needs what torch_job.py needs, and FLASHCOMM_MAX_CTAS small
enough for the kernels of two communicators on all ranks to fit on the GPU together.
"""

import os
import random
import subprocess
import sys
import time

import torch
import torch.distributed as dist

from torch_job_tools import RANK, SCRATCH, WORLD, raw, say, stats

N, SEED = int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 1
NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16"}
MIN_BYTES = int(os.environ["FLASHCOMM_MIN_BYTES"])


class Case:
    """A sum: this rank's input, and what must come out."""

    def __init__(self, number, count, dtype):
        generator = torch.Generator(device="cuda").manual_seed(1000 * number + RANK)
        self.input = (torch.randn(count, device="cuda", generator=generator) * 3).to(dtype)
        self.buffers = [torch.empty_like(self.input) for _ in range(2)]
        self.is_exact = 2 * count < MIN_BYTES
        path = f"{SCRATCH}/case{number}"
        raw(self.input).cpu().numpy().tofile(f"{path}.{RANK}")
        dist.barrier()
        inputs = [f"{path}.{rank}" for rank in range(WORLD)]
        if self.is_exact:
            self.expected = raw(exact_sum(inputs, dtype)).cuda()
            return
        if RANK == 0:
            reference = [os.environ["FLASHCOMM_REFERENCE"], "sum", NAMES[dtype], os.environ["FLASHCOMM_BITS"], "auto", "64"]
            subprocess.run([*reference, path, *inputs], check=True)
        dist.barrier()
        expected = bytearray(open(path, "rb").read())
        self.expected = torch.frombuffer(expected, dtype=torch.int16).cuda()


def exact_sum(paths, dtype):
    """Of raw files: added in float and in this order, rounded once."""
    terms = [torch.frombuffer(bytearray(open(path, "rb").read()), dtype=dtype).float() for path in paths]
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total.to(dtype)


def main():
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl")
    groups = [dist.group.WORLD, dist.new_group()]
    draw = random.Random(SEED)
    dtypes = list(NAMES)
    counts = [1, 4095, 4096, 4097, *(int(2 ** draw.uniform(0, 19)) for _ in range(20))]
    cases = [Case(number, count, dtypes[number % 2]) for number, count in enumerate(counts)]
    bad = torch.zeros(1, dtype=torch.int64, device="cuda")

    def eager(case, which):
        buffer = case.buffers[which]
        buffer.copy_(case.input)
        dist.all_reduce(buffer, group=groups[which])
        bad.add_((raw(buffer) != case.expected).any())

    def coalesced(some, which):
        buffers = [case.input.clone() for case in some]
        with dist._coalescing_manager(group=groups[which]):
            for buffer in buffers:
                dist.all_reduce(buffer, group=groups[which])
        for case, buffer in zip(some, buffers):
            bad.add_((raw(buffer) != case.expected).any())

    for which in range(2):
        eager(cases[0], which)  # attached before anything is captured
    torch.cuda.synchronize()
    graphs = []
    for _ in range(8):
        some, which = draw.sample(cases, draw.randint(1, 4)), draw.randrange(2)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for case in some:
                eager(case, which)
        graphs.append((graph, len(some)))
    dist.barrier()

    before, issued, replays, begun = stats(), [], 0, time.monotonic()
    n_ops, next_check = 0, 0
    while n_ops < N:
        kind = draw.random()
        if kind < 0.6:
            case = draw.choice(cases)
            eager(case, draw.randrange(2))
            issued.append(case.is_exact)
            n_ops += 1
        elif kind < 0.7:
            one = draw.randrange(2)  # PyTorch coalesces what is of one type
            some = draw.sample(cases[one::2], draw.randint(2, 4))
            coalesced(some, draw.randrange(2))
            issued += [case.is_exact for case in some]
            n_ops += len(some)
        else:
            graph, length = draw.choice(graphs)
            for _ in range(draw.randint(1, 3)):
                graph.replay()
                n_ops, replays = n_ops + length, replays + 1
        if n_ops >= next_check:
            assert bad.item() == 0, f"rank {RANK}: {bad.item()} differences within {n_ops} operations of seed {SEED}"
            next_check = n_ops + 5000
    torch.cuda.synchronize()
    assert bad.item() == 0, f"rank {RANK}: {bad.item()} differences, seed {SEED}"
    counted = (stats().exact - before.exact, stats().compressed - before.compressed)
    assert counted == (sum(issued), len(issued) - sum(issued)), f"counted {counted} of {len(issued)}"
    say(f"{n_ops} random operations, {counted[0]} exact and {counted[1]} compressed calls, {replays} replays among them, {WORLD} ranks, seed {SEED}: no difference, "
        f"{time.monotonic() - begun:.0f} s")
    graph = graphs = None  # NCCL's destroy waits for graphs that hold its kernels
    dist.barrier()
    dist.destroy_process_group()


main()
