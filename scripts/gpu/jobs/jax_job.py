"""Sums of JAX over all GPUs of one process, under `flashcomm run`; each is checked against numpy's.

usage: jax_job.py DEVICES

JAX opens NCCL twice: its Python loads the file of nvidia-nccl by its path, and XLA then opens the name
libnccl.so.2, which the shim answers. Every device is a rank, with a thread and a communicator of its own.
FLASHCOMM_BITS says how far a sum may be off. What was issued goes to FLASHCOMM_SCRATCH (expected.py).
"""

import os
import sys

import jax
import jax.numpy as jnp
import numpy as np

from expected import Issued

WORLD = int(sys.argv[1])
TOLERANCE = {"8": 0.02, "4": 0.3}[os.environ["FLASHCOMM_BITS"]]
# 16 MiB of fp16, above every default of FLASHCOMM_MIN_BYTES, and one that no tile divides.
COUNTS = [8 << 20, (8 << 20) + 1003]


def everywhere(inputs):
    """The sum over the devices, as each of them has it: a row for each."""
    return np.asarray(jax.pmap(lambda x: jax.lax.psum(x, "gpus"), axis_name="gpus")(inputs))


def main():
    devices = jax.devices()
    assert len(devices) == WORLD, devices
    print(f"JAX {jax.__version__} on {WORLD} x {devices[0].device_kind}", flush=True)
    issued, draw = Issued(0, WORLD), np.random.default_rng(1)
    for count in COUNTS:
        for dtype in [np.float16, jnp.bfloat16]:
            inputs = draw.standard_normal((WORLD, count), np.float32).astype(dtype)
            sums = everywhere(inputs)
            for _ in range(WORLD):
                issued.sum16(2 * count)
            exact = inputs.astype(np.float64).sum(0)
            error = np.linalg.norm(sums[0].astype(np.float64) - exact) / np.linalg.norm(exact)
            assert sums.dtype == dtype and 0 < error < TOLERANCE, (sums.dtype, error)
            bits = sums.view(np.uint16)
            assert (bits == bits[0]).all(), "devices differ"
            print(f"{count} of {np.dtype(dtype).name}: relative error {error:.4f}", flush=True)
        # Everything else is exact.
        inputs = draw.integers(-1000, 1000, (WORLD, count)).astype(np.float32)
        sums = everywhere(inputs)
        for _ in range(WORLD):
            issued.other_all_reduce()
        assert (sums == inputs.sum(0)).all(), "the fp32 sum"
    issued.write()
    print("ok", flush=True)


main()
