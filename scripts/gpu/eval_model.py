"""What compressed all-reduces cost two real models, tensor-parallel through the shim: perplexity and embeddings beside
plain NCCL's.

usage: eval_model.py --ranks N [--code NAME] [--widths 8,6,4:8] [--references] [--json FILE] ...
       (started by itself with RANK set: one rank)

The models are the Llama that eval_train.py trained, on held-out text, and all-MiniLM-L6-v2, on held-out sentences, both
in fp16. One job measures all widths, since a start takes longer than a measurement: first with the shim switched off,
which is plain NCCL, then at each width, then switched off again, which must give the same numbers. Every rank must have
the same bits. The shim's counts prove that it compressed, and give the bits that an element took on the wire.

--references adds the peers' codes, emulated on rank 0 by all ranks' terms in one process. FILE is a list of jobs; this
one is appended. With --device cpu there is no shim: all widths give the same.
"""

import argparse
import ctypes
import json
import math
import os
import pathlib
import subprocess
import sys
import tempfile
import time

HERE = pathlib.Path(__file__).resolve().parent
QUERIES = 50


def parse():
    parser = argparse.ArgumentParser(description="accuracy of two models at each width")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--code", default="default", help="as FLASHCOMM_CODE has it")
    parser.add_argument("--widths", default="8,7,6,5,4,3,2,4:8", help="8 of them at most")
    parser.add_argument("--references", action="store_true", help="the peers' codes, too")
    parser.add_argument("--data", default=".gpu/eval")
    parser.add_argument("--model", default="/tmp/flashcomm-eval-model", help="what eval_train.py saved")
    parser.add_argument("--sequences", type=int, default=96)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seconds", type=int, default=60, help="that the job may take")
    parser.add_argument("--library", default=".gpu/libflashcomm.so")
    parser.add_argument("--device", default="cuda", help="cpu: tries the program out over gloo, without flashcomm")
    parser.add_argument("--json", help="appends the job to this file")
    return parser.parse_args()


# ---- one rank -------------------------------------------------------------------------------------------------------


class Stats(ctypes.Structure):
    names = ["compressed", "forwarded", "others", "bytes_in", "bytes_wire"]
    _fields_ = [("size", ctypes.c_size_t)] + [(name, ctypes.c_uint64) for name in names]


class Shim:
    """flashcomm's own calls, on the communicator of the process group."""

    def __init__(self, library):
        import torch
        import torch.distributed as dist

        self.library = ctypes.CDLL(str(pathlib.Path(library).resolve()))
        self.library.flashcommGetLastError.restype = ctypes.c_char_p
        backend = dist.distributed_c10d._get_default_group()._get_backend(torch.device("cuda"))
        self.comm = ctypes.c_void_p(backend._comm_ptr())

    def call(self, name, *arguments):
        import torch

        torch.cuda.synchronize()
        result = getattr(self.library, name)(self.comm, *map(ctypes.c_int, arguments))
        if result:
            raise RuntimeError(
                f"{name}{arguments} is {result}: {self.library.flashcommGetLastError(self.comm).decode()}"
            )

    def switch(self, on):
        self.call("flashcommSetCommEnabled", int(on))

    def bits(self, width):
        reduce, _, gather = width.partition(":")
        self.call("flashcommSetCommBits", int(reduce), int(gather or reduce))

    def stats(self):
        s = Stats(size=ctypes.sizeof(Stats))
        assert self.library.flashcommGetStats(ctypes.byref(s)) == 0
        return [getattr(s, name) for name in ["compressed", "forwarded", "bytes_in", "bytes_wire"]]


class NoShim:
    def switch(self, on):
        pass

    def bits(self, width):
        pass

    def stats(self):
        return [0, 0, 0, 0]


def digest(x):
    """Differs where any bit does, nearly surely; wraps around."""
    import torch

    bits = x.contiguous().view(torch.int16 if x.element_size() == 2 else torch.int32).flatten().long()
    place = torch.arange(1, len(bits) + 1, device=x.device)
    return (bits * (place * 0x5851F42D4C957F2D ^ (place >> 7))).sum()


