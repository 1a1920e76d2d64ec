"""Speed beside plain NCCL of the same run, with ranks that share one GPU."""

import itertools
import json
import statistics
import sys

import pytest

import harness
import never_slower
from harness import FLASHCOMM, JOBS, launch
from test_torch import SLACK_S, torch_job

pytestmark = pytest.mark.measures
ROUNDS = [1, 2, 3]
# By number of ranks on a GPU, a cap of NCCL's blocks that is about its best. It is the same for NCCL
# alone and for what the shim forwards, so that they differ by the shim only.
NCCL_CTAS = {2: 32, 3: 24, 4: 24, 8: 12}


@pytest.mark.bench
def test_all_reduces_beside_nccl(runner, packed_nccl, out):
    """Threads as ranks, the shim beside NCCL, and the kernels alone."""
    command = [FLASHCOMM, "bench", "--nccl-lib", packed_nccl, "--graph", "--crossover", "--kernels"]
    runner.measure(command, 400, out / "bench.json")


@pytest.mark.bench
@pytest.mark.parametrize("tune", ["off", "always"])
@pytest.mark.parametrize("ranks", NCCL_CTAS)
def test_never_slower_than_nccl(runner, packed_nccl, out, ranks, tune):
    to, options = out / f"never-slower-{ranks}-{tune}.json", ["--nccl-ctas", NCCL_CTAS[ranks]]
    with harness.scratch() as cache:
        settings = {"FLASHCOMM_TUNE": tune, "XDG_CACHE_HOME": cache}
        never_slower.check(runner, packed_nccl, to, ranks, *options, CUDA_VISIBLE_DEVICES=0, **settings)


def result(out, under, kind, number):
    return out / under / f"speed_{kind}_{number}.json"


def in_turn():
    """Plain and at 4 and 8 bits, three times in turn, without MPS and with it.

    On two hosts the ranks run at the same time, as they do here under MPS only.
    """
    for under, number, kind in itertools.product(["", "mps"], ROUNDS, ["plain", "4", "8"]):
        name = f"{under or 'no-mps'}-{number}-{kind}"
        yield pytest.param(under, number, kind, marks=[pytest.mark.mps] * bool(under), id=name)


@pytest.mark.speed
@pytest.mark.parametrize("under, number, kind", list(in_turn()))
def test_torch_over_sockets(runner, out, under, number, kind):
    to = result(out, under, kind, number)
    to.parent.mkdir(parents=True, exist_ok=True)
    to.unlink(missing_ok=True)
    if kind == "plain":
        runner.run(launch(2, 100, "torch_speed.py", to), 100 + SLACK_S)
    else:
        torch_job(runner, 2, kind, "nccl", "torch_speed.py", to)


@pytest.mark.speed
@pytest.mark.parametrize("under", [pytest.param("", id="no-mps"), "mps"])
def test_medians_over_sockets(out, under):
    """Of the three rounds above."""
    files = [[result(out, under, kind, number) for number in ROUNDS] for kind in ["plain", "4", "8"]]
    plain, four, eight = [[json.loads(file.read_text()) for file in kind] for kind in files]
    print("2 ranks over NCCL's sockets, fp16,", under or "without MPS", "(medians of three runs; the ratios of each behind)")
    print("  MiB  plain ms  4 bits ms         8 bits ms")
    for mib in plain[0]:
        p, a, b = ([run[mib] for run in kind] for kind in (plain, four, eight))
        P, A, B = map(statistics.median, (p, a, b))
        each = "  ".join(f"{x / y:.2f} {x / z:.2f}" for x, y, z in zip(p, a, b))
        print(f"{mib:>5} {P:9.3f} {A:9.3f} {P / A:5.2f}x {B:9.3f} {P / B:5.2f}x    {each}")
    results = {"run": harness.facts(sys.argv), "plain": plain, "4": four, "8": eight}
    harness.write(out / under / "speed.json", results)


@pytest.mark.ttft
@pytest.mark.mps
def test_time_to_first_token(runner, out):
    """Under MPS the ranks run at the same time, as on two hosts."""
    pytest.importorskip("transformers")
    runner.measure([sys.executable, JOBS / "ttft.py"], 580, out / "ttft.json")
