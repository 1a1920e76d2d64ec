"""Time to first token of a tensor-parallel Llama, random weights, fp16: plain NCCL beside `flashcomm run` at each width.

usage: ttft.py [--ranks 2,4] [--bits 8,6,5,4] [--gpu-each] [--json FILE] ...      starts the jobs, one after the other
       (started by itself with RANK set: one rank)

The model is that of llama.py. Ranks share a GPU and believe to be on hosts of their own, so NCCL takes
its sockets; with --gpu-each they have a GPU each, and NCCL takes what it likes best. With the defaults an all-reduce
is 2048 x 8 x 4096 x 2 B = 128 MiB, 16 of them for a first token.

A time is that of the prefill and of the choice of the first token, on the slowest rank; communication is what lies between the
issue and the end of an all-reduce on the rank's stream, waiting for the others included. Plain NCCL runs first and last, and its
median counts. Errors are those of the logits of the last 16 positions against plain NCCL's.
"""

import argparse
import hashlib
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import expected
import llama

HERE = pathlib.Path(__file__).resolve().parent


def parse():
    parser = argparse.ArgumentParser(description="time to first token, plain and compressed")
    parser.add_argument("--ranks", default="2,4")
    parser.add_argument("--bits", default="8,6,5,4")
    parser.add_argument("--prompt", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--gpu-each", action="store_true", help="a GPU for each rank, by torchrun")
    parser.add_argument("--exchange", help="FLASHCOMM_EXCHANGE [default: nccl; with --gpu-each auto]")
    llama.add_arguments(parser)
    return parser.parse_args()


def rank_main(args):
    import torch
    import torch.distributed as dist

    rank, world = llama.join(args)
    on_gpu = args.device == "cuda"
    issued = expected.Issued(rank, world)
    spans = []

    def all_reduce(x):
        if on_gpu:
            span = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            span[0].record()
            dist.all_reduce(x)
            span[1].record()
        else:
            span = [time.perf_counter()]
            dist.all_reduce(x)
            span.append(time.perf_counter())
        spans.append(span)
        issued.sum16(x.numel() * x.element_size())
        return x

    model, generator = llama.build(args, args.prompt, rank, world, all_reduce)
    prompts = torch.randint(args.vocabulary, (args.batch, args.prompt), generator=generator, device=args.device)

    def prefill(n_positions):
        hidden = model.model(prompts, use_cache=True).last_hidden_state
        return model.lm_head(hidden[:, -n_positions:])

    def synchronize():
        if on_gpu:
            torch.cuda.synchronize()

    def barrier():
        dist.barrier()
        issued.other_all_reduce()  # which it is, with NCCL

    logits = prefill(16).float().cpu()  # warms up, too
    prefill(1)
    times, communication = [], []
    for _ in range(args.rounds):
        barrier()
        synchronize()
        spans.clear()
        start = time.perf_counter()
        prefill(1)[:, -1].argmax(-1).cpu()
        times.append(1e3 * (time.perf_counter() - start))
        communication.append(sum(a.elapsed_time(b) if on_gpu else 1e3 * (b - a) for a, b in spans))
    barrier()
    dist.destroy_process_group()
    issued.write()
    scratch = pathlib.Path(os.environ["FLASHCOMM_SCRATCH"])
    if rank == 0:
        torch.save(logits, scratch / "logits")
    digest = hashlib.sha256(logits.numpy().tobytes()).hexdigest()
    result = {"ms": times, "communication_ms": communication, "all_reduces": len(spans), "logits": digest}
    (scratch / f"result.{rank}.json").write_text(json.dumps(result))


def job(args, ranks, bits):
    """Runs it; the times of the slowest rank by round, and rank 0's logits."""
    import torch

    with tempfile.TemporaryDirectory(dir="/dev/shm") as scratch:
        launch = [sys.executable, str(HERE / "launch.py"), str(ranks), str(args.seconds)]
        if args.gpu_each:
            launch = ["timeout", str(args.seconds), sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        command = [*launch, str(HERE / "ttft.py"), *sys.argv[1:]]
        if bits != "plain" and args.device == "cuda":
            exchange = args.exchange or ("auto" if args.gpu_each else "nccl")
            run = [args.flashcomm, "run", "--quiet", "--engine", "torch", "--bits", bits, "--exchange", exchange]
            # Ranks of one machine have no default over NCCL: on one host NCCL's own way is faster than its sockets.
            command = [*run, "--min-bytes", "1M", "--stats-file", f"{scratch}/stats.%p.json", "--", *command]
        subprocess.run(command, env=dict(os.environ, FLASHCOMM_SCRATCH=scratch), check=True)
        results = [json.loads(pathlib.Path(scratch, f"result.{r}.json").read_text()) for r in range(ranks)]
        assert len({result["logits"] for result in results}) == 1, "the ranks have different logits"
        if bits != "plain" and args.device == "cuda":
            expected.check(scratch, ranks, bits)
        slowest = lambda name: [max(round) for round in zip(*(result[name] for result in results))]
        return {
            "ranks": ranks,
            "bits": bits,
            "ms": slowest("ms"),
            "communication_ms": slowest("communication_ms"),
            "all_reduces": results[0]["all_reduces"],
        }, torch.load(pathlib.Path(scratch, "logits"))


def main():
    args = parse()
    if "RANK" in os.environ:
        return rank_main(args)
    jobs = []
    for ranks in map(int, args.ranks.split(",")):
        exact = None
        for bits in ["plain", *args.bits.split(","), "plain"]:
            measured, logits = job(args, ranks, bits)
            exact = logits if exact is None else exact
            measured["logits_relative_error"] = float((logits - exact).norm() / exact.norm())
            measured["same_first_token"] = float((logits.argmax(-1) == exact.argmax(-1)).float().mean())
            jobs.append(measured)
            print(f"{ranks} ranks, {bits}: {statistics.median(measured['ms']):.1f} ms, logits' error {measured['logits_relative_error']:.5f}", flush=True)

    size = args.prompt * args.batch * args.hidden * 2 >> 20
    print(f"\nTime to first token: Llama, {args.layers} layers of width {args.hidden}, random weights, fp16, {args.batch} prompts of "
          f"{args.prompt} tokens; {2 * args.layers} all-reduces of {size} MiB; medians of {args.rounds} (range)")
    print(f"{'ranks':>5} {'bits':>6} {'ms':>9} {'range':>19} {'faster':>7} {'communication':>15} {'share':>6} "
          f"{'logits error':>13} {'same token':>11}")
    for ranks in sorted({job["ranks"] for job in jobs}):
        mine = [job for job in jobs if job["ranks"] == ranks]
        plain = statistics.median(ms for job in mine if job["bits"] == "plain" for ms in job["ms"])
        for job_ in mine:
            ms, communication = statistics.median(job_["ms"]), statistics.median(job_["communication_ms"])
            job_["faster"] = plain / ms
            print(f"{ranks:>5} {job_['bits']:>6} {ms:9.1f} {min(job_['ms']):9.1f}-{max(job_['ms']):<9.1f} {plain / ms:6.2f}x "
                  f"{communication:12.1f} ms {100 * communication / ms:5.0f}% {job_['logits_relative_error']:13.5f} "
                  f"{100 * job_['same_first_token']:10.1f}%")
    if args.json:
        pathlib.Path(args.json).write_text(json.dumps({"arguments": vars(args), "jobs": jobs}, indent=1))


main()
