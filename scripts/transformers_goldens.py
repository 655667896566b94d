#!/usr/bin/env python3
"""Tiny random models of every family, as GGUF files, with logits by Hugging Face transformers (fp32 on the CPU).

  transformers_goldens.py tests/fixtures/transformers

Needs torch, transformers (5.23 made the committed files), gguf and numpy. Weights are rounded to the type that the
file holds before transformers sees them, so the logits differ from an exact computation by fp32 rounding only.
"""
import json
import sys
from pathlib import Path

import gguf
import numpy as np
import torch
import transformers as hf

LONG = [0, *((i * i + 7 * i) % 257 + 3 for i in range(149))]
PROMPTS = [[0, 75, 104, 111, 111, 114, 35, 90, 114, 117, 111, 103, 36, 259, 4, 200], [0, 258, 7, 7, 7, 99, 41, 180, 22]]
COMMON = dict(vocab_size=260, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
              hidden_act="silu", tie_word_embeddings=False, bos_token_id=0, eos_token_id=1, pad_token_id=2)
MLA = dict(COMMON, num_key_value_heads=4, num_hidden_layers=3, first_k_dense_replace=1, q_lora_rank=32, kv_lora_rank=48, qk_nope_head_dim=16, qk_rope_head_dim=8,
           v_head_dim=24, n_routed_experts=8, num_experts_per_tok=3, moe_intermediate_size=16, n_shared_experts=2, n_group=4, topk_group=2)


def rope(theta, **scaling):
    return {"rope_type": "default", "rope_theta": theta, **scaling}


def yarn(mscale):
    return rope(10000.0, rope_type="yarn", factor=40.0, original_max_position_embeddings=64, beta_fast=32, beta_slow=1, mscale=mscale, mscale_all_dim=mscale)


LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)
GPT_OSS = dict(COMMON, head_dim=16, num_local_experts=5, num_experts_per_tok=3, intermediate_size=32, rms_norm_eps=1e-5,
               rope_parameters=rope(150000.0, rope_type="yarn", factor=32.0, beta_fast=32.0, beta_slow=1.0, truncate=False, original_max_position_embeddings=4096))
# name -> (architecture in GGUF, transformers' class, configuration, joined kv_b)
FAMILIES = {
    "llama": ("llama", "Llama", dict(COMMON, rms_norm_eps=1e-5, rope_parameters=rope(10000.0)), False),
    "llama3_tied": ("llama", "Llama", dict(COMMON, tie_word_embeddings=True, rms_norm_eps=1e-5, rope_parameters=rope(500000.0, **LLAMA3)), False),
    "mixtral": ("llama", "Mixtral", dict(COMMON, intermediate_size=64, num_local_experts=5, num_experts_per_tok=2, rms_norm_eps=1e-5, rope_parameters=rope(1e6)), False),
    "qwen2": ("qwen2", "Qwen2", dict(COMMON, rms_norm_eps=1e-6, rope_parameters=rope(1e6)), False),
    "qwen2moe": ("qwen2moe", "Qwen2Moe", dict(COMMON, num_experts=5, num_experts_per_tok=3, moe_intermediate_size=32, shared_expert_intermediate_size=80, norm_topk_prob=False,
                 rms_norm_eps=1e-6, rope_parameters=rope(1e6)), False),
    "qwen3": ("qwen3", "Qwen3", dict(COMMON, head_dim=24, rms_norm_eps=1e-6, rope_parameters=rope(1e6)), False),
    "qwen3_yarn": ("qwen3", "Qwen3", dict(COMMON, head_dim=24, rms_norm_eps=1e-6, rope_parameters=rope(10000.0, rope_type="yarn", factor=4.0, original_max_position_embeddings=64)), False),
    "qwen3moe": ("qwen3moe", "Qwen3Moe", dict(COMMON, head_dim=24, num_experts=7, num_experts_per_tok=3, moe_intermediate_size=32, norm_topk_prob=True, rms_norm_eps=1e-6,
                 rope_parameters=rope(1e6)), False),
    "deepseek_v2": ("deepseek2", "DeepseekV2", dict(MLA, topk_method="group_limited_greedy", norm_topk_prob=False, routed_scaling_factor=4.0, rms_norm_eps=1e-6,
                    rope_parameters=yarn(0.707)), True),
    "deepseek_v2_lite": ("deepseek2", "DeepseekV2", dict(MLA, q_lora_rank=None, topk_method="greedy", n_group=1, topk_group=1, norm_topk_prob=False, routed_scaling_factor=1.0,
                         rms_norm_eps=1e-6, rope_parameters=yarn(0.707)), True),
    "deepseek_v3": ("deepseek2", "DeepseekV3", dict(MLA, n_shared_experts=1, norm_topk_prob=True, routed_scaling_factor=2.5, rms_norm_eps=1e-6, rope_parameters=yarn(1.0)), False),
    "deepseek_v3_joined": ("deepseek2", "DeepseekV3", dict(MLA, n_shared_experts=1, norm_topk_prob=True, routed_scaling_factor=2.5, rms_norm_eps=1e-6, rope_parameters=yarn(1.0)), True),
    "moonlight": ("deepseek2", "DeepseekV3", dict(MLA, q_lora_rank=None, n_group=1, topk_group=1, norm_topk_prob=True, routed_scaling_factor=2.446, rms_norm_eps=1e-5,
                  rope_parameters=rope(50000.0)), False),
    "gpt_oss": ("gpt-oss", "GptOss", dict(GPT_OSS, sliding_window=5), False),
    "gpt_oss_mxfp4": ("gpt-oss", "GptOss", dict(GPT_OSS, sliding_window=70), False),
}
MXFP4 = {"gpt_oss_mxfp4"}
NAMES = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm", "self_attn.q_a_proj": "attn_q_a",
    "self_attn.q_a_layernorm": "attn_q_a_norm", "self_attn.q_b_proj": "attn_q_b", "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "self_attn.kv_a_layernorm": "attn_kv_a_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "mlp.gate": "ffn_gate_inp",
    "mlp.router": "ffn_gate_inp",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp", **{f"mlp.shared_expert{s}.{n}_proj": f"ffn_{n}_shexp" for s in ("", "s") for n in ("gate", "up", "down")},
}


