"""What the accuracy evaluation shares: the packed data, both models as a tensor-parallel rank runs them, and the peers'
codes.

A model is sharded as Megatron shards it: attention heads and the inner width of the MLP over the ranks, a sum behind
the attention's and the MLP's last matrix. The sum is the caller's: an all-reduce, or all the ranks' terms in one
process, summed through another library's code.
"""

import json
import lzma
import math
import pathlib

import numpy as np
import torch
import torch.nn.functional as F

from shards import cut

# ---- data -----------------------------------------------------------------------------------------------------------


def manifest(folder):
    return json.loads(pathlib.Path(folder, "manifest.json").read_text())


def tokens(folder, name):
    return torch.from_numpy(np.frombuffer(lzma.open(pathlib.Path(folder, f"{name}.xz")).read(), "<u2").astype(np.int64))


def heldout(folder, sequences, length):
    """Windows of length + 1 held-out tokens, from everywhere alike."""
    text = tokens(folder, "heldout")
    last = len(text) - length - 1
    return torch.stack(
        [text[start : start + length + 1] for start in (i * last // sequences for i in range(sequences))]
    )


def minilm_tensors(folder, described):
    raw = np.frombuffer(lzma.open(pathlib.Path(folder, "minilm.xz")).read(), np.uint8)
    whole = np.stack([raw[len(raw) // 2 :], raw[: len(raw) // 2]], 1).reshape(-1).view("<f2")
    tensors, start = {}, 0
    for name, shape in described["tensors"]:
        size = math.prod(shape)
        tensors[name] = torch.from_numpy(whole[start : start + size].reshape(shape).copy())
        start += size
    assert start == len(whole)
    return tensors


# ---- shards ---------------------------------------------------------------------------------------------------------


class Rank:
    """One rank of a job: its part of each matrix, an all-reduce behind the last."""

    def __init__(self, rank, world, all_reduce):
        self.rank, self.world, self.all_reduce = rank, world, all_reduce

    def heads(self, heads):
        start, end = cut(heads, self.world)[self.rank]
        return end - start

    def columns(self, weight, units):
        """The rows of `weight` (and the inputs of the next matrix) that are this rank's, in units such as heads."""
        size = len(weight) // units
        start, end = cut(units, self.world)[self.rank]
        return weight[start * size : end * size].contiguous()

    def rows(self, weight, units):
        size = weight.shape[1] // units
        start, end = cut(units, self.world)[self.rank]
        return weight[:, start * size : end * size].contiguous()

    def sum(self, x, weight):
        return self.all_reduce(F.linear(x, weight))


class AllRanks:
    """All ranks of a job in one process: each term of a sum by itself, in fp16; `code` sums them."""

    def __init__(self, world, code):
        self.world, self.code = world, code

    def heads(self, heads):
        return heads

    def columns(self, weight, units):
        return weight

    def rows(self, weight, units):
        size = weight.shape[1] // units
        return [weight[:, start * size : end * size].contiguous() for start, end in cut(units, self.world)]

    def sum(self, x, weights):
        parts = x.split([weight.shape[1] for weight in weights], -1)
        return self.code([F.linear(part.contiguous(), weight) for part, weight in zip(parts, weights)])


# ---- models ---------------------------------------------------------------------------------------------------------


class Cache:
    """Keys and values of the positions that a Llama has seen: by layer (batch, key-value heads, n_positions, head)."""

    def __init__(self, n_positions):
        self.n_positions, self.length, self.layers = n_positions, 0, {}

    def add(self, layer, k, v):
        """All keys and values of a layer, these at their end."""
        if layer not in self.layers:
            self.layers[layer] = [x.new_empty(*x.shape[:2], self.n_positions, x.shape[3]) for x in (k, v)]
        end = self.length + k.shape[2]
        for kept, new in zip(self.layers[layer], (k, v)):
            kept[:, :, self.length : end] = new
        return [kept[:, :, :end] for kept in self.layers[layer]]


class Llama:
    """Logits of a LlamaForCausalLM's weights, under their names."""

    def __init__(self, config, tensors, ranks, device, dtype=torch.float16):
        self.config, self.ranks, self.dtype = config, ranks, dtype
        get = lambda name: tensors[name].to(device, dtype)
        heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        self.head = config.get("head_dim") or config["hidden_size"] // heads
        self.group = heads // kv_heads
        inner = config["intermediate_size"]
        self.embedding, self.norm = get("model.embed_tokens.weight"), get("model.norm.weight")
        self.lm_head = get("lm_head.weight") if "lm_head.weight" in tensors else self.embedding
        self.layers = []
        for i in range(config["num_hidden_layers"]):
            layer = lambda name: get(f"model.layers.{i}.{name}.weight")
            self.layers.append(
                {
                    # Query heads go with the head that they share.
                    **{
                        name: ranks.columns(layer(f"self_attn.{name}"), kv_heads)
                        for name in ["q_proj", "k_proj", "v_proj"]
                    },
                    "o_proj": ranks.rows(layer("self_attn.o_proj"), kv_heads),
                    **{name: ranks.columns(layer(f"mlp.{name}"), inner) for name in ["gate_proj", "up_proj"]},
                    "down_proj": ranks.rows(layer("mlp.down_proj"), inner),
                    "norms": [layer("input_layernorm"), layer("post_attention_layernorm")],
                }
            )
        rope = config.get("rope_parameters") or config
        steps = torch.arange(0, self.head, 2, device=device, dtype=torch.float32) / self.head
        self.frequencies = 1.0 / rope.get("rope_theta", 10000.0) ** steps

    def rms_norm(self, x, weight):
        wide = x.float()
        scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.config["rms_norm_eps"])
        return weight * (wide * scale).to(self.dtype)

    @torch.no_grad()
    def __call__(self, ids):
        return self.logits(self.hidden(ids))

    @torch.no_grad()
    def logits(self, hidden):
        return F.linear(self.rms_norm(hidden, self.norm), self.lm_head)

    @torch.no_grad()
    def hidden(self, ids, cache=None):
        """What logits are made of: (batch, length, hidden). With a cache `ids` follow what is in there: a whole prompt
        in an empty one, then one token at a time."""
        batch, length = ids.shape
        past = cache.length if cache else 0
        assert past == 0 or length == 1, "more than a token behind others"
        angles = torch.arange(past, past + length, device=ids.device, dtype=torch.float32)[:, None] * self.frequencies
        cos, sin = (torch.cat([f(angles)] * 2, -1).to(self.dtype) for f in (torch.cos, torch.sin))

        def heads(x, weight):
            return F.linear(x, weight).view(batch, length, -1, self.head).transpose(1, 2)

        def rotate(x):
            a, b = x.chunk(2, -1)
            return x * cos + torch.cat([-b, a], -1) * sin

        hidden = F.embedding(ids, self.embedding)
        for i, layer in enumerate(self.layers):
            x = self.rms_norm(hidden, layer["norms"][0])
            q, k, v = (heads(x, layer[name]) for name in ["q_proj", "k_proj", "v_proj"])
            k = rotate(k)
            if cache:
                k, v = cache.add(i, k, v)
            k, v = (t.repeat_interleave(self.group, 1) for t in (k, v))
            x = F.scaled_dot_product_attention(rotate(q), k, v, is_causal=length > 1)
            hidden = hidden + self.ranks.sum(x.transpose(1, 2).flatten(2), layer["o_proj"])
            x = self.rms_norm(hidden, layer["norms"][1])
            x = F.silu(F.linear(x, layer["gate_proj"])) * F.linear(x, layer["up_proj"])
            hidden = hidden + self.ranks.sum(x, layer["down_proj"])
        if cache:
            cache.length += length
        return hidden


class MiniLM:
    """Sentence embeddings of all-MiniLM-L6-v2, a BERT, in fp16: the mean over the tokens, of norm 1."""

    def __init__(self, config, tensors, ranks, device):
        self.ranks, self.eps = ranks, config["layer_norm_eps"]
        get = lambda name: tensors[name].to(device, torch.float16)
        heads = config["num_attention_heads"]
        inner = config["intermediate_size"]
        self.head = config["hidden_size"] // heads
        self.embeddings = [get(f"embeddings.{name}_embeddings.weight") for name in ["word", "position", "token_type"]]
        norm = lambda name: (get(f"{name}.LayerNorm.weight"), get(f"{name}.LayerNorm.bias"))
        self.norm = norm("embeddings")
        self.layers = []
        for i in range(config["num_hidden_layers"]):
            name = f"encoder.layer.{i}."
            both = lambda linear, units: [
                ranks.columns(get(f"{name}{linear}.{kind}"), units) for kind in ("weight", "bias")
            ]
            self.layers.append(
                {
                    "qkv": [both(f"attention.self.{part}", heads) for part in ("query", "key", "value")],
                    "attention": (
                        ranks.rows(get(name + "attention.output.dense.weight"), heads),
                        get(name + "attention.output.dense.bias"),
                    ),
                    "attention_norm": norm(name + "attention.output"),
                    "inner": both("intermediate.dense", inner),
                    "output": (ranks.rows(get(name + "output.dense.weight"), inner), get(name + "output.dense.bias")),
                    "output_norm": norm(name + "output"),
                }
            )

    def layer_norm(self, x, norm):
        return F.layer_norm(x.float(), x.shape[-1:], norm[0].float(), norm[1].float(), self.eps).half()

    @torch.no_grad()
    def __call__(self, ids, mask):
        batch, length = ids.shape
        word, position, kind = self.embeddings
        x = self.layer_norm(F.embedding(ids, word) + position[:length] + kind[0], self.norm)
        bias = torch.zeros(mask.shape, dtype=torch.float16, device=x.device).masked_fill(mask == 0, -65504.0)[
            :, None, None
        ]
        for layer in self.layers:
            q, k, v = (F.linear(x, *both).view(batch, length, -1, self.head).transpose(1, 2) for both in layer["qkv"])
            y = F.scaled_dot_product_attention(q, k, v, bias.expand(-1, -1, length, -1)).transpose(1, 2).flatten(2)
            weight, add = layer["attention"]
            x = self.layer_norm(x + self.ranks.sum(y, weight) + add, layer["attention_norm"])
            y = F.gelu(F.linear(x, *layer["inner"]))
            weight, add = layer["output"]
            x = self.layer_norm(x + self.ranks.sum(y, weight) + add, layer["output_norm"])
        wide = x.float() * mask[..., None]
        return F.normalize(wide.sum(1) / mask.sum(1, keepdim=True), dim=-1)


# ---- the peers' codes, as wire/src/peers.rs has them ----------------------------------------------------------------


def symmetric(bits):
    """The value farthest from 0 becomes -2^(b-1) times the scale, which is in fp16."""
    half_range = float(1 << (bits - 1))

    def code(groups):
        farthest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
        scale = (farthest / -half_range).half().float()
        safe = torch.where(scale == 0, 1.0, scale)
        return torch.where(scale == 0, groups, (groups / safe).round().clamp(-half_range, half_range - 1) * scale)

    return code


def spikes(bits):
    """Minimum and maximum of a group travel as they are; scale and zero point, in fp16, come from the rest."""
    largest = float((1 << bits) - 1)

    def code(groups):
        places = [groups.argmin(-1, keepdim=True), groups.argmax(-1, keepdim=True)]

        def without_spikes(value):
            return groups.scatter(-1, places[0], value).scatter(-1, places[1], value)

        zero = without_spikes(torch.inf).amin(-1, keepdim=True).half().float()
        scale = ((without_spikes(-torch.inf).amax(-1, keepdim=True) - zero) / largest).half().float()
        safe = torch.where(scale == 0, 1.0, scale)
        decoded = ((groups - zero) / safe).round().clamp(0, largest) * scale + zero
        for place in places:
            decoded = decoded.scatter(-1, place, groups.gather(-1, place).half().float())
        return decoded

    return code


def power_of_two(exponent):
    return ((exponent.int() + 127) << 23).view(torch.float32)


def minifloat(x, mantissa_bits, min_exponent, largest):
    """Rounded to a float of so many mantissa bits, saturating."""
    exponent = (torch.frexp(x).exponent - 1).clamp(min=min_exponent)
    unit = power_of_two(exponent - mantissa_bits)
    return ((x / unit).round() * unit).clamp(-largest, largest)


def fp8(groups):
    scale = (groups.abs().amax(-1, keepdim=True) / 448.0).half().float()
    safe = torch.where(scale == 0, 1.0, scale)
    return torch.where(scale == 0, groups, minifloat(groups / safe, 3, -6, 448.0) * scale)


def mxfp4(groups):
    largest = groups.abs().amax(-1, keepdim=True)
    scale = power_of_two(torch.frexp(largest).exponent - 3)
    return torch.where(largest == 0, groups, minifloat(groups / scale, 1, 0, 6.0) * scale)


def two_hops(group, code):
    """The sum of the ranks' terms: each but the owner's is coded on its way to the owner, the sum on its way back."""

    def total(terms):
        shape, count, world = terms[0].shape, terms[0].numel(), len(terms)
        owner = torch.arange(0, count, group, device=terms[0].device)[:, None] // -(-count // world)
        summed = torch.zeros(count // group, group, device=terms[0].device)
        for rank, term in enumerate(terms):
            groups = term.reshape(-1, group).float()
            summed += torch.where(owner == rank, groups, code(groups))
        return code(summed).half().view(shape)

    return total


def exact(terms):
    return torch.stack(terms).float().sum(0).half()


# name: (bits per element, sum)
REFERENCES = {
    "INT8, group 32": (8.5, two_hops(32, symmetric(8))),
    "INT6, group 32": (6.5, two_hops(32, symmetric(6))),
    "INT4, group 32": (4.5, two_hops(32, symmetric(4))),
    "INT8 with spikes, group 128": (8.625, two_hops(128, spikes(8))),
    "INT6 with spikes, group 128": (6.625, two_hops(128, spikes(6))),
    "INT4 with spikes, group 128": (4.625, two_hops(128, spikes(4))),
    "INT2 with spikes, group 128": (2.625, two_hops(128, spikes(2))),
    "FP8 e4m3, group 128": (8.125, two_hops(128, fp8)),
    "MXFP4": (4.25, two_hops(32, mxfp4)),
}
