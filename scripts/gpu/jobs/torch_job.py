"""One rank of a PyTorch job whose all-reduces go through the shim, checked against the reference.

Started by launch.py with LD_PRELOAD of the shim; the program itself is plain torch.distributed. The ranks
share GPU 0 and run with different NCCL_HOSTIDs, or are torchrun's with a GPU each. Needs FLASHCOMM_LIB (for the
counts), FLASHCOMM_REFERENCE (the program of wire/examples) and FLASHCOMM_BITS. Exits with an assertion where
something is off.
"""

import math
import os
import subprocess
import sys
import warnings

import torch
import torch.distributed as dist

from torch_job_tools import BITS, RANK, SCRATCH, WORLD, raw, say, stats


def same_bits(x, y):
    return torch.equal(raw(x), raw(y))


def random(count, dtype, seed):
    generator = torch.Generator(device="cuda").manual_seed(1000 * seed + RANK)
    return (torch.randn(count, device="cuda", generator=generator) * 3).to(dtype)


def check_against_reference(count, dtype, op=dist.ReduceOp.SUM, group=None, ranks=range(WORLD)):
    """The output of each of a group's ranks equals the reference pipeline's on the same input, bit for bit."""
    name = {torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]
    x = random(count, dtype, count % 97)
    raw(x).cpu().numpy().tofile(f"{SCRATCH}/in{RANK}")
    before = stats().compressed
    dist.all_reduce(x, op=op, group=group)
    torch.cuda.synchronize()
    assert stats().compressed == before + 1, "not compressed"
    raw(x).cpu().numpy().tofile(f"{SCRATCH}/out{RANK}")
    dist.barrier()
    if RANK == ranks[0]:
        inputs = [f"{SCRATCH}/in{r}" for r in ranks]
        op_name, path = "avg" if op == dist.ReduceOp.AVG else "sum", f"{SCRATCH}/ref{RANK}"
        command = [os.environ["FLASHCOMM_REFERENCE"], op_name, name, BITS, "auto", "64", path, *inputs]
        subprocess.run(command, check=True)
        expected = open(path, "rb").read()
        for r in ranks:
            assert open(f"{SCRATCH}/out{r}", "rb").read() == expected, f"rank {r}: {count} of {name}"
    dist.barrier()


def check_exact_and_forwarded():
    """What is no fp16 or bf16 sum or average is exact, and counted as forwarded or as exact."""
    before = stats()
    expected_sum = WORLD * (WORLD + 1) // 2
    n_all_reduces = n_others = 0
    for dtype in [torch.float32, torch.float64, torch.int32, torch.int64, torch.uint8, torch.int8]:
        x = torch.full((100_003,), RANK + 1, device="cuda", dtype=dtype)
        dist.all_reduce(x)
        assert (x == expected_sum).all(), dtype
        n_all_reduces += 1
    factors = [1 + rank % 4 for rank in range(WORLD)]  # whose product is exact in bf16, of 8 ranks, too
    for dtype in [torch.float16, torch.bfloat16, torch.float32]:
        for op, mine, expected in [
            (dist.ReduceOp.MAX, RANK + 1, WORLD),
            (dist.ReduceOp.MIN, RANK + 1, 1),
            (dist.ReduceOp.PRODUCT, factors[RANK], math.prod(factors)),
        ]:
            x = torch.full((70_001,), mine, device="cuda", dtype=dtype)
            dist.all_reduce(x, op=op)
            assert (x == expected).all(), (dtype, op)
            n_all_reduces += 1
    x, average = torch.full((70_001,), RANK + 1.0, device="cuda"), expected_sum / WORLD
    dist.all_reduce(x, op=dist.ReduceOp.AVG)
    # NCCL multiplies by 1 / WORLD, which is exact for a power of two.
    tolerance = 0 if WORLD & (WORLD - 1) == 0 else 1e-6 * average
    assert ((x - average).abs() <= tolerance).all()
    n_all_reduces += 1
    half = torch.float16
    x = torch.full((5000,), RANK + 1.0, device="cuda", dtype=half)
    dist.broadcast(x, 0)
    assert (x == 1).all()
    gathered = torch.empty(WORLD * 5000, device="cuda", dtype=half)
    dist.all_gather_into_tensor(gathered, torch.full((5000,), RANK + 1.0, device="cuda", dtype=half))
    assert all((gathered[r * 5000 : (r + 1) * 5000] == r + 1).all() for r in range(WORLD))
    scattered = torch.empty(5000, device="cuda", dtype=half)
    dist.reduce_scatter_tensor(scattered, torch.full((WORLD * 5000,), RANK + 1.0, device="cuda", dtype=half))
    assert (scattered == expected_sum).all()
    x = torch.full((5000,), RANK + 1.0, device="cuda", dtype=half)
    dist.reduce(x, 0)
    assert RANK != 0 or (x == expected_sum).all()
    n_others += 4
    sent = torch.arange(WORLD * 10, device="cuda", dtype=half) + 100 * RANK
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent)
    assert all((received[r * 10] == RANK * 10 + 100 * r) for r in range(WORLD))
    x = torch.full((5000,), float(RANK), device="cuda", dtype=half)
    if RANK == 0:
        dist.send(x + 7, 1)
    elif RANK == 1:
        dist.recv(x, 0)
        assert (x == 7).all()
    torch.cuda.synchronize()
    after = stats()
    assert after.compressed == before.compressed
    n_counted = after.forwarded + after.exact - before.forwarded - before.exact
    assert n_counted == n_all_reduces, (n_counted, n_all_reduces)
    assert after.others - before.others > n_others, "the others are counted"