def in_single_precision(key: str) -> bool:
    return "norm" in key or "bias" in key or key.endswith(("mlp.gate.weight", "mlp.router.weight", "shared_expert_gate.weight", "sinks"))


def stacks(key: str, w):
    """gpt-oss keeps experts [experts, in, out], gate and up by turns: (projection, [experts, out, in]) of a tensor or its bias."""
    w = w.swapaxes(1, 2) if w.ndim == 3 else w
    return [("gate", w[:, ::2]), ("up", w[:, 1::2])] if "gate_up" in key else [("down", w)]


def to_mxfp4(key: str, w):
    """Rounds experts to what blocks of MXFP4 hold."""
    for _, part in stacks(key, w.numpy()):
        blocks = gguf.quantize(np.ascontiguousarray(part), gguf.GGMLQuantizationType.MXFP4)
        part[...] = gguf.dequantize(blocks, gguf.GGMLQuantizationType.MXFP4)

@torch.no_grad()
def randomise(model, seed: int, mxfp4: bool) -> None:
    """Weights that keep activations near unit size; what the file holds in half precision is rounded to it."""
    g = torch.Generator().manual_seed(seed)
    for key, w in sorted(model.state_dict().items()):
        x = torch.randn(w.shape, generator=g)
        if "norm" in key:
            x = 1 + 0.2 * x
        elif "bias" in key:
            x *= 0.2
        elif "embed_tokens" not in key and "sinks" not in key:
            transposed = model.config.model_type == "gpt_oss" and "experts" in key
            gain = 3 if "lm_head" in key or key.endswith(("mlp.gate.weight", "router.weight")) or transposed else 2 if ".q_" in key else 1
            x *= gain * w.shape[-2 if transposed else -1] ** -0.5
        w.copy_(x if in_single_precision(key) else x.half().float())
        if mxfp4 and key.endswith("_proj") and "experts" in key:
            to_mxfp4(key, w)
    if model.config.tie_word_embeddings:
        model.tie_weights()


