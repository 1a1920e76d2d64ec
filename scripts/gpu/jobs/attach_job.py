"""What measuring costs a start: how long the creation of a communicator takes with FLASHCOMM_TUNE.

Two processes with a GPU each make a communicator of the real NCCL, so that all of that is loaded and
connected to the network, and then one through the shim, whose creation is timed. Each case is a
start of its own: without measuring, with it, with an empty cache and with a full one; three rounds.

Needs FLASHCOMM_LIB (the shim), FLASHCOMM_NCCL_LIB (a real NCCL), FLASHCOMM_SCRATCH. --json FILE: the
results. Exits with an assertion where measuring takes more than 0.5 s, or a full cache more than 20 ms.
"""

import ctypes
import json
import os
import pathlib
import statistics
import subprocess
import sys

import nccl_calls

WORLD = 2
ROUNDS = 3
CASES = {"off": "off", "always": "always", "cache, empty": "cache", "cache, full": "cache"}
FILLING = 2  # starts more that measure before a cache is full
MOST_MS = {"always": 500, "cache, empty": 500, "cache, full": 20}


def rank(number, job):
    """Milliseconds of the creation through the shim."""
    me = nccl_calls.Rank(job, number, WORLD, 1 << 20)
    nccl, shim = (ctypes.CDLL(os.environ[name]) for name in ["FLASHCOMM_NCCL_LIB", "FLASHCOMM_LIB"])
    me.create(nccl, "nccl")
    _, took = me.create(shim, "shim")
    me.meet("end")
    return took


def start(job, tune, cache):
    """The same of a pair of processes: the slower one's."""
    settings = {**os.environ, "FLASHCOMM_TUNE": tune, "XDG_CACHE_HOME": str(cache)}
    command = [sys.executable, __file__, "rank"]
    ranks = [
        subprocess.Popen([*command, str(number), job], stdout=subprocess.PIPE, text=True, env=settings)
        for number in range(WORLD)
    ]
    told = [process.communicate(timeout=60)[0] for process in ranks]
    assert not any(process.returncode for process in ranks), "a rank failed"
    return max(float(out.splitlines()[-1]) for out in told)


def main():
    if sys.argv[1] == "rank":
        print(rank(int(sys.argv[2]), sys.argv[3]))
        return
    assert sys.argv[1] == "--json"
    took = {case: [] for case in CASES}
    for number in range(ROUNDS):
        cache = pathlib.Path(os.environ["FLASHCOMM_SCRATCH"]) / f"cache{number}"
        for case, tune in CASES.items():
            own = cache / "always" if case == "always" else cache
            for more in range(FILLING if case == "cache, full" else 0):
                start(f"attach{number}-filling{more}", tune, own)
            took[case].append(start(f"attach{number}-{case.replace(', ', '-')}", tune, own))
    medians = {case: statistics.median(all_ms) for case, all_ms in took.items()}
    more = {case: ms - medians["off"] for case, ms in medians.items()}
    for case, ms in medians.items():
        print(f"FLASHCOMM_TUNE={case:14} {ms:8.1f} ms, {more[case]:+8.1f}", flush=True)
    with open(sys.argv[2], "w") as to:
        json.dump({"milliseconds": took, "medians": medians}, to)
    above = [case for case, most in MOST_MS.items() if more[case] > most]
    assert not above, f"a start takes too much longer: {above}"


if __name__ == "__main__":
    main()
