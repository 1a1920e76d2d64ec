"""The harness of scripts/gpu, tried where there is no GPU: its checks can be collected, its promises hold.

The promises are tried on checks of this file's own, beside a copy of the harness and a stand-in for
nvidia-smi. scripts/test.sh runs it.
"""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
PARTS = """kernels sanitize torch-nccl torch-peer torch-host worlds soak settings lifecycle kill jobs example
           clients bench speed ttft gpus""".split()

CHECKS = """
import pytest

pytestmark = pytest.mark.kernels

def test_hangs(runner):
    runner.run(["sh", "-c", "setsid sleep 1000 & echo left $!; sleep 1000"], 1)

def test_fails(runner):
    runner.run(["sh", "-c", "echo the reason; exit 3"], 30)

def test_goes_on(runner):
    assert runner.run(["sh", "-c", "echo $FLASHCOMM_BITS"], 30, FLASHCOMM_BITS=4) == "4\\n"

def test_sees(runner, n_gpus):
    runner.run(["echo", "sees", n_gpus], 30)

@pytest.mark.measures
def test_measures(runner, out):
    write = 'echo measured; echo {} > "$1"'
    runner.measure(["sh", "-c", write], 30, out / "measured.json")
"""


def listed(*parts):
    command = [ROOT / "scripts/test_gpu.sh", "--list", *parts]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def test_every_part_has_checks():
    ended = listed()
    counts = dict(re.findall(r"^([\w-]+) +(\d+) checks: ", ended.stdout, re.MULTILINE))
    assert ended.returncode == 0 and list(counts) == PARTS, ended.stdout + ended.stderr
    checks = re.findall(r"^test_\w+\.py::", ended.stdout, re.MULTILINE)
    assert all(int(n) > 0 for n in counts.values()) and sum(map(int, counts.values())) == len(checks)


def test_parts_select_and_one_that_is_not_there_is_named():
    ended = listed("kill", "lifecycle")
    checks = re.findall(r"^test_\w+\.py::(\w+)", ended.stdout, re.MULTILINE)
    assert set(checks) == {"test_a_killed_rank", "test_communicators_of_every_making"}, ended.stdout
    refused = listed("kernels", "kernel")
    assert refused.returncode != 0 and "no part is called 'kernel'" in refused.stderr + refused.stdout


@pytest.fixture
def run(tmp_path):
    """Runs the checks above on a machine that has so many GPUs: its exit status and what it printed."""
    gpu, bin = tmp_path / "scripts/gpu", tmp_path / "bin"
    shutil.copytree(ROOT / "scripts/gpu", gpu, ignore=shutil.ignore_patterns("test_*", "jobs", "__pycache__"))
    (gpu / "test_promises.py").write_text(CHECKS)
    bin.mkdir()
    out = tmp_path / "out"

    def run(n_gpus, **env):
        smi = bin / "nvidia-smi"
        lines = "".join(f"echo 'GPU {i}: NVIDIA Stub (UUID: GPU-{i})'\n" for i in range(n_gpus))
        smi.write_text(f"#!/bin/sh\n{lines}")
        smi.chmod(0o755)
        env = {**os.environ, "PATH": f"{bin}:{os.environ['PATH']}", "OUT": str(out), **env}
        command = [sys.executable, "-m", "pytest", "-c", gpu / "pytest.ini", "-p", "no:cacheprovider", "-v", "-rs"]
        ended = subprocess.run(
            [*command, f"--junitxml={out}/junit.xml", gpu], capture_output=True, text=True, env=env, check=False
        )
        return ended.returncode, ended.stdout, out

    return run


def outcomes(out):
    """How each check ended, from the report."""
    ended = {}
    for case in xml.etree.ElementTree.parse(out / "junit.xml").iter("testcase"):
        found = {child.tag for child in case} & {"failure", "error", "skipped"}
        ended[case.get("name")] = found.pop() if found else "passed"
    return ended


def test_a_check_that_fails_or_hangs_reports_and_the_others_go_on(run):
    status, printed, out = run(2)
    expected = {"test_hangs": "failure", "test_fails": "failure"}
    expected |= dict.fromkeys(["test_goes_on", "test_sees", "test_measures"], "passed")
    assert (status, outcomes(out)) == (1, expected), printed
    assert "not done after 1 s" in printed and "the reason" in printed and "exit status 3" in printed
    assert re.search(r"test_goes_on ok, \d", printed) and re.search(r"test_fails FAILED, after \d", printed), printed
    assert re.search(r"^measured$", printed, re.MULTILINE) and re.search(r"^kernels +\d+\.\d s$", printed, re.MULTILINE)
    # Also what has left the process group.
    left = re.search(r"left (\d+)", (out / "logs/test_hangs.txt").read_text())[1]
    stat = pathlib.Path("/proc", left, "stat")
    assert not stat.exists() or stat.read_text().split()[2] == "Z", "a process outlives its job"
    for name in ["run.json", "measured.json"]:
        facts = json.loads((out / name).read_text())["run"]
        assert facts["machine"] == ["NVIDIA Stub"] * 2 and facts["command"] and facts["date"] and facts["commit"]


@pytest.mark.parametrize("visible, seen", [("1,3", 2), ("", None)])
def test_only_the_gpus_that_jobs_see_count(run, visible, seen):
    status, printed, out = run(4, CUDA_VISIBLE_DEVICES=visible, FLASHCOMM_TEST_BUDGET_S="20", FLASHCOMM_REQUIRE_GPU="0")
    assert outcomes(out)["test_sees"] == ("passed" if seen else "skipped"), printed
    assert seen is None or (out / "logs/test_sees.txt").read_text().endswith(f"\nsees {seen}\n")


def test_without_a_gpu_checks_are_skipped_or_where_one_is_required_fail(run):
    status, printed, out = run(0, FLASHCOMM_REQUIRE_GPU="0")
    assert (status, set(outcomes(out).values())) == (0, {"skipped"}) and "no GPU on this machine" in printed, printed
    status, printed, out = run(0, FLASHCOMM_REQUIRE_GPU="1")
    assert (status, set(outcomes(out).values())) == (1, {"error"}) and "there is no GPU" in printed, printed


def test_what_the_time_does_not_suffice_for_fails(run):
    status, printed, out = run(1, FLASHCOMM_TEST_BUDGET_S="0.1")
    assert (status, set(outcomes(out).values())) == (1, {"failure"}), printed
    assert printed.count("not run: FLASHCOMM_TEST_BUDGET_S is spent") >= 4, printed
