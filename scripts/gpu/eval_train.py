"""Trains the language model of the accuracy evaluation: transformers' LlamaForCausalLM, on the text that eval_data.py
packed.

usage: eval_train.py [--data FOLDER] [--out FOLDER] [--seconds 200] ...

The time is for everything, from the start of the program to its end: the learning rate follows the time that has
passed, so the schedule ends with it. Weights are bf16, with masters in fp32 for AdamW; they are saved in fp16, and the
perplexity of held-out text is that of the saved weights. Seeds are fixed, but how many steps fit depends on the
machine.
"""

import time

started = time.monotonic()

import argparse
import json
import math
import pathlib

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from eval_models import AllRanks, Llama, exact, heldout, manifest, tokens


def parse():
    parser = argparse.ArgumentParser(description="trains a Llama for the accuracy evaluation")
    parser.add_argument("--data", default=".gpu/eval")
    parser.add_argument("--out", default="/tmp/flashcomm-eval-model")
    parser.add_argument("--seconds", type=float, default=200, help="for all, loading and saving included")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--inner", type=int, default=2048)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument(
        "--dropout", type=float, default=0.05, help="behind attention and MLP: the text is read several times"
    )
    parser.add_argument("--sequences", type=int, default=96, help="of held-out text, as eval_model.py has them")
    parser.add_argument("--device", default="cuda")
    return parser.parse_args()


def windows(text, length, batch):
    """Batches of windows without end: each epoch cuts the text at other places and shuffles."""
    generator = torch.Generator().manual_seed(1)
    within = torch.arange(length + 1, device=text.device)
    while True:
        offset = int(torch.randint(length, (1,), generator=generator))
        n = (len(text) - 1 - offset) // length
        order = torch.randperm(n, generator=generator).to(text.device) * length + offset
        for i in range(0, n - batch + 1, batch):
            yield text[order[i : i + batch, None] + within]


def perplexity(logits_of, sequences, batch=8):
    total = 0.0
    for ids in sequences.split(batch):
        logits = logits_of(ids[:, :-1])
        total += float(F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"))
    return math.exp(total / sequences[:, 1:].numel())


def main():
    args = parse()
    on_gpu = args.device == "cuda"
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    about = manifest(args.data)
    text = tokens(args.data, "train").to(args.device)
    sequences = heldout(args.data, args.sequences, args.length).to(args.device)
    config = LlamaConfig(
        hidden_size=args.hidden,
        intermediate_size=args.inner,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        vocab_size=about["vocabulary"],
        max_position_embeddings=args.length,
        tie_word_embeddings=False,
    )
    with torch.device(args.device):
        model = LlamaForCausalLM(config).train()
    for name, weights in model.named_parameters():
        # What is added to the residual starts the smaller the more layers add to it.
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weights.data.div_(math.sqrt(2 * args.layers))
    if args.dropout:
        for layer in model.model.layers:
            for linear in [layer.self_attn.o_proj, layer.mlp.down_proj]:
                linear.register_forward_hook(lambda module, _, output: F.dropout(output, args.dropout, module.training))
    masters = [weights.detach().clone().float() for weights in model.parameters()]
    weights = list(model.parameters())
    for w in weights:  # not model.to(), which would round the frequencies of the positions, too
        w.data = w.data.bfloat16()
    n_parameters = sum(w.numel() for w in weights)
    optimizer = torch.optim.AdamW(
        [
            {"params": [m for m in masters if m.dim() > 1], "weight_decay": 0.1},
            {"params": [m for m in masters if m.dim() < 2], "weight_decay": 0.0},
        ],
        betas=(0.9, 0.95),
        fused=on_gpu,
    )

    def say(*words):
        print(f"{time.monotonic() - started:6.1f} s:", *words, flush=True)

    say(f"{n_parameters / 1e6:.1f}M parameters, {len(text) / 1e6:.1f}M tokens of text")
    begin = time.monotonic()
    end = started + args.seconds - max(6.0, 0.05 * args.seconds)  # to save, and to load and measure what was saved
    losses, step, seen, said, logged = [], 0, 0, begin, []
    batches = windows(text, args.length, args.batch)
    while (now := time.monotonic()) < end:
        done = (now - begin) / (end - begin)
        rate = args.rate * min(1.0, (step + 1) / 100) * (0.02 + 0.98 * (0.5 + 0.5 * math.cos(math.pi * done)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        ids = next(batches)
        hidden = model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
        loss = F.cross_entropy(model.lm_head(hidden).float().flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        for master, w in zip(masters, weights):
            master.grad = w.grad.float()
            w.grad = None
        torch.nn.utils.clip_grad_norm_(masters, 1.0)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(weights, masters)
        losses.append(loss.detach())
        step, seen = step + 1, seen + ids[:, 1:].numel()
        if step % 4 == 0 and on_gpu:
            torch.cuda.synchronize()  # or the host runs ahead of the time
        if time.monotonic() - said > min(10.0, args.seconds / 10):
            said = time.monotonic()
            mean = float(torch.stack(losses).mean())
            losses.clear()
            logged.append([round(said - started, 1), step, round(mean, 4)])
            say(
                f"step {step}, {seen / 1e6:.1f}M tokens ({seen / len(text):.2f} epochs), "
                f"loss {mean:.4f}, rate {rate:.2e}"
            )
            assert math.isfinite(mean), "the loss is no number"
    out = pathlib.Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    named = dict(zip((name for name, _ in model.named_parameters()), masters))
    save_file({name: master.half().contiguous().cpu() for name, master in named.items()}, out / "model.safetensors")
    (out / "config.json").write_text(json.dumps(config.to_dict(), default=str))
    say(f"saved to {out}")

    # The program that will evaluate the weights against transformers' own.
    del optimizer, masters, named
    saved = load_file(out / "model.safetensors")
    for w in weights:
        w.data = w.data.half()
    model.eval().load_state_dict(saved)
    with torch.no_grad():
        here = perplexity(lambda ids: model(input_ids=ids, use_cache=False).logits, sequences)
    again = perplexity(Llama(config.to_dict(), saved, AllRanks(1, exact), args.device), sequences)
    result = {
        "parameters": n_parameters,
        "config": {name: getattr(args, name) for name in ["layers", "hidden", "inner", "heads", "kv_heads", "length"]},
        "steps": step,
        "tokens": seen,
        "epochs": seen / len(text),
        "seconds": time.monotonic() - started,
        "loss": logged,
        "heldout_perplexity": here,
        "heldout_perplexity_by_eval_models": again,
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "torch": torch.__version__,
    }
    (out / "train.json").write_text(json.dumps(result))
    say(f"held-out perplexity {here:.4f} (eval_models.py: {again:.4f}); {step} steps, {seen / 1e6:.1f}M tokens")
    if abs(again / here - 1) > 2e-3:
        say("WARNING: eval_models.py is another model than transformers'")


if __name__ == "__main__":
    main()
