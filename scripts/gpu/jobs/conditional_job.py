"""All-reduces captured into the body of a conditional (IF) node, where graphs are not mixed.

The body of such a node may hold kernels, but no event nodes, which NCCL leaves out with
NCCL_GRAPH_MIXING_SUPPORT=0 or graphUsageMode 1. One process, a rank for each GPU, or two ranks on
one; the shim is called by ctypes, like the driver. `conditional_job.py environment|configuration`.
"""

import ctypes
import os
import sys

import numpy as np

HOW = sys.argv[1]
os.environ.update(FLASHCOMM_BITS="8", FLASHCOMM_MIN_BYTES="0")
if HOW == "environment":
    os.environ["NCCL_GRAPH_MIXING_SUPPORT"] = "0"
cuda = ctypes.CDLL("libcuda.so.1")
nccl = ctypes.CDLL(os.environ["FLASHCOMM_LIB"])
COUNT = 100_000
FLOAT16, SUM = 6, 0
UNDEFINED = -(2**31)


def ok(function, *arguments):
    result = function(*arguments)
    assert result == 0, f"{function.__name__} answers {result}"


def pointer():
    return ctypes.c_void_p()


class UniqueId(ctypes.Structure):
    _fields_ = [("internal", ctypes.c_byte * 128)]


class Config(ctypes.Structure):
    """ncclConfig_t of NCCL 2.30 up to graphUsageMode and the three members behind it."""

    _fields_ = [
        ("size", ctypes.c_size_t),
        ("magic", ctypes.c_uint),
        ("version", ctypes.c_uint),
        ("before_name", ctypes.c_int * 4),
        ("net_name", ctypes.c_void_p),
        ("split_share", ctypes.c_int),
        ("traffic_class", ctypes.c_int),
        ("comm_name", ctypes.c_void_p),
        ("before_mode", ctypes.c_int * 6),
        ("graph_usage_mode", ctypes.c_int),
        ("behind_mode", ctypes.c_int * 3),
    ]

    def __init__(self):
        undefined = [UNDEFINED] * 6
        super().__init__(ctypes.sizeof(Config), 0xCAFEBEEF, 23000)
        self.before_name[:], self.before_mode[:], self.behind_mode[:] = undefined[:4], undefined, undefined[:3]
        self.split_share = self.traffic_class = UNDEFINED
        self.graph_usage_mode = 1


class ConditionalParams(ctypes.Structure):
    """CUgraphNodeParams of a conditional node."""

    _fields_ = [
        ("type", ctypes.c_int),
        ("reserved0", ctypes.c_int * 3),
        ("handle", ctypes.c_uint64),
        ("conditional_type", ctypes.c_int),
        ("size", ctypes.c_uint),
        ("bodies", ctypes.POINTER(ctypes.c_void_p)),
        ("context", ctypes.c_void_p),
        ("rest", ctypes.c_byte * 216),
    ]


CONDITIONAL, IF, ASSIGN_DEFAULT, RELAXED = 13, 0, 1, 2


