"""Compressed all-reduces from within PyTorch's green contexts, each with a few multiprocessors of its GPU.

One process, a rank for each of two GPUs; the shim is called by ctypes. The sum is large enough for the
largest grid, which does not fit into the green context. On rank 1 only, on both, where the green
context is current (PyTorch uses its null stream then), and from graphs: the bits are those that
ordinary streams give.
"""

import ctypes
import faulthandler
import os

import torch
from torch.cuda.green_contexts import GreenContext

faulthandler.dump_traceback_later(120, exit=True)
os.environ.update(FLASHCOMM_BITS="4", FLASHCOMM_MIN_BYTES="0", FLASHCOMM_TIMEOUT_S="20")
nccl = ctypes.CDLL(os.environ["FLASHCOMM_LIB"])
COUNT = 32 << 20
MULTIPROCESSORS = 8
FLOAT16, SUM = 6, 0


class UniqueId(ctypes.Structure):
    _fields_ = [("internal", ctypes.c_byte * 128)]


def ok(function, *arguments):
    result = function(*arguments)
    assert result == 0, f"{function.__name__} answers {result}"


class Rank:
    def __init__(self, number):
        self.device = torch.device("cuda", number)
        with torch.cuda.device(self.device):
            generator = torch.Generator(self.device).manual_seed(number)
            self.input = torch.randn(COUNT, dtype=torch.float16, device=self.device, generator=generator)
            self.output = torch.empty_like(self.input)
            self.ordinary = torch.cuda.Stream()
            self.green = GreenContext.create(num_sms=MULTIPROCESSORS, device_id=number)
            self.inside = self.green.Stream()
            torch.cuda.synchronize()
        self.comm = ctypes.c_void_p()

    def all_reduce(self, stream):
        """On a stream by its handle, of input that is made there to output that is used there."""
        pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (self.input, self.output)]
        ok(nccl.ncclAllReduce, *pointers, ctypes.c_size_t(COUNT), FLOAT16, SUM, self.comm, ctypes.c_void_p(stream))

    def sum(self):
        """On the current stream. Doubled before and halved behind, so that the order shows."""
        self.input.mul_(2)
        self.output.zero_()
        self.all_reduce(torch.cuda.current_stream(self.device).cuda_stream)
        self.output.mul_(0.5)
        self.input.mul_(0.5)

    def sum_on(self, stream):
        with torch.cuda.device(self.device), torch.cuda.stream(stream):
            self.sum()

    def sum_in_context(self):
        with torch.cuda.device(self.device):
            self.green.set_context()
            self.sum()
            self.green.pop_context()  # which wants that nobody has left another one current

    def capture(self):
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self.device):
            with torch.cuda.graph(self.graph, stream=self.inside, capture_error_mode="thread_local"):
                self.sum()
            torch.cuda.synchronize()

    def replay(self):
        with torch.cuda.device(self.device), torch.cuda.stream(self.ordinary):
            self.graph.replay()

    def result(self):
        torch.cuda.synchronize(self.device)
        return self.output.cpu()


def main():
    ranks = [Rank(number) for number in range(2)]
    unique = UniqueId()
    ok(nccl.ncclGetUniqueId, ctypes.byref(unique))
    ok(nccl.ncclGroupStart)
    for number, rank in enumerate(ranks):
        with torch.cuda.device(rank.device):
            ok(nccl.ncclCommInitRank, ctypes.byref(rank.comm), len(ranks), unique, number)
    ok(nccl.ncclGroupEnd)

    for rank in ranks:
        rank.sum_on(rank.ordinary)
    expected, other = [rank.result() for rank in ranks]
    assert torch.equal(expected, other), "ranks differ"
    exact = sum(rank.input.cpu().double() for rank in ranks)
    error = ((expected.double() - exact).norm() / exact.norm()).item()
    assert 0.01 < error < 0.2, f"the error of 4 bits, not {error}"

    def check(how):
        for number, rank in enumerate(ranks):
            assert torch.equal(rank.result(), expected), f"{how}: rank {number} has other bits"
            rank.output.zero_()
            torch.cuda.synchronize(rank.device)
        print(f"{how}: as from ordinary streams", flush=True)

    ranks[0].sum_on(ranks[0].ordinary)
    ranks[1].sum_on(ranks[1].inside)
    check("rank 1 in a green context")
    for rank in ranks:
        rank.sum_on(rank.inside)
    check("both in green contexts")
    for rank in ranks:
        rank.sum_in_context()
    check("where they are current")
    for rank in ranks:
        rank.capture()
    for rank in ranks:
        rank.replay()
    check("from graphs captured there")
    print(f"green contexts of {MULTIPROCESSORS} multiprocessors: relative error {error:.5f}")


main()
