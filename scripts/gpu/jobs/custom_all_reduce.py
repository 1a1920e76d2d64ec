"""vLLM's own all-reduce of small sums, beside NCCL and the shim: one of two ranks with a GPU each.

Started by torchrun. Sums of fp16 from 1 KiB to 8 MiB in CUDA graphs, as an engine's decoding has
them; the three take turns, batch by batch. vLLM itself takes its own below 8 MiB. Results are checked
before they are timed and after that: NCCL's and vLLM's are exact but for the last bit, those of the
shim, at its default settings, too where it does not compress.

Needs vLLM, FLASHCOMM_LIB (the shim) and FLASHCOMM_NCCL_LIB (a real NCCL). --json FILE: the results.
"""

import ctypes
import json
import os
import statistics
import sys

os.environ["VLLM_SKIP_P2P_CHECK"] = "1"  # the check wants all of vLLM's groups

import torch
import torch.distributed as dist
from nccl_calls import FLOAT16, SUM, UniqueId, ok
from vllm.distributed.device_communicators.custom_all_reduce import CustomAllreduce

RANK, WORLD = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
SIZES = [1 << i for i in range(10, 24)]
IN_GRAPH = 100
BATCHES = 25
MOST_BYTES = SIZES[-1]
# Relative errors: of fp16's rounding, and of 8 bits.
EXACT, COMPRESSED = 1e-3, 0.02


class Nccl:
    """A communicator of a library: the real NCCL or the shim."""

    def __init__(self, library):
        self.library = ctypes.CDLL(library)
        unique, self.comm = UniqueId(), ctypes.c_void_p()
        if RANK == 0:
            ok(self.library.ncclGetUniqueId, ctypes.byref(unique))
        told = [bytes(unique)]
        dist.broadcast_object_list(told, src=0)
        unique = UniqueId.from_buffer_copy(told[0])
        ok(self.library.ncclCommInitRank, ctypes.byref(self.comm), WORLD, unique, RANK)

    def all_reduce(self, x, y):
        pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (x, y)]
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        ok(self.library.ncclAllReduce, *pointers, ctypes.c_size_t(x.numel()), FLOAT16, SUM, self.comm, stream)

    def capture(self, graph, stream, x, y):
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(IN_GRAPH):
                self.all_reduce(x, y)

    def close(self):
        ok(self.library.ncclCommDestroy, self.comm)


class Vllm:
    def __init__(self):
        device = torch.device("cuda", torch.cuda.current_device())
        self.custom = CustomAllreduce(dist.group.WORLD, device, max_size=2 * MOST_BYTES)
        assert not self.custom.disabled, "vLLM does not use its own all-reduce here; its log says why"

    def all_reduce(self, x, y):
        self.custom.all_reduce(x, out=y)

    def capture(self, graph, stream, x, y):
        """The ranks tell each other where the graph's inputs are when the outer context ends."""
        with self.custom.capture(), torch.cuda.graph(graph, stream=stream):
            for _ in range(IN_GRAPH):
                self.custom.all_reduce(x, out=y, registered=True)

    def close(self):
        self.custom.close()


def inputs():
    """Of both ranks, on the host: the same numbers everywhere."""
    made = [torch.randn(MOST_BYTES // 2, generator=torch.Generator().manual_seed(rank)) for rank in range(WORLD)]
    return [x.half() for x in made]


def error_of(y, expected):
    return float((y.cpu().double() - expected).norm() / expected.norm())


def measure(ways, stream, x, y, expected):
    """Microseconds by batch of each way, at one size, and the relative error of its result."""
    graphs, events = {}, [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    errors, before = {}, {}
    for name, way in ways.items():
        y.zero_()
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            way.all_reduce(x, y)
        torch.cuda.synchronize()
        errors[name] = error_of(y, expected)
        graphs[name] = torch.cuda.CUDAGraph()
        way.capture(graphs[name], stream, x, y)
        y.zero_()
        torch.cuda.synchronize()
        dist.barrier()
        with torch.cuda.stream(stream):
            graphs[name].replay()
        torch.cuda.synchronize()
        before[name] = y.cpu()
        errors[name] = max(errors[name], error_of(y, expected))
        limit = COMPRESSED if name == "flashcomm" else EXACT
        assert errors[name] < limit, f"{name}, {2 * x.numel()} bytes: relative error {errors[name]}"

    us = {name: [] for name in ways}
    for _ in range(BATCHES):
        for name, way in ways.items():
            dist.barrier()
            with torch.cuda.stream(stream):
                way.all_reduce(x, y)  # it ends on both ranks at about the same time, whenever their hosts came
                events[0].record()
                graphs[name].replay()
                events[1].record()
            torch.cuda.synchronize()
            us[name].append(1000 * events[0].elapsed_time(events[1]) / IN_GRAPH)
            assert torch.equal(y.cpu().view(torch.int16), before[name].view(torch.int16)), f"{name}: other bits"
    return us, errors


def row(n_bytes, us, errors):
    """A size's medians, of batches as long as the slower rank's."""
    told = [None] * WORLD
    dist.all_gather_object(told, (us, errors))
    made = {"n_bytes": n_bytes, "us": {}, "error": {}}
    for name in us:
        made["us"][name] = statistics.median(map(max, zip(*(times[name] for times, _ in told))))
        made["error"][name] = max(of[name] for _, of in told)
    if RANK == 0:
        each = "  ".join(f"{name} {took:7.2f} us" for name, took in made["us"].items())
        beside = made["us"]["vllm"] / made["us"]["flashcomm"]
        print(f"{n_bytes:>8} bytes  {each}  vllm / flashcomm {beside:.2f}  error {made['error']['flashcomm']:.5f}", flush=True)
    return made


def main():
    assert WORLD == 2 and sys.argv[1] == "--json"
    torch.cuda.set_device(RANK)
    dist.init_process_group("gloo")
    ways = {
        "nccl": Nccl(os.environ["FLASHCOMM_NCCL_LIB"]),
        "flashcomm": Nccl(os.environ["FLASHCOMM_LIB"]),
        "vllm": Vllm(),
    }
    stream = torch.cuda.Stream()
    everyone = inputs()
    x, y = everyone[RANK].cuda(), torch.empty(MOST_BYTES // 2, dtype=torch.float16, device="cuda")
    exact = sum(each.double() for each in everyone)
    rows = []
    for n_bytes in SIZES:
        n = n_bytes // 2
        us, errors = measure(ways, stream, x[:n], y[:n], exact[:n])
        torch.cuda.synchronize()
        rows.append(row(n_bytes, us, errors))
    if RANK == 0:
        with open(sys.argv[2], "w") as to:
            json.dump({"in_graph": IN_GRAPH, "batches": BATCHES, "rows": rows}, to)
    dist.barrier()
    for way in ways.values():
        way.close()
    dist.destroy_process_group()


main()
