"""Bad settings in a PyTorch job: the job goes on over plain NCCL, and the log says what is wrong.

usage: settings_job.py            starts the jobs and checks what they say
       (started by itself with RANK set: one rank)
"""

import os
import socket
import subprocess
import sys
import time

SHIM = os.environ["FLASHCOMM_LIB"]


def rank():
    import torch
    import torch.distributed as dist

    torch.cuda.set_device(0)
    dist.init_process_group("nccl")
    for _ in range(2):
        x = torch.full((100_000,), 1.0 + dist.get_rank(), device="cuda", dtype=torch.float16)
        dist.all_reduce(x)
        torch.cuda.synchronize()
        assert (x == 3).all()
    dist.destroy_process_group()


def job(settings, extra=None):
    """Exit codes and the outputs of two ranks with settings[r] each."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = str(unused.getsockname()[1])
    ranks = []
    for r in range(2):
        env = dict(os.environ, RANK=str(r), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        env.update(NCCL_HOSTID=f"host{r}", NCCL_SOCKET_IFNAME="lo", FLASHCOMM_MIN_BYTES="0", LD_PRELOAD=SHIM)
        env.update(settings[r])
        ranks.append(
            subprocess.Popen([sys.executable, __file__], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        )
    outputs, codes = [], []
    for process in ranks:
        try:
            outputs.append(process.communicate(timeout=60)[0].decode())
            codes.append(process.returncode)
        except subprocess.TimeoutExpired:
            for other in ranks:
                other.kill()
            outputs.append(process.communicate()[0].decode())
            codes.append("timeout")
        if codes[-1] != 0:
            for other in ranks:
                other.kill()
    return codes, outputs


def lines(output):
    return [line for line in output.splitlines() if line.startswith("flashcomm")]


def main():
    codes, outputs = job([{"FLASHCOMM_BITS": "4"}, {"FLASHCOMM_BITS": "8"}])
    said = lines("".join(outputs))
    assert codes == [0, 0], (codes, outputs)
    assert len(said) == 1 and "rank 1 has FLASHCOMM_BITS=8" in said[0], said
    print("settings that differ:", said[0])

    codes, outputs = job([{"FLASHCOMM_BITS": "eleven"}, {"FLASHCOMM_BITS": "eleven"}])
    said = lines(outputs[0])
    assert codes == [0, 0] and any("FLASHCOMM_BITS=\"eleven\"" in line for line in said), (codes, outputs)
    print("malformed:", said[0])

    codes, outputs = job([{"FLASHCOMM_NCCL_LIB": "/nowhere/libnccl.so.2"}] * 2)
    said = lines(outputs[0])
    assert codes == [0, 0] and "FLASHCOMM_NCCL_LIB=/nowhere/libnccl.so.2" in said[0], (codes, outputs)
    print("wrong library:", said[0])

    start = time.monotonic()
    codes, outputs = job([{"FLASHCOMM_ATTACH_TIMEOUT_S": "5"}, {"LD_PRELOAD": ""}])
    said = lines(outputs[0])
    assert codes[0] not in (0, "timeout") and any("within 5 s" in line for line in said), (codes, outputs)
    print(f"a rank without the shim, after {time.monotonic() - start:.0f} s:", said[0])


if __name__ == "__main__":
    sys.exit(rank() if "RANK" in os.environ else main())
