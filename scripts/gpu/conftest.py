"""How the checks of a GPU machine are selected, run and reported. The parts are the markers in pytest.ini.

`scripts/test_gpu.sh` starts this. Each check has one part, and a line with its seconds; each part has
a total at the end. OUT/run.json has all of it with commit, date, machine and command.
"""

import lzma
import os
import re
import shutil
import sys
import time

import pytest

import harness
from harness import PACK, Runner

BUDGET_S = float(os.environ.get("FLASHCOMM_TEST_BUDGET_S") or 0)
BEGUN = time.monotonic()


def markers(config):
    """What pytest.ini says of each marker, by name."""
    return dict(line.split(": ", 1) for line in config.getini("markers") if ": " in line)


def parts(config):
    """Names of the parts, in the order in which they run."""
    return [name for name, about in markers(config).items() if about.startswith("[part] ")]


def part_of(item, config):
    found = [part for part in parts(config) if item.get_closest_marker(part)]
    assert len(found) == 1, f"{item.nodeid} must have one part, has {found}"
    return found[0]


def pytest_configure(config):
    known = {*markers(config), "and", "or", "not"}
    for word in re.findall(r"[\w-]+", config.option.markexpr or ""):
        if word not in known:
            raise pytest.UsageError(f"no part is called {word!r}; there are: {' '.join(parts(config))}")


def pytest_collection_modifyitems(config, items):
    order = parts(config)
    for item in items:
        item.user_properties.append(("part", part_of(item, config)))
    items.sort(key=lambda item: order.index(part_of(item, config)))


def pytest_collection_finish(session):
    if session.config.option.collectonly:
        found = [part_of(item, session.config) for item in session.items]
        for part in parts(session.config):
            print(f"{part:12} {found.count(part):3} checks: {markers(session.config)[part].removeprefix('[part] ')}")


# Fixtures


@pytest.fixture(scope="session")
def n_gpus():
    """How many GPUs jobs see: a skip where there is none, a failure with FLASHCOMM_REQUIRE_GPU=1."""
    n = len(harness.gpu_names())
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        n = min(n, len([name for name in visible.split(",") if name.strip()]))
    if n == 0 and os.environ.get("FLASHCOMM_REQUIRE_GPU") == "1":
        pytest.fail("FLASHCOMM_REQUIRE_GPU is set and there is no GPU", pytrace=False)
    return n or pytest.skip("no GPU on this machine")


@pytest.fixture(scope="session")
def mps_session():
    mps = harness.Mps()
    yield mps
    mps.turn(False)


@pytest.fixture(autouse=True)
def on_a_gpu(n_gpus, mps_session, request):
    """Every check needs a GPU. MPS is on for those that are marked so, and off for all others."""
    mps_session.turn(request.node.get_closest_marker("mps") is not None)


@pytest.fixture(scope="session")
def out():
    """The folder of the results."""
    folder = harness.out_folder()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture
def runner(out, request):
    """Runs the jobs of a check, each with a limit."""
    log = out / "logs" / (re.sub(r"[^\w.-]+", "_", request.node.name).strip("_") + ".txt")
    log.unlink(missing_ok=True)
    return Runner(log, BEGUN + BUDGET_S if BUDGET_S else None)


@pytest.fixture(scope="session")
def packed_nccl():
    """The packed NCCL, which takes several ranks on a GPU; PyTorch's own is too old for that."""
    library, packed = PACK / "libnccl.so.2", PACK / "libnccl.so.2.xz"
    if not library.exists():
        if not packed.exists():
            pytest.fail("no NCCL in .gpu/: pack_gpu.sh says why it packed none", pytrace=False)
        part = library.with_suffix(".part")
        with lzma.open(packed) as compressed, open(part, "wb") as whole:
            shutil.copyfileobj(compressed, whole)
        part.rename(library)
    return library


# Reports


def pytest_report_teststatus(report):
    if report.passed and report.when == "call":
        return "passed", ".", f"ok, {report.duration:.1f} s"
    if report.failed:
        word = "FAILED" if report.when == "call" else "ERROR"
        return "failed" if report.when == "call" else "error", word[0], f"{word}, after {report.duration:.1f} s"
    return None


def pytest_terminal_summary(terminalreporter, config):
    terminal, seconds, checks = terminalreporter, {}, []
    for outcome in ["", "passed", "failed", "error", "skipped"]:  # "": of setting up and taking down
        for report in terminal.getreports(outcome):
            part = dict(report.user_properties)["part"]
            seconds[part] = seconds.get(part, 0) + report.duration
            if outcome:
                took = round(report.duration, 2)
                checks.append({"check": report.nodeid, "part": part, "outcome": outcome, "seconds": took})
            if outcome == "passed" and "measures" in report.keywords:
                terminal.section(report.nodeid, "-")
                terminal.write(report.capstdout)
    if not checks:
        return
    terminal.section("seconds of each part")
    for part in [part for part in parts(config) if part in seconds]:
        terminal.write_line(f"{part:12} {seconds[part]:7.1f} s")
    contents = {"run": harness.facts(sys.argv), "seconds": seconds, "checks": checks}
    harness.write(harness.out_folder() / "run.json", contents)
