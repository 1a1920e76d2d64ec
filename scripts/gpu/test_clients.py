"""Unmodified clients of NCCL under `flashcomm run`, and whether the shim counted what they issued."""

import importlib.util
import os
import pathlib
import sys

import pytest

from harness import FLASHCOMM, JOBS, PACK, launch, need_program, scratch
from jobs import expected

LIMIT_S = 135
pytestmark = pytest.mark.clients


def need_module(name):
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"no {name} on this machine")


def torchs_nccl():
    """LD_LIBRARY_PATH with the NCCL of PyTorch's packages, which CuPy wants from the loader."""
    try:
        found = importlib.util.find_spec("nvidia.nccl")
    except ModuleNotFoundError:
        found = None
    folders = [str(pathlib.Path(folder, "lib")) for folder in list(found.submodule_search_locations)[:1]] if found else []
    return ":".join(folders + [path for path in [os.environ.get("LD_LIBRARY_PATH")] if path])


def client(runner, ranks, bits, command, **settings):
    """`command(run)` is the whole command, with `flashcomm run` in it."""
    with scratch() as folder:
        stats = folder / "stats.%p.json"
        run = [FLASHCOMM, "run", "--quiet", "--bits", bits, "--exchange", "nccl", "--min-bytes", 0]
        command = command([*run, "--stats-file", stats, "--"])
        runner.run(command, LIMIT_S, FLASHCOMM_SCRATCH=folder, FLASHCOMM_BITS=bits, **settings)
        expected.check(folder, ranks, bits)


def launched(runner, ranks, bits, program):
    command = launch(ranks, 120, program)
    client(runner, ranks, bits, lambda run: [*run, *command], LD_LIBRARY_PATH=torchs_nccl())


def test_doctor(runner):
    runner.run([FLASHCOMM, "doctor"], 100)


@pytest.mark.mps
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("ranks", [2, 4])
def test_ddp(runner, ranks, bits):
    launched(runner, ranks, bits, "ddp_step.py")


@pytest.mark.mps
@pytest.mark.parametrize("bits", [8, 4])
def test_vllms_wrapper_of_nccl(runner, bits):
    if not (PACK / "vllm").is_dir():
        pytest.skip("no source of vLLM in .gpu/: pack_gpu.sh packs what setup.sh --test has fetched")
    launched(runner, 2, bits, "vllm_pynccl.py")


@pytest.mark.mps
@pytest.mark.parametrize("bits", [8, 4])
def test_cupy(runner, bits):
    need_module("cupy")
    launched(runner, 2, bits, "cupy_nccl.py")


@pytest.mark.mps
@pytest.mark.parametrize("bits", [8, 4])
def test_ranks_of_mpirun(runner, bits):
    """The ranks are MPI's own, `flashcomm run` in front of each."""
    need_module("mpi4py")
    mpirun = [need_program("mpirun"), "-n", 2, "--allow-run-as-root", "--oversubscribe"]
    client(runner, 2, bits, lambda run: [*mpirun, *run, sys.executable, JOBS / "mpi_job.py"])
