"""The packed programs: kernels, sanitizers, the simulators' jobs on the real driver, and the C++ example."""

import pytest

from harness import PACK, SHARING_GPU, need_program, part


@part("kernels")
@pytest.mark.parametrize("binary", ["gpu_kernels"])
def test_kernels_equal_the_reference(runner, binary):
    runner.run([PACK / binary], 200)


def sanitize(runner, tool, command, **settings):
    """Runs a command under a tool of compute-sanitizer, where everything takes a hundred times as long."""
    options = ["--tool", tool, "--target-processes", "all", "--error-exitcode", "1"]
    if tool == "memcheck":
        options += ["--report-api-errors", "no"]  # the packed NCCL asks for kernels that were trimmed away
    runner.run([need_program("compute-sanitizer"), *options, *command], 200, **settings)


@part("sanitize")
def test_memcheck_of_the_kernels(runner):
    sanitize(runner, "memcheck", [PACK / "gpu_kernels"])


def one(binary, test):
    return [PACK / binary, "--test-threads", 1, "--exact", test]


@part("sanitize")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
@pytest.mark.parametrize(
    "job",
    [
        pytest.param(one("sim_groups", "a_simulated_end_discards_the_group"), id="fused"),
        pytest.param(one("sim_allreduce", "rings_go_round_in_gpu_memory"), id="rings-gpu"),
        pytest.param(one("sim_allreduce", "rings_go_round_in_host_memory"), id="rings-host"),
    ],
)
def test_sanitizer_of_the_fused_kernel(runner, packed_nccl, tool, job):
    """Small jobs of the fused kernel, with ranks that share the GPU."""
    sanitize(runner, tool, job, FLASHCOMM_TEST_REAL=1, FLASHCOMM_TEST_NCCL=packed_nccl)


@part("jobs")
@pytest.mark.parametrize(
    "binary, limit, tests",
    [
        pytest.param("sim_groups", 120, [], id="groups-and-captures"),
        pytest.param(
            "sim_lifecycle",
            60,
            ["children", "revoked", "address", "another_thread_captures"],
            id="children-revocation-addresses-used-again",
        ),
        pytest.param("sim_allreduce", 60, ["two_to_five", "rings_go", "replays"], id="sizes-at-every-border"),
        pytest.param(
            "sim_allreduce",
            60,
            ["every_code_equals_the_reference_over_host", "every_width"],
            id="every-code-and-width-host-memory",
        ),
        pytest.param("sim_allreduce", 60, ["every_code_shows"], id="what-is-not-finite-in-every-code"),
        pytest.param("sim_record", 60, ["threads_save"], id="recorded-inputs"),
        pytest.param("sim_stats", 60, ["counts_are_its_calls"], id="statistics"),
        pytest.param(
            "sim_control",
            100,
            ["threads_change", "graphs_keep", "one_thread", "captures_may_follow"],
            id="widths-that-change",
        ),
        pytest.param("sim_soak", 60, [], id="soak"),
    ],
)
def test_simulators_job(runner, packed_nccl, binary, limit, tests):
    """Threads as ranks of this GPU, on the real driver and the packed NCCL."""
    settings = {"FLASHCOMM_TEST_REAL": 1, "FLASHCOMM_TEST_NCCL": packed_nccl, "FLASHCOMM_TEST_SOAK_OPS": 2000}
    runner.run([PACK / binary, "--test-threads", 1, *tests], limit, **settings)


@part("example")
@pytest.mark.parametrize("exchange", ["peer", "host", "nccl"])
def test_cpp_example(runner, packed_nccl, exchange):
    settings = {"FLASHCOMM_NCCL_LIB": packed_nccl, "LD_LIBRARY_PATH": PACK, "FLASHCOMM_EXCHANGE": exchange}
    runner.run([PACK / "control", 2], 60, **SHARING_GPU, **settings, FLASHCOMM_MIN_BYTES=0)
