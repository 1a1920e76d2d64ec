"""A tensor-parallel Llama with random weights, fp16: transformers' own LlamaForCausalLM, sharded as Megatron shards: attention
heads and the inner width of the MLP over the ranks, an all-reduce behind o_proj and down_proj."""

import os


def add_arguments(parser):
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--inner", type=int, default=14336)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--flashcomm", default=".gpu/flashcomm")
    parser.add_argument("--seconds", type=int, default=150, help="that a job may take")
    parser.add_argument("--device", default="cuda", help="cpu: tries the program out over gloo, without flashcomm")
    parser.add_argument("--json", help="writes everything to this file")


def join(args):
    """Makes this process a rank; its number, and of how many."""
    import torch
    import torch.distributed as dist

    if args.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if args.device == "cuda" else "gloo")
    return dist.get_rank(), dist.get_world_size()


def build(args, max_positions, rank, world, all_reduce):
    """This rank's shards, the same weights whatever the world, and the generator that they were drawn from."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=args.hidden,
        intermediate_size=args.inner,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        vocab_size=args.vocabulary,
        max_position_embeddings=max_positions,
    )
    torch.set_default_dtype(torch.float16)
    with torch.device(args.device):
        model = LlamaForCausalLM(config).eval()
    model.requires_grad_(False)
    generator = torch.Generator(args.device).manual_seed(0)
    for weights in model.parameters():
        if weights.dim() == 2:
            weights.normal_(0, 0.02, generator=generator)

    def shard(linear, dim):
        linear.weight = torch.nn.Parameter(linear.weight.chunk(world, dim)[rank].clone(), requires_grad=False)

    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for linear in [attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj]:
            shard(linear, 0)
        for linear in [attention.o_proj, mlp.down_proj]:
            shard(linear, 1)
            linear.register_forward_hook(lambda module, inputs, output: all_reduce(output))
    return model, generator