class Language:
    """Perplexity on held-out text, and how far the logits are from those of the first call."""

    def __init__(self, sequences, batch):
        self.batches = sequences.split(batch)
        self.exact = None

    def __call__(self, model, keep):
        """Figures, where this process keeps what they are compared with, and a digest of the logits."""
        import torch
        import torch.nn.functional as F

        digests, logits = [], []
        loss = error = norm = divergence = same = 0.0
        for i, ids in enumerate(self.batches):
            got = model(ids[:, :-1])
            digests.append(digest(got))
            if not keep:
                continue
            if self.exact is None:
                logits.append(got)
            exact = (got if self.exact is None else self.exact[i]).float()
            log_p, log_exact = F.log_softmax(got.float(), -1), F.log_softmax(exact, -1)
            loss += F.nll_loss(log_p.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").double()
            divergence += F.kl_div(log_p, log_exact, reduction="sum", log_target=True).double()
            error += (got.float() - exact).square().sum().double()
            norm += exact.square().sum().double()
            same += (got.argmax(-1) == exact.argmax(-1)).sum().double()
        digests = torch.stack(digests)
        if not keep:
            return None, digests
        if self.exact is None:
            self.exact = logits
        n = sum(ids[:, 1:].numel() for ids in self.batches)
        loss = float(loss) / n
        return {
            "perplexity": math.exp(loss) if loss < 700 else math.inf,
            "loss": loss,
            "logits_relative_error": float((error / norm).sqrt()),
            "kl_divergence": float(divergence) / n,
            "same_next_token": float(same) / n,
            "tokens": n,
        }, digests


class Embedding:
    """Embeddings and the ranking of the others that 50 sentences get by them, beside those of the first call."""

    def __init__(self, ids, mask):
        import torch

        self.ids, self.mask, self.exact = ids, mask, None
        self.queries = torch.arange(QUERIES, device=ids.device) * len(ids) // QUERIES

    def similarities(self, embeddings):
        import torch

        similar = embeddings[self.queries] @ embeddings.T
        others = torch.ones_like(similar, dtype=torch.bool)
        others[torch.arange(len(self.queries)), self.queries] = False
        return similar[others].view(len(self.queries), -1)

    def __call__(self, model, keep):
        embeddings = model(self.ids, self.mask)
        digests = digest(embeddings)[None]
        if not keep:
            return None, digests
        if self.exact is None:
            self.exact = embeddings
        cosine = (embeddings.double() * self.exact.double()).sum(-1)
        cosine = cosine / (embeddings.double().norm(dim=-1) * self.exact.double().norm(dim=-1))
        got, exact = self.similarities(embeddings), self.similarities(self.exact)
        best, best_exact = got.topk(10).indices, exact.topk(10).indices
        overlap = (best[:, :, None] == best_exact[:, None]).any(-1).double().mean()
        # Spearman's: the correlation of the ranks.
        a, b = (x.argsort(-1).argsort(-1).double() for x in (got, exact))
        a, b = a - a.mean(-1, keepdim=True), b - b.mean(-1, keepdim=True)
        rank_correlation = (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))
        return {
            "cosine_mean": float(cosine.mean()),
            "cosine_min": float(cosine.min()),
            "top10_overlap": float(overlap),
            "spearman_mean": float(rank_correlation.mean()),
            "spearman_min": float(rank_correlation.min()),
            "sentences": len(embeddings),
        }, digests


