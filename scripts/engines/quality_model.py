"""One rank of quality.py's model, the tensor-parallel Llama of eval_models.py, and what is measured
with it.

Batches are of prompts of one length, so nothing is padded; --batch-tokens bounds them.
"""

import json
import math
import pathlib
import sys

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tokenizers import Tokenizer

import quality_tasks as tasks
from eval_models import Cache, Llama, Rank

ROOT = pathlib.Path(__file__).resolve().parents[2]


class Measured:
    """One rank's part of the model, and what is measured with it. `say` is given a line on each."""

    def __init__(self, args, rank, world, all_reduce, say):
        self.args, self.say = args, say
        self.device = "cuda" if args.backend == "nccl" else "cpu"
        config = json.loads((args.model / "config.json").read_text())
        if world > config["num_key_value_heads"]:
            sys.exit(f"{world} ranks, and only {config['num_key_value_heads']} key-value heads")
        weights = load_file(args.model / "model.safetensors")
        ranks = Rank(rank, world, all_reduce)
        self.model = Llama(config, weights, ranks, self.device, getattr(torch, args.dtype))
        self.tokenizer = Tokenizer.from_file(str(args.model / "tokenizer.json"))
        self.encode = lambda text: self.tokenizer.encode(text).ids

    def batches(self, sequences, length):
        """(n, length) tensors of token ids."""
        n = max(1, self.args.batch_tokens // length)
        for i in range(0, len(sequences), n):
            yield torch.tensor(sequences[i : i + n], device=self.device)

    def perplexity(self):
        text = self.args.text.read_text() if self.args.text else tasks.documentation(ROOT)
        windows = tasks.windows(self.encode(text), self.args.length, self.args.windows)
        losses = []
        for ids in self.batches(windows, self.args.length):
            for hidden, targets in zip(self.model.hidden(ids[:, :-1]), ids[:, 1:]):
                losses.append(float(F.cross_entropy(self.model.logits(hidden).float(), targets)))
        loss = math.fsum(losses) / len(losses)
        perplexity = math.exp(loss) if loss < 700 else math.inf
        tokens = len(windows) * self.args.length
        self.say(f"  perplexity {perplexity:.4f} of {tokens} tokens")
        return {
            "perplexity": perplexity,
            "tokens": tokens,
            "length": self.args.length,
            "text": tasks.digest(windows),
            "loss_by_window": losses,
        }

    def answers(self, ids):
        """Of a batch of prompts, by greedy decoding."""
        cache = Cache(ids.shape[1] + tasks.ANSWER)
        hidden, chosen = self.model.hidden(ids, cache), []
        while True:
            chosen.append(self.model.logits(hidden[:, -1:]).argmax(-1))
            if len(chosen) == tasks.ANSWER:
                break
            hidden = self.model.hidden(chosen[-1], cache)
        end = self.tokenizer.token_to_id("<|im_end|>")
        rows = torch.cat(chosen, 1).tolist()
        return [self.tokenizer.decode(row[: row.index(end)] if end in row else row) for row in rows]

    def needles(self, n_tokens, n_others):
        """Of contexts of n_tokens with n_others facts that are not asked for."""
        questions = tasks.Questions(self.encode, n_others)
        made = questions.of_context(n_tokens - tasks.ANSWER, self.args.each)
        batches = self.batches([question.prompt for question in made], n_tokens)
        answers = [answer for ids in batches for answer in self.answers(ids)]
        found = [question.found(answer) for question, answer in zip(made, answers)]
        each = self.args.each
        by_depth = [sum(found[i : i + each]) for i in range(0, len(found), each)]
        where = f"{n_tokens} tokens, {n_others} others"
        self.say(f"  {where}: {sum(found)} of {len(found)} found, by depth {by_depth}")
        return {
            "context": n_tokens,
            "others": n_others,
            "asked": len(found),
            "found": sum(found),
            "found_by_depth": by_depth,
            "questions": tasks.digest([question.prompt for question in made]),
            "answers": answers,
        }
