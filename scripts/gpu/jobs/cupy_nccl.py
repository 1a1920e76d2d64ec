"""One rank of a job that calls NCCL through cupy.cuda.nccl; started by launch.py under `flashcomm run`.

Data comes from numpy and goes back there, so that CuPy compiles no kernel. FLASHCOMM_SCRATCH takes NCCL's unique id.
"""

import os
import pathlib
import pickle
import time

import cupy
import numpy as np
from cupy.cuda import nccl

from expected import Issued

RANK, WORLD = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
TOLERANCE = {"8": 0.02, "4": 0.3}[os.environ["FLASHCOMM_BITS"]]


def unique_id():
    path = pathlib.Path(os.environ["FLASHCOMM_SCRATCH"], "cupy.id")
    if RANK == 0:
        made = nccl.get_unique_id()  # bytes, or a tuple of numbers: CuPy's versions differ
        path.with_suffix(".part").write_bytes(pickle.dumps(made))
        path.with_suffix(".part").rename(path)
        return made
    while not path.exists():
        time.sleep(0.01)
    return pickle.loads(path.read_bytes())


def main():
    issued = Issued(RANK, WORLD)
    comm = nccl.NcclCommunicator(WORLD, unique_id(), RANK)
    stream = cupy.cuda.Stream(non_blocking=True)
    print(f"rank {RANK}: NCCL {nccl.get_version()} by CuPy {cupy.__version__}", flush=True)

    def inputs(count, dtype):
        return [np.random.default_rng(r).standard_normal(count).astype(dtype) for r in range(WORLD)]

    for count in [1 << 20, 1_000_003]:
        everyone = inputs(count, np.float16)
        exact = sum(x.astype(np.float64) for x in everyone)
        x, y = cupy.asarray(everyone[RANK]), cupy.empty(count, np.float16)
        stream.synchronize(), cupy.cuda.Device().synchronize()
        comm.allReduce(x.data.ptr, y.data.ptr, count, nccl.NCCL_FLOAT16, nccl.NCCL_SUM, stream.ptr)
        issued.sum16(2 * count)
        stream.synchronize()
        error = np.linalg.norm(y.get().astype(np.float64) - exact) / np.linalg.norm(exact)
        assert 0 < error < TOLERANCE, error
        # Everything else is exact.
        whole = [np.arange(count, dtype=np.float32) % 1000 + r for r in range(WORLD)]
        x, y = cupy.asarray(whole[RANK]), cupy.empty(count, np.float32)
        cupy.cuda.Device().synchronize()
        comm.allReduce(x.data.ptr, y.data.ptr, count, nccl.NCCL_FLOAT32, nccl.NCCL_SUM, stream.ptr)
        issued.other_all_reduce()
        stream.synchronize()
        assert np.array_equal(y.get(), sum(whole)), "the fp32 sum"
        x = cupy.asarray(everyone[RANK])
        y = cupy.empty(count, np.float16)
        cupy.cuda.Device().synchronize()
        comm.allReduce(x.data.ptr, y.data.ptr, count, nccl.NCCL_FLOAT16, nccl.NCCL_MAX, stream.ptr)
        issued.other_all_reduce()
        stream.synchronize()
        assert np.array_equal(y.get(), np.maximum.reduce(everyone)), "the maximum"
        gathered = cupy.empty(WORLD * count, np.float16)
        comm.allGather(x.data.ptr, gathered.data.ptr, count, nccl.NCCL_FLOAT16, stream.ptr)
        comm.broadcast(x.data.ptr, y.data.ptr, count, nccl.NCCL_FLOAT16, 0, stream.ptr)
        stream.synchronize()
        assert np.array_equal(gathered.get(), np.concatenate(everyone)) and np.array_equal(y.get(), everyone[0])
    comm.destroy()
    issued.write()
    print(f"rank {RANK}: ok, relative error {error:.4f}", flush=True)


main()
