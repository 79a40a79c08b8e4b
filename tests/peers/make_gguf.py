"""Converts a bf16 checkpoint of `moemesh bench make-checkpoint` to GGUF for llama.cpp.

    python tests/peers/make_gguf.py bench-m bench-m.gguf
    python tests/peers/make_gguf.py bench-m bench-m-q8_0.gguf --type q8_0

Needs numpy and gguf (see README.md). Tensor by tensor, in the layout that llama.cpp's deepseek2
architecture takes: experts stacked, kv_b split into its key part (transposed) and its value part,
which makes attention one shared latent head. Norms, gates and biases are f32. Bytes of bf16 weights are
copied, not converted.
"""

import argparse
import json
import sys
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type

ATTENTION = {
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.q_a_proj.weight": "attn_q_a.weight",
    "self_attn.q_a_layernorm.weight": "attn_q_a_norm.weight",
    "self_attn.q_b_proj.weight": "attn_q_b.weight",
    "self_attn.kv_a_proj_with_mqa.weight": "attn_kv_a_mqa.weight",
    "self_attn.kv_a_layernorm.weight": "attn_kv_a_norm.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
}
SINGLE = {
    "mlp.gate.weight": "ffn_gate_inp.weight",
    "mlp.gate.e_score_correction_bias": "exp_probs_b.bias",
}
TOP = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


class Safetensors:
    """One mapped file."""

    def __init__(self, path):
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            self.entries = json.loads(file.read(length))
        self.entries.pop("__metadata__", None)
        self.data = np.memmap(path, np.uint8, "r", offset=8 + length)

    def __contains__(self, name):
        return name in self.entries

    def get(self, name):
        """As it is stored: f32, or the bits of bf16 as uint16."""
        entry = self.entries[name]
        dtype = {"BF16": np.uint16, "F32": np.float32}.get(entry["dtype"])
        if dtype is None:
            sys.exit(f"{name} is {entry['dtype']}: only bf16 checkpoints are converted")
        start, end = entry["data_offsets"]
        return self.data[start:end].view(dtype).reshape(entry["shape"])


def widened(array):
    if array.dtype == np.float32:
        return np.ascontiguousarray(array)
    return (array.astype(np.uint32) << 16).view(np.float32)


def tensors(source, config):
    """Names of the target and how to make each."""
    heads, nope, value = (config[k] for k in ("num_attention_heads", "qk_nope_head_dim", "v_head_dim"))
    rank = config["kv_lora_rank"]
    for name, target in TOP.items():
        yield target, lambda name=name: source.get(name)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        for name, target in {**ATTENTION, **SINGLE}.items():
            if prefix + name in source:
                yield f"blk.{layer}.{target}", lambda name=prefix + name: source.get(name)
        up = lambda prefix=prefix: source.get(f"{prefix}self_attn.kv_b_proj.weight").reshape(heads, nope + value, rank)
        yield f"blk.{layer}.attn_k_b.weight", lambda up=up: up()[:, :nope].transpose(0, 2, 1)
        yield f"blk.{layer}.attn_v_b.weight", lambda up=up: up()[:, nope:]
        for part in ("gate", "up", "down"):
            name = f"{prefix}mlp.%s{part}_proj.weight"
            if name % "" in source:
                yield f"blk.{layer}.ffn_{part}.weight", lambda name=name % "": source.get(name)
                continue
            shared = name % "shared_experts."
            yield f"blk.{layer}.ffn_{part}_shexp.weight", lambda name=shared: source.get(name)
            yield f"blk.{layer}.ffn_{part}_exps.weight", lambda name=name: np.stack(
                [source.get(name % f"experts.{e}.") for e in range(config["n_routed_experts"])]
            )


def stored(name, array, kind):
    """The bytes of a tensor and their type."""
    if array.ndim == 1 or "ffn_gate_inp" in name:
        return widened(array), Type.F32
    if kind == Type.BF16:
        return np.ascontiguousarray(array).view(np.uint8), kind
    return gguf.quants.quantize(widened(array), kind), kind


def describe(writer, config, kind):
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16 if kind == Type.BF16 else gguf.LlamaFileType.MOSTLY_Q8_0)
    writer.add_name("bench")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_rope_dimension_count(config["qk_rope_head_dim"])
    writer.add_vocab_size(config["vocab_size"])
    if config["q_lora_rank"]:
        writer.add_q_lora_rank(config["q_lora_rank"])
    writer.add_kv_lora_rank(config["kv_lora_rank"])
    writer.add_key_length(config["kv_lora_rank"] + config["qk_rope_head_dim"])
    writer.add_value_length(config["kv_lora_rank"])
    writer.add_key_length_mla(config["qk_nope_head_dim"] + config["qk_rope_head_dim"])
    writer.add_value_length_mla(config["v_head_dim"])
    writer.add_leading_dense_block_count(config["first_k_dense_replace"])
    writer.add_expert_count(config["n_routed_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_expert_shared_count(config["n_shared_experts"])
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_expert_group_count(config["n_group"])
    writer.add_expert_group_used_count(config["topk_group"])
    writer.add_expert_weights_scale(config["routed_scaling_factor"])
    writer.add_expert_weights_norm(config["norm_topk_prob"])
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)


def add_tokenizer(writer, config, tokenizer):
    model = tokenizer["model"]
    special = {token["content"] for token in tokenizer["added_tokens"]}
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL if t in special else gguf.TokenType.NORMAL for t in tokens])
    writer.add_token_merges([" ".join(merge) for merge in model["merges"]])
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_add_bos_token(False)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--type", choices=["bf16", "q8_0"], default="bf16")
    args = parser.parse_args()
    if args.output.exists():
        sys.exit(f"{args.output} exists")
    kind = Type[args.type.upper()]
    config = json.loads((args.checkpoint / "config.json").read_text())
    source = Safetensors(args.checkpoint / "model.safetensors")

    writer = gguf.GGUFWriter(args.output, "deepseek2")
    describe(writer, config, kind)
    add_tokenizer(writer, config, json.loads((args.checkpoint / "tokenizer.json").read_text()))
    # Twice through the tensors, so that one at a time is in memory.
    for name, make in tensors(source, config):
        array, dtype = stored(name, make(), kind)
        writer.add_tensor_info(name, array.shape, array.dtype, array.nbytes, raw_dtype=dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, make in tensors(source, config):
        writer.write_tensor_data(stored(name, make(), kind)[0])
    writer.close()
    print(f"{args.output}: {args.output.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
