"""Two threads that sum fp16 through vLLM's own wrapper of NCCL, which finds its library by VLLM_NCCL_SO_PATH.

usage: vllm_pynccl.py SOURCE        under flashcomm run, on the simulated driver

The driver is called by ctypes; there is no PyTorch here. Prints the NCCL that answered and what the shim counted.
"""

import ctypes
import json
import os
import sys
import threading

import stubs

WORLD, COUNT = 2, 1 << 20


class Stats(ctypes.Structure):
    names = ["compressed", "forwarded", "others", "bytes_in", "bytes_wire"]
    _fields_ = [("size", ctypes.c_size_t)] + [(name, ctypes.c_uint64) for name in names]


def driver(name, *arguments):
    result = getattr(cuda, name)(*arguments)
    assert result == 0, f"{name}: {result}"


def rank_of(rank, unique_id, answers):
    context, send, receive, stream = (ctypes.c_void_p() for _ in range(4))
    driver("cuDevicePrimaryCtxRetain", ctypes.byref(context), rank)
    driver("cuCtxSetCurrent", context)
    driver("cuStreamCreate", ctypes.byref(stream), 1)
    comm = nccl.ncclCommInitRank(WORLD, unique_id, rank)
    n_bytes = 2 * COUNT
    for memory in [send, receive]:
        driver("cuMemAlloc_v2", ctypes.byref(memory), ctypes.c_size_t(n_bytes))
    ones = (ctypes.c_uint16 * COUNT)(*[0x3C00 + 0x400 * rank] * COUNT)  # 1.0 and 2.0
    driver("cuMemcpyHtoD_v2", send, ones, ctypes.c_size_t(n_bytes))
    data_type, op = wrapper.ncclDataTypeEnum, wrapper.ncclRedOpTypeEnum
    nccl.ncclAllReduce(send, receive, COUNT, data_type.from_torch("float16"), op.ncclSum, comm, stream)
    driver("cuStreamSynchronize", stream)
    sums = (ctypes.c_uint16 * COUNT)()
    driver("cuMemcpyDtoH_v2", sums, receive, ctypes.c_size_t(n_bytes))
    nccl.ncclCommDestroy(comm)
    answers[rank] = set(sums)


envs, _, wrapper = stubs.vllm(sys.argv[1])
nccl = wrapper.NCCLLibrary()
cuda = ctypes.CDLL("libcuda.so.1")
driver("cuInit", 0)
unique_id, answers = nccl.ncclGetUniqueId(), [None] * WORLD
threads = [threading.Thread(target=rank_of, args=(rank, unique_id, answers)) for rank in range(WORLD)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
# Groups of equal numbers lose nothing: 1 + 2 is 3.
assert answers == [{0x4200}] * WORLD, answers
stats = Stats(size=ctypes.sizeof(Stats))
assert nccl.lib.flashcommGetStats(ctypes.byref(stats)) == 0
counted = {name: getattr(stats, name) for name in Stats.names}
print(json.dumps({"nccl": nccl.ncclGetVersion(), "path": envs.VLLM_NCCL_SO_PATH, "preload": os.environ["LD_PRELOAD"], **counted}))