class Rank:
    def __init__(self, device):
        self.device, self.context, self.stream = device, pointer(), pointer()
        ok(cuda.cuDevicePrimaryCtxRetain, ctypes.byref(self.context), device)
        self.enter()
        ok(cuda.cuStreamCreate, ctypes.byref(self.stream), 1)
        self.input, self.output = ctypes.c_uint64(), ctypes.c_uint64()
        for memory in [self.input, self.output]:
            ok(cuda.cuMemAlloc_v2, ctypes.byref(memory), ctypes.c_size_t(2 * COUNT))

    def enter(self):
        ok(cuda.cuCtxSetCurrent, self.context)

    def write(self, values):
        self.enter()
        ok(cuda.cuMemcpyHtoD_v2, self.input, values.ctypes.data_as(ctypes.c_void_p), ctypes.c_size_t(values.nbytes))
        ok(cuda.cuMemsetD8_v2, self.output, ctypes.c_ubyte(0), ctypes.c_size_t(2 * COUNT))

    def read(self):
        self.enter()
        ok(cuda.cuStreamSynchronize, self.stream)
        values = np.empty(COUNT, np.float16)
        ok(cuda.cuMemcpyDtoH_v2, values.ctypes.data_as(ctypes.c_void_p), self.output, ctypes.c_size_t(values.nbytes))
        return values

    def all_reduce(self):
        ok(nccl.ncclAllReduce, self.input, self.output, ctypes.c_size_t(COUNT), FLOAT16, SUM, self.comm, self.stream)

    def capture(self):
        """A graph whose only node is an IF node, with two all-reduces in its body."""
        self.enter()
        graph, node, handle, self.executable = pointer(), pointer(), ctypes.c_uint64(), pointer()
        ok(cuda.cuGraphCreate, ctypes.byref(graph), 0)
        ok(cuda.cuGraphConditionalHandleCreate, ctypes.byref(handle), graph, self.context, 1, ASSIGN_DEFAULT)
        params = ConditionalParams(type=CONDITIONAL, handle=handle, conditional_type=IF, size=1, context=self.context)
        nothing = ctypes.c_void_p(None)
        ok(cuda.cuGraphAddNode_v2, ctypes.byref(node), graph, nothing, nothing, ctypes.c_size_t(0), ctypes.byref(params))
        body = ctypes.c_void_p(params.bodies[0])
        ok(cuda.cuStreamBeginCaptureToGraph, self.stream, body, nothing, nothing, ctypes.c_size_t(0), RELAXED)
        self.all_reduce()
        self.all_reduce()
        ok(cuda.cuStreamEndCapture, self.stream, ctypes.byref(body))
        ok(cuda.cuGraphInstantiateWithFlags, ctypes.byref(self.executable), graph, ctypes.c_ulonglong(0))
        ok(cuda.cuGraphUpload, self.executable, self.stream)
        ok(cuda.cuStreamSynchronize, self.stream)

    def launch(self):
        self.enter()
        ok(cuda.cuGraphLaunch, self.executable, self.stream)


def main():
    ok(cuda.cuInit, 0)
    n_devices = ctypes.c_int()
    ok(cuda.cuDeviceGetCount, ctypes.byref(n_devices))
    devices = [0, 1] if n_devices.value >= 2 else [0, 0]
    ranks = [Rank(device) for device in devices]
    unique, config = UniqueId(), Config()
    ok(nccl.ncclGetUniqueId, ctypes.byref(unique))
    ok(nccl.ncclGroupStart)
    for number, rank in enumerate(ranks):
        rank.enter()
        rank.comm = pointer()
        place = ctypes.byref(rank.comm)
        if HOW == "configuration":
            ok(nccl.ncclCommInitRankConfig, place, len(ranks), unique, number, ctypes.byref(config))
        else:
            ok(nccl.ncclCommInitRank, place, len(ranks), unique, number)
    ok(nccl.ncclGroupEnd)
    generator = np.random.default_rng(1)
    inputs = [generator.standard_normal(COUNT).astype(np.float16) for _ in ranks]
    exact = sum(values.astype(np.float64) for values in inputs)
    for rank, values in zip(ranks, inputs):
        rank.write(values)
    for rank in ranks:
        rank.capture()
    for _ in range(3):
        for rank in ranks:
            rank.launch()
    outputs = [rank.read().astype(np.float64) for rank in ranks]
    error = np.linalg.norm(outputs[0] - exact) / np.linalg.norm(exact)
    assert 1e-3 < error < 0.02, f"the error of 8 bits, not {error}"
    assert np.array_equal(outputs[0], outputs[1]), "ranks differ"
    print(f"an IF node with two all-reduces, {HOW}, devices {devices}: relative error {error:.5f}")


main()
