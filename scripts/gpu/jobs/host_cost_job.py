"""What an all-reduce costs its caller, beside the real NCCL: CPU time of the calling thread.

Two processes with a GPU each. Both libraries are open in each of them and take turns, span by span.
A span is 100 calls, fewer than a stream holds, and the stream is waited for between spans. Python's
own part of a call, that of a function which does nothing with the same arguments, is taken off.

Needs FLASHCOMM_LIB (the shim), FLASHCOMM_NCCL_LIB (a real NCCL), FLASHCOMM_SCRATCH. --json FILE: the
results. Exits with an assertion where the shim did something else than the case says, or where it
takes more than NCCL by a twentieth and 0.2 us.
"""

import ctypes
import functools
import json
import os
import statistics
import subprocess
import sys
import time

import nccl_calls
from nccl_calls import FLOAT16, FLOAT32, INT32, SUM, stats

WORLD = 2
CALLS = 100  # of a span
SPANS = 20  # of a case, after one that warms up
# What the shim does by default: element type and count.
CASES = {
    "exact, 8 KiB": ("exact", FLOAT16, 4 << 10),
    "exact, 256 KiB": ("exact", FLOAT16, 128 << 10),
    "compressed, 4 MiB": ("compressed", FLOAT16, 2 << 20),
    "forwarded by its type, 8 KiB": ("forwarded", INT32, 2 << 10),
    "forwarded by its size, 32 MiB": ("forwarded", FLOAT32, 8 << 20),
}
MOST_BYTES = 32 << 20


class Rank(nccl_calls.Rank):
    def __init__(self, rank):
        super().__init__("cost", rank, WORLD, 2 * MOST_BYTES)
        self.shim = ctypes.CDLL(os.environ["FLASHCOMM_LIB"])
        nccl = ctypes.CDLL(os.environ["FLASHCOMM_NCCL_LIB"])
        self.functions = {"nccl": nccl.ncclAllReduce, "shim": self.shim.ncclAllReduce}
        self.comms = {"nccl": self.create(nccl, "nccl")[0], "shim": self.create(self.shim, "shim")[0]}
        self.nothing = ctypes.CDLL(None).abs  # it takes one argument and does not see the others

    def call(self, function, comm, datatype, count):
        """A call whose arguments are made once."""
        output = ctypes.c_uint64(self.memory.value + MOST_BYTES)
        arguments = [self.memory, output, ctypes.c_size_t(count), ctypes.c_int(datatype), ctypes.c_int(SUM)]
        return functools.partial(function, *arguments, comm, self.stream)

    def span(self, call):
        """Microseconds of CPU time of each call."""
        failed = 0
        start = time.thread_time_ns()
        for _ in range(CALLS):
            failed |= call()
        took = time.thread_time_ns() - start
        self.wait()
        return took / CALLS / 1000, failed

    def cost(self, datatype, count):
        """Of each library the microseconds of CPU time of a call, and what the shim counted."""
        calls = {name: self.call(function, self.comms[name], datatype, count) for name, function in self.functions.items()}
        spans = {name: [] for name in calls}
        before = stats(self.shim)
        for _ in range(1 + SPANS):
            for name, call in calls.items():
                us, failed = self.span(call)
                assert not failed, f"ncclAllReduce of {name} answers {failed}"
                spans[name].append(us)
        after = stats(self.shim)
        nothing = self.call(self.nothing, self.comms["nccl"], datatype, count)
        python_us = statistics.median(self.span(nothing)[0] for _ in range(SPANS))
        us = {name: statistics.median(spans[name][1:]) - python_us for name in calls}
        routes = ["exact", "compressed", "forwarded"]
        counted = {route: getattr(after, route) - getattr(before, route) for route in routes}
        return {**us, "python": python_us, "counted": counted}

    def run(self):
        costs = {}
        for name, (_, datatype, count) in CASES.items():
            self.meet(name.replace(" ", "-"))
            costs[name] = self.cost(datatype, count)
        self.meet("end")
        return costs


def compare(told):
    """The two ranks' answers in one table: of both, the one that took longer."""
    rows = []
    for name, (route, *_) in CASES.items():
        for rank in told:
            expected = {**dict.fromkeys(["exact", "compressed", "forwarded"], 0), route: (1 + SPANS) * CALLS}
            assert rank[name]["counted"] == expected, f"{name}: the shim counted {rank[name]['counted']}"
        nccl_us, shim_us, python_us = (max(rank[name][of] for rank in told) for of in ["nccl", "shim", "python"])
        rows.append({"case": name, "nccl_us": nccl_us, "shim_us": shim_us, "python_us": python_us})
        print(f"{name:30} NCCL {nccl_us:6.2f} us  shim {shim_us:6.2f} us  {shim_us / nccl_us:5.2f}", flush=True)
    return rows


def main():
    if sys.argv[1] == "rank":
        print(json.dumps(Rank(int(sys.argv[2])).run()))
        return
    assert sys.argv[1] == "--json"
    command = [sys.executable, __file__, "rank"]
    ranks = [subprocess.Popen([*command, str(rank)], stdout=subprocess.PIPE, text=True) for rank in range(WORLD)]
    told = [rank.communicate(timeout=90)[0] for rank in ranks]
    assert not any(rank.returncode for rank in ranks), "a rank failed"
    print("CPU time of the calling thread for each all-reduce, the slower rank's median, and its ratio to NCCL's")
    rows = compare([json.loads(out.splitlines()[-1]) for out in told])
    with open(sys.argv[2], "w") as to:
        json.dump({"rows": rows}, to)
    above = [row["case"] for row in rows if row["shim_us"] > 1.05 * row["nccl_us"] + 0.2]
    assert not above, f"more than NCCL takes: {above}"


if __name__ == "__main__":
    main()
