"""Bad settings in a PyTorch job: the job goes on, and the log says what is wrong.

usage: settings_job.py            starts the jobs and checks what they say
       settings_job.py SUM        one rank, which wants the SUM "exact", as the real NCCL gives it, or "coded"
"""

import os
import subprocess
import sys
import time

from launch import free_port

SHIM = os.environ["FLASHCOMM_LIB"]


def rank(wanted):
    import torch
    import torch.distributed as dist

    torch.cuda.set_device(0)
    dist.init_process_group("nccl")
    for _ in range(2):
        x = torch.arange(100_000, device="cuda") % 600  # three times of it is exact in fp16
        expected, y = 3 * x, (x * (1 + dist.get_rank())).half()
        dist.all_reduce(y)
        error = float((y.float() - expected).norm() / expected.float().norm())
        assert error == 0 if wanted == "exact" else 0 < error < 0.02, error
    dist.destroy_process_group()


def job(settings, wanted):
    """Exit codes and the outputs of two ranks with settings[r] each, which want an "exact" or a "coded" sum."""
    port = str(free_port())
    ranks = []
    for r in range(2):
        env = dict(os.environ, RANK=str(r), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        env.update(NCCL_HOSTID=f"host{r}", NCCL_SOCKET_IFNAME="lo", FLASHCOMM_MIN_BYTES="0", LD_PRELOAD=SHIM)
        env.update(settings[r])
        ranks.append(
            subprocess.Popen([sys.executable, __file__, wanted], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
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
    codes, outputs = job([{"FLASHCOMM_BITS": "4"}, {"FLASHCOMM_BITS": "8"}], "exact")
    said = lines("".join(outputs))
    assert codes == [0, 0], (codes, outputs)
    assert len(said) == 1 and "rank 1 has FLASHCOMM_BITS=8" in said[0], said
    print("settings that differ:", said[0])

    codes, outputs = job([{"FLASHCOMM_BITS": "eleven"}, {"FLASHCOMM_BITS": "eleven"}], "coded")
    said = lines(outputs[0])
    assert codes == [0, 0] and any("FLASHCOMM_BITS=\"eleven\"" in line for line in said), (codes, outputs)
    print("malformed:", said[0])

    codes, outputs = job([{"FLASHCOMM_NCCL_LIB": "/nowhere/libnccl.so.2"}] * 2, "coded")
    said = lines(outputs[0])
    assert codes == [0, 0] and "FLASHCOMM_NCCL_LIB=/nowhere/libnccl.so.2" in said[0], (codes, outputs)
    print("wrong library:", said[0])

    start = time.monotonic()
    codes, outputs = job([{"FLASHCOMM_ATTACH_TIMEOUT_S": "5"}, {"LD_PRELOAD": ""}], "exact")
    said = lines(outputs[0])
    assert codes[0] not in (0, "timeout") and any("within 5 s" in line for line in said), (codes, outputs)
    print(f"a rank without the shim, after {time.monotonic() - start:.0f} s:", said[0])


if __name__ == "__main__":
    sys.exit(rank(sys.argv[1]) if len(sys.argv) > 1 else main())