def permute(w, heads: int):
    """Rows in the order in which rotating adjacent pairs does what rotating halves did."""
    return w.reshape(heads, 2, w.shape[0] // heads // 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def layer_tensors(key: str, w, c, arch: str, joined: bool):
    """(name, array) for one of transformers' tensors, without the `blk.N.` prefix."""
    part, kind = key.rsplit(".", 1)
    if part == "self_attn.kv_b_proj":
        if joined:
            return [("attn_kv_b.weight", w)]
        kv = w.reshape(c.num_attention_heads, -1, c.kv_lora_rank)
        return [("attn_k_b.weight", kv[:, :c.qk_nope_head_dim].transpose(0, 2, 1)), ("attn_v_b.weight", kv[:, c.qk_nope_head_dim:])]
    if arch == "gpt-oss" and "experts" in key:
        return [(f"ffn_{name}_exps.{'bias' if 'bias' in key else 'weight'}", x) for name, x in stacks(key, w)]
    if arch == "gpt-oss" and part == "post_attention_layernorm":
        return [("post_attention_norm.weight", w)]
    if kind == "sinks":
        return [("attn_sinks.weight", w)]
    if key == "mlp.experts.gate_up_proj":
        half = w.shape[1] // 2
        return [("ffn_gate_exps.weight", w[:, :half]), ("ffn_up_exps.weight", w[:, half:])]
    if key == "mlp.experts.down_proj":
        return [("ffn_down_exps.weight", w)]
    if kind == "e_score_correction_bias":
        return [("exp_probs_b.bias", w)]
    if arch == "llama" and part == "self_attn.q_proj":
        w = permute(w, c.num_attention_heads)
    if arch == "llama" and part == "self_attn.k_proj":
        w = permute(w, c.num_key_value_heads)
    if part == "mlp.shared_expert_gate":
        w = w.reshape(-1)
    return [(f"{NAMES[part]}.{kind}", w)]


def tensors(model, arch: str, joined: bool):
    ends = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight", "lm_head.weight": "output.weight"}
    for key, w in model.state_dict().items():
        x = w.numpy().astype(np.float32 if in_single_precision(key) else np.float16)
        if key == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        if key in ends:
            yield ends[key], x
            continue
        _, _, layer, rest = key.split(".", 3)
        for name, y in layer_tensors(rest, x, model.config, arch, joined):
            yield f"blk.{layer}.{name}", np.ascontiguousarray(y)
    if model.config.rope_parameters["rope_type"] == "llama3":
        frequencies = model.model.rotary_emb.inv_freq.numpy()
        plain = model.config.rope_parameters["rope_theta"] ** -(np.arange(len(frequencies)) / len(frequencies))
        yield "rope_freqs.weight", (plain / frequencies).astype(np.float32)


def attention_metadata(w, c, arch: str, joined: bool) -> None:
    w.add_head_count(c.num_attention_heads)
    if arch != "deepseek2":
        head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
        w.add_head_count_kv(c.num_key_value_heads)
        w.add_key_length(head_dim)
        w.add_value_length(head_dim)
        w.add_rope_dimension_count(head_dim)
        return
    key = c.qk_nope_head_dim + c.qk_rope_head_dim
    w.add_head_count_kv(c.num_attention_heads if joined else 1)
    w.add_key_length(key if joined else c.kv_lora_rank + c.qk_rope_head_dim)
    w.add_value_length(c.v_head_dim if joined else c.kv_lora_rank)
    if not joined:
        w.add_key_length_mla(key)
        w.add_value_length_mla(c.v_head_dim)
    w.add_rope_dimension_count(c.qk_rope_head_dim)
    w.add_kv_lora_rank(c.kv_lora_rank)
    if c.q_lora_rank:
        w.add_q_lora_rank(c.q_lora_rank)


def rope_metadata(w, c) -> None:
    p = c.rope_parameters
    w.add_rope_freq_base(p["rope_theta"])
    if p["rope_type"] == "yarn":
        w.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        w.add_rope_scaling_factor(p["factor"])
        w.add_rope_scaling_orig_ctx_len(p["original_max_position_embeddings"])
        if p.get("mscale_all_dim"):
            w.add_rope_scaling_yarn_log_mul(0.1 * p["mscale_all_dim"])


def expert_metadata(w, c, arch: str, cls: str) -> None:
    count = next((n for n in (getattr(c, k, None) for k in ("n_routed_experts", "num_experts", "num_local_experts")) if n), None)
    if not count:
        return
    w.add_expert_count(count)
    w.add_expert_used_count(c.num_experts_per_tok)
    if arch == "gpt-oss":
        w.add_expert_feed_forward_length(c.intermediate_size)
        w.add_sliding_window(c.sliding_window)
        return
    if arch != "llama":
        w.add_expert_feed_forward_length(c.moe_intermediate_size)
    if arch == "qwen2moe":
        w.add_expert_shared_feed_forward_length(c.shared_expert_intermediate_size)
    if arch == "deepseek2":
        w.add_leading_dense_block_count(c.first_k_dense_replace)
        w.add_expert_shared_count(c.n_shared_experts)
        w.add_expert_weights_scale(c.routed_scaling_factor)
        w.add_expert_weights_norm(c.norm_topk_prob)
        w.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID if cls == "DeepseekV3" else gguf.ExpertGatingFuncType.SOFTMAX)
        if c.n_group > 1:
            w.add_expert_group_count(c.n_group)
            w.add_expert_group_used_count(c.topk_group)


