"""PyTorch jobs and jobs of bare NCCL calls through the shim, whose ranks share one GPU."""

import itertools
import json
import sys

import pytest

from harness import JOBS, SHARING_GPU, SHIM, launch, part, scratch

LAUNCH_S = 150  # that launch.py gives a job
SLACK_S = 15  # before the job is ended from outside


def torch_job(runner, ranks, bits, exchange, program, *arguments, **settings):
    """A PyTorch job with the shim preloaded, every size compressed."""
    settings.update(LD_PRELOAD=SHIM, FLASHCOMM_BITS=bits, FLASHCOMM_EXCHANGE=exchange, FLASHCOMM_MIN_BYTES=0)
    with scratch() as folder:
        command = launch(ranks, LAUNCH_S, program, *arguments)
        runner.run(command, LAUNCH_S + SLACK_S, FLASHCOMM_SCRATCH=folder, **settings)


def over_each_exchange():
    for exchange in ["nccl", "peer", "host"]:
        marks = [part(f"torch-{exchange}")] + [pytest.mark.mps] * (exchange != "nccl")
        for ranks, bits in itertools.product([2, 4], [8, 4]):
            yield pytest.param(exchange, ranks, bits, marks=marks)


@pytest.mark.parametrize("exchange, ranks, bits", list(over_each_exchange()))
def test_torch_job(runner, exchange, ranks, bits):
    torch_job(runner, ranks, bits, exchange, "torch_job.py")


def soak(runner, ranks, bits, exchange, ctas, operations):
    """Two communicators, whose kernels must fit on the GPU together."""
    torch_job(runner, ranks, bits, exchange, "soak_job.py", operations, FLASHCOMM_MAX_CTAS=ctas)


@part("soak")
@pytest.mark.mps
def test_random_operations_of_4_ranks(runner):
    soak(runner, 4, 4, "peer", 12, 100_000)


@part("worlds")
@pytest.mark.mps
@pytest.mark.parametrize("exchange", ["peer", "host", "nccl"])
@pytest.mark.parametrize("ranks", [3, 5, 8])
def test_world(runner, ranks, exchange):
    """A thousand graphs replayed amid eager operations, each with the reference's bits."""
    soak(runner, ranks, "4:8", exchange, 8, 5000)


@part("worlds")
@pytest.mark.mps
@pytest.mark.measures
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_error_of_exact_sums_beside_nccl(runner, ranks):
    """Not larger than NCCL's, against the sum in fp64."""
    exact = {"LD_PRELOAD": SHIM, "FLASHCOMM_EXCHANGE": "peer", "FLASHCOMM_MIN_BYTES": "1G", "FLASHCOMM_EXACT_MAX_BYTES": "1M"}
    found = []
    for settings in [{}, exact]:
        with scratch() as folder:
            command = launch(ranks, LAUNCH_S, "exact_error_job.py")
            # Every rank reads the width, which none of these sums has.
            output = runner.run(command, LAUNCH_S + SLACK_S, FLASHCOMM_BITS=8, FLASHCOMM_SCRATCH=folder, **settings)
        found.append(json.loads(next(line for line in output.splitlines() if line.startswith("{"))))
    plain, ours = found
    assert ours["exact"] == 3 * 6, "not all were exact"
    for dtype in ["fp16", "bf16"]:
        assert ours["errors"][dtype]["rms"] <= plain["errors"][dtype]["rms"], (dtype, found)
        assert ours["errors"][dtype]["largest"] <= plain["errors"][dtype]["largest"], (dtype, found)
    # As many roundings of float in another order.
    assert ours["errors"]["fp32"]["rms"] <= 1.02 * plain["errors"]["fp32"]["rms"], found


@part("settings")
def test_ranks_with_different_settings(runner):
    runner.run([sys.executable, JOBS / "settings_job.py"], 100, FLASHCOMM_EXCHANGE="nccl")


def bare_job(runner, nccl, program, **settings):
    """A job that calls the shim by ctypes."""
    with scratch() as folder:
        settings.update(FLASHCOMM_NCCL_LIB=nccl, FLASHCOMM_MIN_BYTES=0, FLASHCOMM_SCRATCH=folder)
        runner.run([sys.executable, JOBS / program], 100, **SHARING_GPU, **settings)


@part("lifecycle")
@pytest.mark.parametrize("exchange", ["nccl", "peer"])
def test_communicators_of_every_making(runner, packed_nccl, exchange):
    """Threads as ranks of one GPU need a newer NCCL than PyTorch brings along."""
    bare_job(runner, packed_nccl, "lifecycle_job.py", FLASHCOMM_BITS="4:8", FLASHCOMM_EXCHANGE=exchange)


@part("kill")
@pytest.mark.parametrize("exchange", ["peer", "host"])
def test_a_killed_rank(runner, packed_nccl, exchange):
    """Without MPS, whose server a killed client may take along."""
    bare_job(runner, packed_nccl, "kill_job.py", FLASHCOMM_BITS=4, FLASHCOMM_EXCHANGE=exchange)
