"""A GPU for each rank, as users have it, on a machine with 2, 4 or 8 of them.

A world is `all` of the GPUs, or `fewer`: one less, where that leaves two. The most important checks come
first, so that a run that is cut short has them.
"""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

import never_slower
from harness import FLASHCOMM, JOBS, PACK, need_program, scratch
from jobs import expected

pytestmark = pytest.mark.gpus
HOST_ONLY = {"NCCL_P2P_DISABLE": 1}  # as where GPUs cannot reach each other's memory


@pytest.fixture
def several(n_gpus):
    """How many GPUs there are, of at least two."""
    return n_gpus if n_gpus > 1 else pytest.skip("a GPU for each rank: there is only one")


def fewer_than(several):
    return several - 1 if several > 2 else pytest.skip("two GPUs are the smallest world")


def torchrun(runner, ranks, bits, exchange, program, *arguments, min_bytes=0, limit_s=150, **settings):
    """A PyTorch job as users start it."""
    run = [FLASHCOMM, "run", "--quiet", "--engine", "torch", "--bits", bits, "--exchange", exchange, "--min-bytes", min_bytes]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks]
    with scratch() as folder:
        command = [*run, "--", *torchrun, JOBS / program, *arguments]
        runner.run(command, limit_s, FLASHCOMM_SCRATCH=folder, **settings)


def bench(runner, nccl, to, worlds, *options, **settings):
    """All-reduces beside NCCL."""
    command = [FLASHCOMM, "bench", "--nccl-lib", nccl, "--worlds", worlds, *options, "--rounds", 1, "--batches", 7]
    runner.measure(command, 100, to, **settings)


@pytest.mark.measures
def test_doctor(runner, several):
    runner.run([need_program("nvidia-smi"), "topo", "-m"], 60)
    runner.run([FLASHCOMM, "doctor"], 100)


@pytest.mark.parametrize("exchange", ["auto", "host"])
def test_torch_job(runner, several, exchange):
    torchrun(runner, several, 4, exchange, "torch_job.py")


