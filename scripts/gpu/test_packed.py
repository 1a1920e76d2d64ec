"""The packed programs: kernels, sanitizers, the simulators' jobs on the real driver, and the C++ example."""

import sys

import pytest

from harness import JOBS, PACK, SHARING_GPU, need_program, part


@part("kernels")
def test_kernels_equal_the_reference(runner):
    runner.run([PACK / "gpu"], 200)


def sanitize(runner, tool, command, **settings):
    """Runs a command under a tool of compute-sanitizer, where everything takes a hundred times as long."""
    options = ["--tool", tool, "--target-processes", "all", "--error-exitcode", "1"]
    if tool == "memcheck":
        options += ["--report-api-errors", "no"]  # the packed NCCL asks for kernels that were trimmed away
    runner.run([need_program("compute-sanitizer"), *options, *command], 200, **settings)


@part("sanitize")
def test_memcheck_of_the_kernels(runner):
    sanitize(runner, "memcheck", [PACK / "gpu"])


@part("sanitize")
def test_racecheck_of_the_exact_kernel(runner):
    sanitize(runner, "racecheck", [PACK / "gpu", "exact::"])


def sim(runner, *filters):
    """The simulators' jobs of these names, one after the other. Each has to choose one, or nothing is tested."""
    names = runner.run([PACK / "sim", "--list"], 60).splitlines()
    unused = [word for word in filters if not any(word in name for name in names)]
    assert not unused, f"no job is called {unused}"
    return [PACK / "sim", "--test-threads", 1, *filters]


@part("sanitize")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
@pytest.mark.parametrize(
    "job",
    [
        pytest.param("groups::a_simulated_end_discards_the_group", id="fused"),
        pytest.param("allreduce::rings_go_round_in_gpu_memory", id="rings-gpu"),
        pytest.param("allreduce::rings_go_round_in_host_memory", id="rings-host"),
    ],
)
def test_sanitizer_of_the_fused_kernel(runner, packed_nccl, tool, job):
    """Small jobs of the fused kernel, with ranks that share the GPU."""
    settings = {"FLASHCOMM_TEST_REAL": 1, "FLASHCOMM_TEST_NCCL": packed_nccl}
    sanitize(runner, tool, [*sim(runner, job), "--exact"], **settings)


@part("jobs")
@pytest.mark.parametrize(
    "limit, filters",
    [
        pytest.param(120, ["groups::"], id="groups-and-captures"),
        pytest.param(
            60,
            ["lifecycle::children", "revoked", "address_used_again", "another_thread_captures"],
            id="children-revocation-addresses-used-again",
        ),
        pytest.param(
            60, ["allreduce::two_to_five", "allreduce::rings_go", "allreduce::replays"], id="sizes-at-every-border"
        ),
        pytest.param(
            150,
            ["allreduce::every_code_equals_the_reference_over_host", "allreduce::every_width"],
            id="every-code-and-width-host-memory",
        ),
        pytest.param(60, ["allreduce::every_code_shows"], id="what-is-not-finite-in-every-code"),
        pytest.param(
            150, ["exact::two", "exact::the_ranges", "exact::sums_of", "exact::a_wait"], id="exact-sums-in-one-hop"
        ),
        pytest.param(
            60, ["aside::one_rank_may_have_two", "aside::groups_of_both"], id="groups-with-other-calls"
        ),
        pytest.param(60, ["record::threads_save"], id="recorded-inputs"),
        pytest.param(60, ["stats::a_communicators_counts_are_its_calls"], id="statistics"),
        pytest.param(
            100,
            ["control::threads_change", "control::graphs_keep", "control::one_thread", "captures_may_follow"],
            id="widths-that-change",
        ),
        pytest.param(100, ["soak::"], id="soak"),
        pytest.param(150, ["meeting::"], id="late-ranks-and-first-sums-in-any-order"),
    ],
)
def test_simulators_job(runner, packed_nccl, limit, filters):
    """Threads as ranks of this GPU, on the real driver and the packed NCCL."""
    settings = {"FLASHCOMM_TEST_REAL": 1, "FLASHCOMM_TEST_NCCL": packed_nccl, "FLASHCOMM_TEST_SOAK_OPS": 2000}
    runner.run(sim(runner, *filters), limit, **settings)


@part("jobs")
@pytest.mark.parametrize("how", ["environment", "configuration"])
def test_conditional_nodes(runner, packed_nccl, how):
    """Captured into the body of an IF node, where graphs are not mixed."""
    job = [sys.executable, JOBS / "conditional_job.py", how]
    runner.run(job, 60, **SHARING_GPU, FLASHCOMM_NCCL_LIB=packed_nccl)


@part("example")
@pytest.mark.parametrize("exchange", ["peer", "host", "nccl"])
def test_cpp_example(runner, packed_nccl, exchange):
    settings = {"FLASHCOMM_NCCL_LIB": packed_nccl, "LD_LIBRARY_PATH": PACK, "FLASHCOMM_EXCHANGE": exchange}
    runner.run([PACK / "control", 2], 60, **SHARING_GPU, **settings, FLASHCOMM_MIN_BYTES=0)