def rank_main(args):
    import torch
    import torch.distributed as dist
    from safetensors.torch import load_file

    import eval_models as m

    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    on_gpu = args.device == "cuda"
    marks = [("start", time.monotonic())]
    mark = lambda name: marks.append((name, time.monotonic()))
    if on_gpu:
        torch.cuda.set_device(0)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    about = m.manifest(args.data)
    config = json.loads(pathlib.Path(args.model, "config.json").read_text())
    llama = load_file(pathlib.Path(args.model, "model.safetensors"))
    minilm = m.minilm_tensors(args.data, about["minilm"])
    issued = 0

    def all_reduce(x):
        nonlocal issued
        issued += 1
        dist.all_reduce(x)
        return x

    def models(ranks):
        return m.Llama(config, llama, ranks, args.device), m.MiniLM(
            about["minilm"]["config"], minilm, ranks, args.device
        )

    mine = models(m.Rank(rank, world, all_reduce))
    sentences = about["minilm"]["tokens"]
    longest = -(-max(map(len, sentences)) // 8) * 8  # which attention's kernels like
    ids = torch.tensor([s + [0] * (longest - len(s)) for s in sentences], device=args.device)
    mask = torch.tensor([[1] * len(s) + [0] * (longest - len(s)) for s in sentences], device=args.device)
    length = config["max_position_embeddings"]
    sequences = m.heldout(args.data, args.sequences, length).to(args.device)
    mark("load")

    dist.all_reduce(torch.zeros(1, device=args.device))  # fp32: makes the communicator
    shim = Shim(args.library) if on_gpu else NoShim()
    shim.switch(False)
    mark("meet")

    setups, references = {}, {}

    def write():
        if rank == 0:
            result = {
                "ranks": world,
                "code": args.code,
                "batch": args.batch,
                "setups": setups,
                "references": references,
                "seconds": {name: round(at - before, 2) for (_, before), (name, at) in zip(marks, marks[1:])},
                "device": torch.cuda.get_device_name() if on_gpu else "cpu",
                "torch": torch.__version__,
            }
            pathlib.Path(os.environ["FLASHCOMM_SCRATCH"], "result.json").write_text(json.dumps(result))

    language, embedding = Language(sequences, args.batch), Embedding(ids, mask)
    exact_digests = None
    widths = args.widths.split(",") if args.widths else []
    for name in ["uncompressed", *widths, "uncompressed again"]:
        if name == "uncompressed again":
            shim.switch(False)
        elif name != "uncompressed":
            shim.bits(name)
            shim.switch(True)
        before, issued = shim.stats(), 0
        texts, digests = language(mine[0], rank == 0)
        vectors, more = embedding(mine[1], rank == 0)
        digests = torch.cat([digests, more])
        compressed, forwarded, bytes_in, bytes_wire = (b - a for a, b in zip(before, shim.stats()))
        everyone = [torch.empty_like(digests) for _ in range(world)]
        dist.all_gather(everyone, digests)
        assert all(torch.equal(digests, other) for other in everyone), f"{name}: the ranks have different bits"
        plain = name.startswith("uncompressed")
        if on_gpu:
            said, expected = (compressed, forwarded), (0, issued) if plain else (issued, 0)
            assert said == expected, f"{name}: the shim counted {said}, the rank issued {expected}"
        if name == "uncompressed":
            exact_digests = digests
        if rank == 0:
            result = {"language": texts, "embedding": vectors, "compressed": compressed, "forwarded": forwarded}
            result["same_bits_as_uncompressed"] = bool(torch.equal(digests, exact_digests))
            # Both hops together: every rank sends all chunks but its own, and its own to all others.
            result["bits_per_element"] = bytes_wire / bytes_in * 16 * world / (2 * (world - 1)) if compressed else 16.0
            setups[name] = result
            print(f"  {name:>20}: {describe(result, setups['uncompressed'])}", flush=True)
        mark(name)
        write()  # what comes after may fail

    if args.references and rank == 0:
        language, embedding = Language(sequences, args.batch), Embedding(ids, mask)
        for name, (bits, code) in {"fp16": (16.0, m.exact), **m.REFERENCES}.items():
            there = models(m.AllRanks(world, code))
            references[name] = {"language": language(there[0], True)[0], "embedding": embedding(there[1], True)[0]}
            references[name]["bits_per_element"] = bits
            print(f"  {name:>20}: {describe(references[name], references['fp16'])}", flush=True)
            del there
        mark("references")
    dist.barrier()
    dist.destroy_process_group()
    mark("end")
    write()


def difference(result, exact):
    """Of the perplexity, relative."""
    return result["language"]["perplexity"] / exact["language"]["perplexity"] - 1


def describe(result, exact):
    text, vectors = result["language"], result["embedding"]
    percent = 100 * difference(result, exact)
    return (
        f"{result['bits_per_element']:6.3f} bits, perplexity {text['perplexity']:9.4f} ({percent:+8.3f}%), "
        f"logits' error {text['logits_relative_error']:.5f}, same next token {100 * text['same_next_token']:6.2f}%, "
        f"cosine {vectors['cosine_mean']:.6f} (least {vectors['cosine_min']:.6f}), "
        f"top 10 {100 * vectors['top10_overlap']:5.1f}%, Spearman {vectors['spearman_mean']:.5f}"
    )


# ---- the job --------------------------------------------------------------------------------------------------------


def main():
    args = parse()
    if "RANK" in os.environ:
        return rank_main(args)
    start = time.monotonic()
    with tempfile.TemporaryDirectory(dir="/dev/shm") as scratch:
        env = dict(os.environ, FLASHCOMM_SCRATCH=scratch)
        if args.device == "cuda":
            env.update(
                LD_PRELOAD=str(pathlib.Path(args.library).resolve()), FLASHCOMM_EXCHANGE="peer", FLASHCOMM_MIN_BYTES="0"
            )
            # A communicator has 8 pairs of widths, that which it starts with included.
            env.update(FLASHCOMM_BITS=args.widths.split(",")[0])
            # The waiting kernels of all ranks must fit on the GPU that they share.
            env.update(FLASHCOMM_MAX_CTAS=str(min(16, 96 // args.ranks)))
            env.pop("FLASHCOMM_CODE", None)
            if args.code != "default":
                env["FLASHCOMM_CODE"] = args.code
        print(f"{args.ranks} ranks, code {args.code}", flush=True)
        launch = [sys.executable, str(HERE / "jobs/launch.py"), str(args.ranks), str(args.seconds)]
        ended = subprocess.run([*launch, str(HERE / "eval_model.py"), *sys.argv[1:]], env=env, check=False)
        written = pathlib.Path(scratch, "result.json")
        if not written.exists():
            sys.exit("the job failed before its first result")
        result = {**json.loads(written.read_text()), "complete": ended.returncode == 0}
    exact = result["setups"]["uncompressed"]
    for setup in result["setups"].values():
        setup["perplexity_difference"] = difference(setup, exact)
    for setup in result["references"].values():
        setup["perplexity_difference"] = difference(setup, result["references"]["fp16"])
    result["seconds"]["all"] = round(time.monotonic() - start, 2)
    print(f"  seconds: {result['seconds']}", flush=True)
    if args.json:
        path = pathlib.Path(args.json)
        whole = json.loads(path.read_text()) if path.exists() else {}
        trained = pathlib.Path(args.model, "train.json")
        if trained.exists():
            whole["train"] = json.loads(trained.read_text())
        about = json.loads(pathlib.Path(args.data, "manifest.json").read_text())
        whole["data"] = {name: about[name] for name in ["texts", "weights", "vocabulary", "tokens", "sha256"]}
        whole.setdefault("jobs", []).append(result)
        part = path.with_suffix(".part")
        part.write_text(json.dumps(whole, indent=1))
        part.rename(path)
    if ended.returncode:
        sys.exit("the job failed after these results")
    plain, again = (result["setups"][name]["language"]["perplexity"] for name in ["uncompressed", "uncompressed again"])
    if plain != again:
        sys.exit(f"plain NCCL gives a perplexity of {plain} first and {again} last")


if __name__ == "__main__":
    main()