@pytest.mark.parametrize("bits", [8, 4])
def test_jax(runner, several, bits):
    """XLA opens NCCL by its name, which libflashcomm_soname.so answers."""
    if not any(importlib.util.find_spec(name) for name in ["jax_cuda13_plugin", "jax_cuda12_plugin"]):
        pytest.skip("no JAX for CUDA on this machine")
    with scratch() as folder:
        run = [FLASHCOMM, "run", "--bits", bits, "--stats-file", folder / "stats.%p.json", "--"]
        settings = {"FLASHCOMM_SCRATCH": folder, "FLASHCOMM_BITS": bits, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        runner.run([*run, sys.executable, JOBS / "jax_job.py", several], 150, **settings)
        expected.check_devices(folder)


def test_groups_with_other_calls(runner, packed_nccl, several):
    """Each rank's streams in queues of their own. Where ranks share a GPU, they would wait for each other there."""
    settings = {"FLASHCOMM_TEST_REAL": 1, "FLASHCOMM_TEST_NCCL": packed_nccl, "CUDA_VISIBLE_DEVICES": "0,1"}
    jobs = ["aside::one_rank", "aside::what_follows", "aside::groups_of_both"]
    runner.run([PACK / "sim", "--test-threads", 1, *jobs], 100, **settings)


@pytest.mark.measures
@pytest.mark.parametrize("exchange", ["auto", "host"])
def test_memory(runner, packed_nccl, several, exchange):
    """Of communicators, used and unused, and after the last one."""
    settings = {"FLASHCOMM_NCCL_LIB": packed_nccl, "FLASHCOMM_EXCHANGE": exchange, "FLASHCOMM_LOG": "info"}
    with scratch() as folder:
        runner.run([sys.executable, JOBS / "memory_job.py"], 100, **settings, FLASHCOMM_SCRATCH=folder)


def test_checkpoint(runner, packed_nccl, several):
    """The driver's, between two communicators, where plain NCCL comes through it."""
    with scratch() as folder:
        settings = {"FLASHCOMM_NCCL_LIB": packed_nccl, "FLASHCOMM_SCRATCH": folder}
        output = runner.run([sys.executable, JOBS / "checkpoint_job.py"], 150, **settings)
    if "CANNOT" in output:
        pytest.skip(output.splitlines()[-1])


@pytest.mark.parametrize("exchange", ["auto", "host"])
@pytest.mark.parametrize("bits", ["4", "4:8"])
def test_random_operations(runner, several, bits, exchange):
    """Exact and compressed ones mixed. Between two GPUs 4 bits go in one hop, 4:8 in two."""
    n_operations = int(os.environ.get("FLASHCOMM_TEST_SOAK_OPS", "20000"))
    limit_s = 150 + n_operations // 1000
    torchrun(runner, several, bits, exchange, "soak_job.py", n_operations, min_bytes=64 << 10, limit_s=limit_s)


@pytest.mark.parametrize("setting, exchange", [("FLASHCOMM_P2P_READ", "auto"), ("FLASHCOMM_HOST_COPY", "host")])
def test_random_operations_carried_otherwise(runner, several, setting, exchange):
    """Payloads that peers read, and payloads that copy engines carry: the same bits."""
    torchrun(runner, several, "4:8", exchange, "soak_job.py", 20000, min_bytes=64 << 10, **{setting: 1})


def test_green_contexts(runner, packed_nccl, several):
    """Where a rank's stream has not got its whole GPU."""
    runner.run([sys.executable, JOBS / "green_job.py"], 150, FLASHCOMM_NCCL_LIB=packed_nccl)


@pytest.mark.measures
@pytest.mark.parametrize("ranks_are", ["threads", "processes"])
def test_beside_nccl(runner, packed_nccl, out, several, ranks_are):
    how = ["--processes"] if ranks_are == "processes" else []
    options = ["--exchanges", "peer", "--sizes", "1M,4M,16M,64M", *how]
    bench(runner, packed_nccl, out / f"gpus{''.join(how)}.json", several, *options)


@pytest.mark.measures
@pytest.mark.parametrize("exchange", ["peer", "host"])
def test_exact_sums_beside_nccl(runner, packed_nccl, out, several, exchange):
    """Small ones in one hop. Over host memory NCCL goes there, too."""
    options = ["--exchanges", exchange, "--bits", "exact", "--sizes", "256..2M", "--graph"]
    settings = HOST_ONLY if exchange == "host" else {}
    bench(runner, packed_nccl, out / f"gpus-exact-{exchange}.json", several, *options, **settings)


@pytest.mark.measures
def test_over_host_memory_beside_nccl(runner, packed_nccl, out, several):
    """NCCL goes over shared memory of the host, too."""
    options = ["--exchanges", "host", "--bits", "8,4,4-plain,16", "--sizes", "256K,1M,4M,16M,64M"]
    bench(runner, packed_nccl, out / "gpus-host.json", several, *options, **HOST_ONLY)


@pytest.mark.measures
@pytest.mark.parametrize("tune", ["off", "always"])
@pytest.mark.parametrize("exchange", ["peer", "host"])
def test_never_slower_than_nccl(runner, packed_nccl, out, several, exchange, tune):
    """The shim finds the exchange itself, and with `always` the ways. Over host memory NCCL goes
    there, too.
    """
    worlds = ",".join(str(n) for n in sorted({2, several}))
    settings = {**(HOST_ONLY if exchange == "host" else {}), "FLASHCOMM_TUNE": tune, "FLASHCOMM_LOG": "info"}
    with scratch() as cache:
        to = out / f"gpus-never-slower-{exchange}-{tune}.json"
        never_slower.check(runner, packed_nccl, to, worlds, XDG_CACHE_HOME=cache, **settings)


def test_what_becomes_slow_is_told(runner, several):
    """By the rank that waits, of the sums for which it does, and of no others."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]
    with scratch() as folder:
        run = [FLASHCOMM, "run", "--engine", "torch", "--tune", "always", "--stats-file", folder / "stats.%r.json", "--"]
        output = runner.run([*run, *torchrun, JOBS / "watch_job.py"], 150, XDG_CACHE_HOME=folder)
        found = [json.loads((folder / f"stats.{rank}.json").read_text()) for rank in range(2)]
    slow = [[each for comm in rank["communicators"] for each in comm["slower_than_measured"]] for rank in found]
    assert [each["bytes"] for each in slow[0]] == [64 << 10] and slow[1] == [], slow
    assert slow[0][0]["us"] > 1000 > slow[0][0]["measured_us"], slow
    assert output.count("for a minute exact sums of 65536 bytes and more have taken") == 1, output


@pytest.mark.measures
@pytest.mark.parametrize("exchange", ["peer", "host"])
def test_what_measuring_costs_a_start(runner, packed_nccl, out, several, exchange):
    settings = HOST_ONLY if exchange == "host" else {}
    with scratch() as folder:
        settings = {**settings, "FLASHCOMM_NCCL_LIB": packed_nccl, "FLASHCOMM_SCRATCH": folder}
        command = [sys.executable, JOBS / "attach_job.py"]
        runner.measure(command, 200, out / f"gpus-attach-{exchange}.json", **settings)


@pytest.mark.measures
@pytest.mark.parametrize("exchange", ["peer", "host"])
def test_cost_of_a_call(runner, packed_nccl, out, several, exchange):
    """CPU time of the calling thread, beside NCCL's."""
    settings = HOST_ONLY if exchange == "host" else {}
    with scratch() as folder:
        settings = {**settings, "FLASHCOMM_NCCL_LIB": packed_nccl, "FLASHCOMM_SCRATCH": folder}
        command = [sys.executable, JOBS / "host_cost_job.py"]
        runner.measure(command, 100, out / f"gpus-host-cost-{exchange}.json", **settings)


@pytest.mark.measures
def test_beside_vllms_own_all_reduce(runner, packed_nccl, out, several):
    imported = subprocess.run([sys.executable, "-c", "import vllm"], capture_output=True, text=True, check=False)
    if imported.returncode != 0:
        pytest.skip(f"import vllm: {(imported.stderr.splitlines() or ['no reason given'])[-1]}")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]
    settings = {"FLASHCOMM_NCCL_LIB": packed_nccl, "GLOO_SOCKET_IFNAME": "lo"}
    command = [*torchrun, JOBS / "custom_all_reduce.py"]
    runner.measure(command, 200, out / "gpus-custom-all-reduce.json", **settings)


