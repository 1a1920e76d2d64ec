"""Runs a program as N ranks on one GPU, each believing that it is on a host of its own.

usage: launch.py N SECONDS PROGRAM [ARGUMENT...]

Ends all ranks when one fails or the time is up, and fails then. When the time is up each rank says where it is.
"""

import os
import random
import signal
import socket
import subprocess
import sys
import time


def free_port():
    """A port that nobody listens on, below those that the system gives to connections: one of these could be taken
    before rank 0 listens on it."""
    while True:
        port = random.randrange(10_000, 30_000)
        with socket.socket() as unused:
            try:
                unused.bind(("127.0.0.1", port))
                return port
            except OSError:
                pass  # in use


def main():
    n, seconds, command = int(sys.argv[1]), float(sys.argv[2]), sys.argv[3:]
    port = free_port()
    ranks = []
    for rank in range(n):
        env = dict(os.environ, RANK=str(rank), WORLD_SIZE=str(n), LOCAL_RANK="0", MASTER_ADDR="127.0.0.1")
        env.update(MASTER_PORT=str(port), NCCL_HOSTID=f"host{rank}", NCCL_SOCKET_IFNAME="lo", GLOO_SOCKET_IFNAME="lo")
        ranks.append(subprocess.Popen([sys.executable, "-X", "faulthandler", *command], env=env))
    deadline = time.monotonic() + seconds
    while any(rank.poll() is None for rank in ranks):
        failed = [r for r, rank in enumerate(ranks) if rank.poll() not in (None, 0)]
        if failed or time.monotonic() > deadline:
            if not failed:
                for rank in ranks:
                    rank.send_signal(signal.SIGABRT)
                time.sleep(1)
            for rank in ranks:
                rank.kill()
            sys.exit(f"rank {failed[0]} failed" if failed else f"not done after {seconds:.0f} s")
        time.sleep(0.05)
    if any(rank.returncode for rank in ranks):
        sys.exit("a rank failed")


if __name__ == "__main__":
    main()
