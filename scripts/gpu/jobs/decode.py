"""Time per token of a tensor-parallel Llama that decodes in a CUDA graph: plain NCCL beside `flashcomm run` with its defaults.

usage: decode.py [--ranks 2] [--batches 1,8,64] [--exchange auto] [--json FILE] ...    starts the jobs, one after the other
       (started by itself with RANK set: one rank)

The model is that of llama.py, a GPU for each rank. A step takes one token of each sequence through all layers over a cache of
--context positions, and chooses the next ones; its all-reduces are batch x hidden x 2 bytes. Each step writes the last position of
the cache, so all of them take as long. A time is that of a replay, on the slowest rank, median of the rounds; plain NCCL
runs first and last, and its median counts.
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

import llama

HERE = pathlib.Path(__file__).resolve().parent


def parse():
    parser = argparse.ArgumentParser(description="time per token, plain and with the shim")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--batches", default="1,8,64", help="sequences that are decoded at once")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--bits", default="8")
    parser.add_argument("--exchange", default="auto", help="FLASHCOMM_EXCHANGE")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=50, help="replays of a round")
    llama.add_arguments(parser)
    return parser.parse_args()


def rotated(x, cos, sin):
    """Rotary positions, as transformers pairs the halves of a head."""
    import torch

    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


class Decoder:
    """A step of one batch: tokens in and out, [batch], on the device."""

    def __init__(self, args, model, world, batch):
        import torch

        self.model, self.batch, self.last = model.model, batch, args.context - 1
        self.lm_head, self.head = model.lm_head, args.hidden // args.heads
        self.heads, self.kv_heads = args.heads // world, args.kv_heads // world
        self.tokens = torch.arange(batch, device=args.device)
        shape = (args.layers, 2, batch, self.kv_heads, args.context, self.head)
        self.cache = torch.zeros(shape, device=args.device).normal_(0, 0.1, generator=torch.Generator(args.device).manual_seed(1))
        self.position = torch.full((1, 1), self.last, device=args.device)

    def heads_of(self, x, n):
        return x.view(self.batch, 1, n, self.head).transpose(1, 2)

    def step(self):
        from torch.nn.functional import scaled_dot_product_attention

        x = self.model.embed_tokens(self.tokens)[:, None]
        cos, sin = (table[:, None] for table in self.model.rotary_emb(x, self.position))
        for layer, (keys, values) in zip(self.model.layers, self.cache):
            attention, y = layer.self_attn, layer.input_layernorm(x)
            query = rotated(self.heads_of(attention.q_proj(y), self.heads), cos, sin)
            keys[:, :, self.last :] = rotated(self.heads_of(attention.k_proj(y), self.kv_heads), cos, sin)
            values[:, :, self.last :] = self.heads_of(attention.v_proj(y), self.kv_heads)
            y = scaled_dot_product_attention(query, keys, values, enable_gqa=True)
            x = x + attention.o_proj(y.transpose(1, 2).reshape(self.batch, 1, -1))
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        logits = self.lm_head(self.model.norm(x))[:, 0]
        self.tokens.copy_(logits.argmax(-1))
        return logits


def measure(args, model, world, batch):
    import torch
    import torch.distributed as dist

    decoder = Decoder(args, model, world, batch)
    logits = decoder.step().float().cpu()  # warms up, too
    step = decoder.step
    if args.device == "cuda":
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            step()
        step = graph.replay
    times = []
    for _ in range(args.rounds):
        dist.barrier()
        if args.device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(args.steps):
            step()
        if args.device == "cuda":
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start) / args.steps)
    tokens = decoder.tokens.cpu().numpy().tobytes()
    return {"ms": times, "logits": hashlib.sha256(logits.numpy().tobytes() + tokens).hexdigest()}


def rank_main(args):
    import torch.distributed as dist

    def all_reduce(x):
        dist.all_reduce(x)
        return x

    rank, world = llama.join(args)
    model, _ = llama.build(args, args.context, rank, world, all_reduce)
    results = {batch: measure(args, model, world, int(batch)) for batch in args.batches.split(",")}
    dist.barrier()
    dist.destroy_process_group()
    pathlib.Path(os.environ["FLASHCOMM_SCRATCH"], f"result.{rank}.json").write_text(json.dumps(results))


def job(args, with_shim):
    """Runs it: by batch the times of the slowest rank in each round."""
    with tempfile.TemporaryDirectory() as scratch:
        launch = ["timeout", str(args.seconds), sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command = [*launch, "--nproc-per-node", str(args.ranks), str(HERE / "decode.py"), *sys.argv[1:]]
        if with_shim and args.device == "cuda":
            run = [args.flashcomm, "run", "--quiet", "--engine", "torch", "--bits", args.bits, "--exchange", args.exchange]
            command = [*run, "--", *command]
        subprocess.run(command, env=dict(os.environ, FLASHCOMM_SCRATCH=scratch), check=True)
        results = [json.loads(pathlib.Path(scratch, f"result.{r}.json").read_text()) for r in range(args.ranks)]
    times = {}
    for batch in args.batches.split(","):
        assert len({result[batch]["logits"] for result in results}) == 1, "the ranks have different logits or tokens"
        times[batch] = [max(round) for round in zip(*(result[batch]["ms"] for result in results))]
    return times


def main():
    args = parse()
    if "RANK" in os.environ:
        return rank_main(args)
    first, shim, last = job(args, False), job(args, True), job(args, False)
    print(f"Milliseconds a token: Llama, {args.layers} layers of width {args.hidden}, random weights, fp16, {args.ranks} ranks, "
          f"{2 * args.layers} all-reduces a step, a graph; medians of {args.rounds} (range)")
    print(f"{'batch':>5} {'bytes':>8} {'plain':>8} {'shim':>8} {'range':>17} {'faster':>7}")
    for batch in args.batches.split(","):
        plain, mine = statistics.median(first[batch] + last[batch]), statistics.median(shim[batch])
        spread = f"{min(shim[batch]):.3f}-{max(shim[batch]):.3f}"
        print(f"{batch:>5} {int(batch) * args.hidden * 2:>8} {plain:8.3f} {mine:8.3f} {spread:>17} {plain / mine:6.2f}x")
    if args.json:
        results = {"plain": [first, last], "shim": shim}
        pathlib.Path(args.json).write_text(json.dumps({"arguments": vars(args), "ms": results}, indent=1))


main()