@pytest.mark.measures
@pytest.mark.parametrize("exchange", ["auto", "host"])
def test_time_to_first_token(runner, out, several, exchange):
    pytest.importorskip("transformers")
    command = [sys.executable, JOBS / "ttft.py", "--ranks", several, "--bits", "8,4", "--gpu-each"]
    settings = {}
    if exchange == "host":
        command, settings = [*command, "--exchange", "host"], HOST_ONLY
    runner.measure(command, 300, out / f"gpus-ttft-{exchange}.json", **settings)


@pytest.mark.measures
@pytest.mark.parametrize("exchange", ["auto", "host"])
def test_time_per_token(runner, out, several, exchange):
    """Of a decode step in a graph, as served models have it: small sums."""
    pytest.importorskip("transformers")
    command = [sys.executable, JOBS / "decode.py", "--ranks", several, "--exchange", exchange]
    settings = HOST_ONLY if exchange == "host" else {}
    runner.measure(command, 200, out / f"gpus-decode-{exchange}.json", **settings)


def test_torch_job_of_fewer(runner, several):
    torchrun(runner, fewer_than(several), 4, "auto", "torch_job.py")


def test_random_operations_of_fewer(runner, several):
    torchrun(runner, fewer_than(several), "4:8", "auto", "soak_job.py", 5000)


@pytest.mark.measures
@pytest.mark.parametrize("ranks_are", ["threads", "processes"])
def test_fewer_beside_nccl(runner, packed_nccl, out, several, ranks_are):
    how = ["--processes"] if ranks_are == "processes" else []
    options = ["--exchanges", "peer", "--sizes", "1M,16M", *how]
    bench(runner, packed_nccl, out / f"gpus-fewer{''.join(how)}.json", fewer_than(several), *options)