def eager(x, group=None):
    y = x.clone()
    dist.all_reduce(y, group=group)
    return y


def check_coalesced():
    xs = [random(count, torch.float16, count % 89) for count in [1, 4096, 70_001, 300_000]]
    expected = [eager(x) for x in xs]
    before = stats().compressed
    dist.all_reduce_coalesced(xs)
    assert stats().compressed == before + len(xs)
    assert all(same_bits(x, y) for x, y in zip(xs, expected))


def check_graph():
    x = random(200_003, torch.float16, 5)
    y, other = torch.empty_like(x), torch.empty(50_000, device="cuda", dtype=torch.bfloat16)
    eager(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    before = stats().compressed
    with torch.cuda.graph(graph):
        y.copy_(x)
        dist.all_reduce(y)
        z = other * 2
        dist.all_reduce(z)
    assert stats().compressed == before + 2, "captured and compressed"
    for i in range(100):
        x.copy_(random(200_003, torch.float16, 100 + i))
        other.copy_(random(50_000, torch.bfloat16, 300 + i))
        graph.replay()
        if i % 3 == 0:
            expected, expected_other = eager(x), eager(other * 2)  # mixed with eager calls
            assert same_bits(y, expected) and same_bits(z, expected_other), i


def check_groups_and_streams():
    first, second = dist.new_group(range(WORLD)), dist.new_group(range(WORLD))
    xs = [random(500_000, torch.float16, 400 + i) for i in range(2)]
    expected = [eager(x) for x in xs]
    works = [dist.all_reduce(x, group=g, async_op=True) for x, g in zip(xs, [first, second])]
    for work in works:
        work.wait()
    assert all(same_bits(x, y) for x, y in zip(xs, expected)), "two groups at once"

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    x = random(300_000, torch.bfloat16, 9)
    y = x.clone()
    torch.cuda.synchronize()
    expected = eager(x)
    with torch.cuda.stream(side):
        for _ in range(20):
            y.copy_(x)
            dist.all_reduce(y)
    mixed = [eager(x) for _ in range(20)]
    torch.cuda.current_stream().wait_stream(side)
    assert same_bits(y, expected) and all(same_bits(m, expected) for m in mixed), "side stream"

    if WORLD > 3:
        halves = [range(WORLD // 2), range(WORLD // 2, WORLD)]
        groups = [dist.new_group(list(ranks)) for ranks in halves]
        mine = int(RANK >= WORLD // 2)
        check_against_reference(10_000, torch.float16, group=groups[mine], ranks=halves[mine])
    views = random(9001, torch.float16, 11)
    expected = eager(views[1:])
    odd = views.clone()[1:]  # 2-byte aligned
    dist.all_reduce(odd)
    assert same_bits(odd, expected), "unaligned"


def main():
    warnings.simplefilter("ignore")
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl")
    counts = [1, 7, 4096, 4097, 100_003, 1 << 20, 32 << 20]
    for dtype in [torch.float16, torch.bfloat16]:
        for count in counts:
            check_against_reference(count, dtype)
        check_against_reference(100_003, dtype, dist.ReduceOp.AVG)
    say(f"world {WORLD} bits {BITS}: equal to the reference, {len(counts)} sizes of fp16 and bf16")
    for check in [check_exact_and_forwarded, check_coalesced, check_graph, check_groups_and_streams]:
        check()
        torch.cuda.synchronize()
        dist.barrier()
        say(f"world {WORLD} bits {BITS}: {check.__name__} ok")
    s = stats()
    say(f"world {WORLD} bits {BITS}: compressed {s.compressed}, forwarded {s.forwarded} all-reduces, {s.others} others")
    dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
