#!/usr/bin/env python3
"""A model folder for `vllm serve --load-format dummy`: a Llama's config.json and a tokenizer of single bytes, no weights.

    make_model.py FOLDER [--shape llama-3-8b] [--layers N] [--dtype float16]

Needs transformers (with tokenizers), which vLLM brings.
"""

import argparse
import json
import pathlib

SHAPES = {  # hidden, layers, heads, KV heads, intermediate, vocabulary, rope's theta
    "llama-3-8b": (4096, 32, 32, 8, 14336, 128256, 500000.0),
    "llama-3.2-1b": (2048, 16, 32, 8, 8192, 128256, 500000.0),
    "llama-2-13b": (5120, 40, 40, 40, 13824, 32000, 10000.0),
}
POSITIONS = 8192


def config(shape, layers, dtype):
    hidden, n_layers, heads, kv_heads, intermediate, vocabulary, theta = SHAPES[shape]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "num_hidden_layers": layers or n_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": hidden // heads,
        "intermediate_size": intermediate,
        "vocab_size": vocabulary,
        "max_position_embeddings": POSITIONS,
        "rope_theta": theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "dtype": dtype,
        "torch_dtype": dtype,
    }


def tokenizer(vocabulary):
    """A token for each byte, and names without meaning for the rest of the vocabulary."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    names += [f"<{n}>" for n in range(len(names), vocabulary)]
    made = Tokenizer(models.BPE(vocab={name: n for n, name in enumerate(names)}, merges=[], unk_token="<unk>"))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=POSITIONS, **special)


def main():
    parser = argparse.ArgumentParser(description="a model folder without weights")
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--shape", default="llama-3-8b", choices=sorted(SHAPES))
    parser.add_argument("--layers", type=int, help="another number of layers")
    parser.add_argument("--dtype", default="float16", choices=["float16", "bfloat16"])
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    made = config(args.shape, args.layers, args.dtype)
    (args.folder / "config.json").write_text(json.dumps(made, indent=1))
    tokenizer(made["vocab_size"]).save_pretrained(args.folder)
    print(args.folder)


if __name__ == "__main__":
    main()
