#!/usr/bin/env python3
"""A tiny random model of DeepSeek-V3's architecture in two files, as KTransformers' FP8 rule files want them, with logits by transformers.

  fp8_goldens.py tests/fixtures/fp8

`model.safetensors` has the linear modules in 8-bit floats with a scale for each block of 128 x 128 (`weight_scale_inv`), the rest in BF16 or F32, under
Hugging Face's names; `model.gguf` has metadata, tokenizer and the routed experts in Q8_0, and nothing else. transformers computes in fp32 with the
weights that the files hold, so the logits differ from an exact computation by fp32 rounding only.

Needs what transformers_goldens.py needs, and safetensors.
"""
import json
import sys
from pathlib import Path

import gguf
import numpy as np
import torch
import transformers as hf
from safetensors.torch import save_file

import transformers_goldens as tiny

BLOCK = 128
LARGEST = 448.0
CONFIG = dict(tiny.MLA, hidden_size=160, intermediate_size=136, num_hidden_layers=2, q_lora_rank=136, kv_lora_rank=64, n_routed_experts=4, n_group=2, topk_group=1,
              num_experts_per_tok=2, moe_intermediate_size=32, n_shared_experts=1, norm_topk_prob=True, routed_scaling_factor=2.5, rms_norm_eps=1e-6,
              rope_parameters=tiny.yarn(1.0))


def to_fp8(w):
    """(codes, scales, values) of a matrix, block by block."""
    rows, cols = (-(-n // BLOCK) for n in w.shape)
    scales = torch.empty(rows, cols)
    for i in range(rows):
        for j in range(cols):
            scales[i, j] = w[i * BLOCK:(i + 1) * BLOCK, j * BLOCK:(j + 1) * BLOCK].abs().max() / LARGEST
    wide = scales.repeat_interleave(BLOCK, 0)[:w.shape[0]].repeat_interleave(BLOCK, 1)[:, :w.shape[1]]
    codes = (w / wide).to(torch.float8_e4m3fn)
    return codes, scales, codes.float() * wide


def to_q8_0(w):
    """(blocks, values) of the last dimension's rows."""
    blocks = gguf.quants.quantize(w.numpy(), gguf.GGMLQuantizationType.Q8_0)
    return blocks, torch.from_numpy(gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType.Q8_0))


def experts(key, w):
    """GGUF names and matrices of one of transformers' tensors of all experts."""
    layer = key.split(".")[2]
    if key.endswith("down_proj"):
        return {f"blk.{layer}.ffn_down_exps.weight": w}
    half = w.shape[1] // 2
    return {f"blk.{layer}.ffn_gate_exps.weight": w[:, :half], f"blk.{layer}.ffn_up_exps.weight": w[:, half:]}


@torch.no_grad()
def quantise(model):
    """Rounds the weights to what the files hold; gives the tensors of both files."""
    checkpoint, blocks = {}, {}
    for key, w in model.state_dict().items():
        if ".mlp.experts." in key:
            values = []
            for name, part in experts(key, w).items():
                blocks[name], rounded = to_q8_0(part.contiguous())
                values.append(rounded)
            w.copy_(torch.cat(values, 1))
        elif key.endswith("e_score_correction_bias"):
            checkpoint[key] = w.clone()
        elif key.endswith("_proj.weight") or key.endswith("kv_a_proj_with_mqa.weight"):
            codes, scales, values = to_fp8(w)
            checkpoint |= {key: codes, f"{key}_scale_inv": scales}
            w.copy_(values)
        else:
            checkpoint[key] = w.bfloat16()
            w.copy_(checkpoint[key].float())
    return checkpoint, blocks


def write_gguf(c, blocks, out: Path) -> None:
    w = gguf.GGUFWriter(out, "deepseek2")
    w.add_name("tiny random deepseek_v3, experts only")
    w.add_block_count(c.num_hidden_layers)
    w.add_context_length(c.max_position_embeddings)
    w.add_embedding_length(c.hidden_size)
    w.add_feed_forward_length(c.intermediate_size)
    w.add_vocab_size(c.vocab_size)
    w.add_layer_norm_rms_eps(c.rms_norm_eps)
    tiny.attention_metadata(w, c, "deepseek2", False)
    tiny.rope_metadata(w, c)
    tiny.expert_metadata(w, c, "deepseek2", "DeepseekV3")
    tiny.tokenizer_metadata(w, "deepseek2")
    for name, x in blocks.items():
        w.add_tensor(name, x, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


@torch.no_grad()
def main() -> None:
    out = Path(sys.argv[1])
    out.mkdir(exist_ok=True)
    config = hf.DeepseekV3Config(**CONFIG)
    config._attn_implementation = "eager"
    model = hf.DeepseekV3ForCausalLM(config).float().eval()
    tiny.randomise(model, 31)
    checkpoint, blocks = quantise(model)
    save_file(checkpoint, out / "model.safetensors", metadata={"format": "pt"})
    (out / "model.safetensors").chmod(0o644)
    write_gguf(config, blocks, out / "model.gguf")
    logits = [[float(f"{x:.8g}") for x in model(torch.tensor([ids]), use_cache=False).logits[0, -1].tolist()] for ids in tiny.PROMPTS]
    goldens = {"reference": f"transformers {hf.__version__}, torch {torch.__version__}, fp32 on the CPU", "prompts": tiny.PROMPTS, "logits": logits}
    (out / "goldens.json").write_text(json.dumps(goldens, separators=(",", ":")) + "\n")
    print(f"logits of size {np.std(logits):.2f}")


if __name__ == "__main__":
    main()