def tokenizer_metadata(w, arch: str) -> None:
    """Three special tokens, the bytes in GPT-2's alphabet, one merge."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    other = iter(range(256, 512))
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre({"llama": "llama-bpe", "deepseek2": "deepseek-v3", "gpt-oss": "gpt-4o"}.get(arch, "qwen2"))
    w.add_token_list(["<|begin|>", "<|end|>", "<|pad|>", *(chr(b if b in printable else next(other)) for b in range(256)), "th"])
    w.add_token_types([gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * 257)
    w.add_token_merges(["t h"])
    w.add_bos_token_id(0)
    w.add_eos_token_id(1)
    w.add_pad_token_id(2)
    w.add_add_bos_token(True)


def export(model, name: str, arch: str, cls: str, joined: bool, out: Path) -> None:
    c = model.config
    w = gguf.GGUFWriter(out, arch)
    w.add_name(f"tiny random {name}")
    w.add_block_count(c.num_hidden_layers)
    w.add_context_length(c.max_position_embeddings)
    w.add_embedding_length(c.hidden_size)
    w.add_feed_forward_length(c.intermediate_size)
    w.add_vocab_size(c.vocab_size)
    w.add_layer_norm_rms_eps(c.rms_norm_eps)
    attention_metadata(w, c, arch, joined)
    rope_metadata(w, c)
    expert_metadata(w, c, arch, cls)
    tokenizer_metadata(w, arch)
    for tensor_name, x in tensors(model, arch, joined):
        if name in MXFP4 and tensor_name.endswith("exps.weight"):
            w.add_tensor(tensor_name, gguf.quantize(x.astype(np.float32), gguf.GGMLQuantizationType.MXFP4), raw_dtype=gguf.GGMLQuantizationType.MXFP4)
        else:
            w.add_tensor(tensor_name, x)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def rounded(logits):
    return [float(f"{x:.8g}") for x in logits.tolist()]


@torch.no_grad()
def main() -> None:
    out = Path(sys.argv[1])
    out.mkdir(exist_ok=True)
    cases = []
    for seed, (name, (arch, cls, config, joined)) in enumerate(FAMILIES.items(), 1):
        config = getattr(hf, cls + "Config")(**config)
        config._attn_implementation = "eager"
        model = getattr(hf, cls + "ForCausalLM")(config).float().eval()
        randomise(model, seed, name in MXFP4)
        file = out / f"{name}.gguf"
        export(model, name, arch, cls, joined, file)
        logits = [rounded(model(torch.tensor([ids]), use_cache=False).logits[0, -1]) for ids in PROMPTS]
        case = {"model": file.name, "reference": cls + "ForCausalLM", "logits": logits}
        if getattr(config, "sliding_window", None):
            case["long_logits"] = rounded(model(torch.tensor([LONG]), use_cache=False).logits[0, -1])
        cases.append(case)
        print(f"{file}: {file.stat().st_size} bytes, logits of size {np.std(logits):.2f}")
    goldens = {"reference": f"transformers {hf.__version__}, torch {torch.__version__}, fp32 on the CPU", "prompts": PROMPTS, "long_prompt": LONG, "cases": cases}
    (out / "goldens.json").write_text(json.dumps(goldens, separators=(",", ":")).replace('},{"', '},\n{"') + "\n")


if __name__ == "__main__":
    main()
