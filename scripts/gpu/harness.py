"""Jobs with a time limit, and what the checks of a GPU machine have in common.

A check is a pytest function; a job is a command that it runs. `Runner.run` gives a job a log file, an
environment and a limit in seconds. A job that fails or takes longer fails its check, and its output is
shown. Nothing of a job outlives it: every process inherits a tag in its environment, and what still
carries the tag at the end is killed. A process group would not do, since torchrun's workers leave it.
"""

import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from contextlib import contextmanager
from datetime import datetime, timezone

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
PACK = ROOT / ".gpu"  # made by scripts/pack_gpu.sh
JOBS = ROOT / "scripts/gpu/jobs"
SHIM = PACK / "libflashcomm.so"
FLASHCOMM = PACK / "flashcomm"
# Nothing is measured where nobody says so: what goes which way is then the same everywhere.
BASE = {
    "FLASHCOMM_LIB": SHIM,
    "FLASHCOMM_REFERENCE": PACK / "reference",
    "FLASHCOMM_TUNE": os.environ.get("FLASHCOMM_TUNE", "off"),
}

# What NCCL and the driver need where threads of one process are ranks that share a GPU
# (docs/troubleshooting.md).
SHARING_GPU = {
    "NCCL_MULTI_RANK_GPU_ENABLE": 1,
    "NCCL_MAX_CTAS": 8,
    "NCCL_SET_STACK_SIZE": 1,
    "CUDA_DEVICE_MAX_CONNECTIONS": 32,
    "CUDA_MODULE_LOADING": "EAGER",
}

TAG = "FLASHCOMM_TEST_JOB"
GRACE_S = 3  # from the request to end to the kill
SHOWN_LINES = 100  # of the output of a job that failed; the log has all of it


def out_folder():
    """Where results go: OUT, or .gpu/results."""
    return pathlib.Path(os.environ.get("OUT") or PACK / "results").resolve()


def part(name):
    """The marker of a part. Some names have a hyphen."""
    return getattr(pytest.mark, name)


def launch(ranks, seconds, program, *arguments):
    """The command that runs a program as ranks of one GPU. It ends them itself, a little before the limit."""
    return [sys.executable, JOBS / "launch.py", ranks, seconds, JOBS / program, *arguments]


@contextmanager
def scratch():
    """A folder in memory where the ranks of a job leave files for each other."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield pathlib.Path(folder)


def need_program(name):
    """The path of a program, or a skip."""
    return shutil.which(name) or pytest.skip(f"no {name} on this machine")


def processes_with(tag):
    """Ids of the processes whose environment holds the tag."""
    for environ in pathlib.Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"{TAG}={tag}\0".encode() in environ.read_bytes():
                yield int(environ.parent.name)
        except OSError:
            pass  # it ended, or is not ours


def end(job, tag):
    """Ends a job: a request to its process group, then a kill of all that is left."""
    if job.poll() is None:
        os.killpg(job.pid, signal.SIGTERM)
        try:
            job.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            pass
    give_up = time.monotonic() + GRACE_S  # a process may be stuck in the driver
    while (left := list(processes_with(tag))) and time.monotonic() < give_up:
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        job.poll()
        time.sleep(0.01)


class Runner:
    """Runs the jobs of one check. `deadline` is when the whole session has to be over, if it has to."""

    def __init__(self, log, deadline=None):
        self.log, self.deadline = log, deadline

    def limit(self, seconds):
        if self.deadline is None:
            return seconds
        left = self.deadline - GRACE_S - time.monotonic()
        if left < 1:
            pytest.fail("not run: FLASHCOMM_TEST_BUDGET_S is spent", pytrace=False)
        return min(seconds, left)

    def run(self, command, limit, **settings):
        """Runs a command to its end. Its output goes to the log and, captured, to the check's report."""
        limit, tag = self.limit(limit), uuid.uuid4().hex
        command = [str(word) for word in command]
        settings = {name: str(value) for name, value in {**BASE, **settings, TAG: tag}.items()}
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with open(self.log, "ab") as log:
            log.write(f"$ {' '.join(command)}\n".encode())
            log.flush()
            start = log.tell()
            job = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**os.environ, **settings},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
            try:
                status = job.wait(limit)
            except subprocess.TimeoutExpired:
                status = f"not done after {limit:.0f} s"
            finally:
                end(job, tag)
        with open(self.log, "rb") as log:
            log.seek(start)
            output = log.read().decode(errors="replace")
        if status == 0:
            print(output, end="")
            return output
        print(f"$ {' '.join(command)}", *output.splitlines()[-SHOWN_LINES:], sep="\n")
        what = f"exit status {status}" if isinstance(status, int) else status
        pytest.fail(f"{pathlib.Path(command[0]).name}: {what}; all of its output is in {self.log}", pytrace=False)

    def measure(self, command, limit, to, **settings):
        """Runs a command that writes its results with --json. They get the facts of this run."""
        to.unlink(missing_ok=True)
        self.run([*command, "--json", to], limit, **settings)
        write(to, dict(json.loads(to.read_text()), run=facts(command)))


def write(path, contents):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(contents, indent=1) + "\n")


def gpu_names():
    """What nvidia-smi calls the GPUs here; none where there is no nvidia-smi."""
    if not shutil.which("nvidia-smi"):
        return []
    listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=False).stdout
    return re.findall(r"^GPU \d+: (.*?)(?: \(UUID.*)?$", listed, re.MULTILINE)


def facts(command):
    """Commit, date, machine and command, which every result carries."""
    commit = PACK / "commit"
    return {
        "commit": commit.read_text().strip() if commit.exists() else "unknown",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": gpu_names(),
        "command": [str(word) for word in command],
    }


class Mps:
    """MPS, with which the processes of a GPU run at the same time.

    Without it they take turns: what waits for another rank then waits for a time slice.
    """

    folders = {"CUDA_MPS_PIPE_DIRECTORY": "/tmp/mps", "CUDA_MPS_LOG_DIRECTORY": "/tmp/mpslog"}
    is_on = False

    def turn(self, on):
        """Checks of both kinds may follow each other in any order."""
        if on == self.is_on:
            return
        if on:
            control = need_program("nvidia-cuda-mps-control")
            for folder in self.folders.values():
                os.makedirs(folder, exist_ok=True)
            os.environ.update(self.folders)
            self.is_on = True
            subprocess.run([control, "-d"], check=True, timeout=30)
            return
        self.is_on = False
        subprocess.run(["nvidia-cuda-mps-control"], input=b"quit\n", check=False, timeout=60)
        for name in self.folders:
            del os.environ[name]
