#!/usr/bin/env python3
"""Random adapters for the tiny models of transformers_goldens.py, with logits by peft on transformers (fp32 on the CPU).

  peft_goldens.py tests/fixtures/adapters

Needs torch, transformers, peft (0.21 made the committed files), safetensors, gguf and numpy. An adapter is a PEFT
directory, and the same matrices as a GGUF adapter with the names and shapes of llama.cpp's convert_lora_to_gguf.py.
Matrices are rounded to half precision before peft sees them, so the logits differ from an exact computation by fp32
rounding only.
"""
import json
import re
import sys
from pathlib import Path

import gguf
import numpy as np
import peft
import torch
import transformers as hf
from safetensors.torch import save_file

from transformers_goldens import FAMILIES, NAMES, PROMPTS, permute, randomise

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
LATENT = ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]
FFN = ["gate_proj", "up_proj", "down_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
# Of models whose experts are two parameters, transformers takes FFN for these parameters, the fused one with twice the rank.
# name -> (base, LoraConfig's arguments)
ADAPTERS = {
    "llama_all": ("llama", dict(r=4, lora_alpha=10, target_modules=ATTENTION + FFN, rank_pattern={"layers.1.mlp.up_proj": 7, "k_proj": 3}, alpha_pattern={r"model\.layers\.0\..*q_proj": 3})),
    "llama_ends": ("llama", dict(r=6, lora_alpha=5, use_rslora=True, target_modules=["q_proj", "v_proj", "embed_tokens", "lm_head"])),
    "deepseek_v3_all": ("deepseek_v3", dict(r=4, lora_alpha=8, target_modules=LATENT + FFN, target_parameters=[*EXPERTS, "mlp.gate.weight"])),
    "deepseek_v3_kv": ("deepseek_v3", dict(r=5, lora_alpha=12, target_modules=["kv_b_proj"])),
    "deepseek_v3_joined_kv": ("deepseek_v3_joined", dict(r=5, lora_alpha=12, target_modules=["kv_b_proj", "q_b_proj"])),
    "qwen3moe_all": ("qwen3moe", dict(r=4, lora_alpha=6, target_modules=ATTENTION, target_parameters=[*EXPERTS, "mlp.gate.weight"])),
    "qwen3moe_experts": ("qwen3moe", dict(r=3, lora_alpha=6, target_modules=[], target_parameters=[*EXPERTS, "mlp.gate.weight"])),
}
# base -> sets of adapters with scales
CASES = {
    "llama": [[("llama_all", 1.0)], [("llama_ends", 1.0)], [("llama_all", 0.5), ("llama_ends", -1.5)]],
    "deepseek_v3": [[("deepseek_v3_all", 1.0)], [("deepseek_v3_kv", 1.0)], [("deepseek_v3_all", 0.7), ("deepseek_v3_kv", 1.3)]],
    "deepseek_v3_joined": [[("deepseek_v3_joined_kv", 1.0)]],
    "qwen3moe": [[("qwen3moe_all", 1.0)], [("qwen3moe_experts", 1.0)], [("qwen3moe_all", 1.25), ("qwen3moe_experts", 0.75)]],
}
# Adapters that are also written with a name for each expert's projection, as peft did before experts were one parameter.
PER_EXPERT = ["qwen3moe_experts"]


def base_model(name: str):
    _, cls, config, _ = FAMILIES[name]
    config = getattr(hf, cls + "Config")(**config)
    config._attn_implementation = "eager"
    model = getattr(hf, cls + "ForCausalLM")(config).float().eval()
    randomise(model, 1 + list(FAMILIES).index(name))
    return model


@torch.no_grad()
def randomise_adapter(model, adapter: str, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    for key, w in sorted(model.named_parameters()):
        if f".{adapter}" in key and "lora_" in key:
            w.copy_((torch.randn(w.shape, generator=g) * 0.8 * w.shape[-1] ** -0.5).half().float())


def separate_experts(state: dict, c) -> dict:
    """Fused experts' matrices, A `[experts * rank, in]` and B `[out, rank * experts]`, as one pair for each projection."""
    experts = getattr(c, "n_routed_experts", None) or getattr(c, "num_experts", 1)
    out = {}
    for key, a in state.items():
        found = re.fullmatch(r"(.*\.mlp\.experts)(?:\.base_layer)?\.lora_A\.weight", key)
        if not found:
            if not re.search(r"\.mlp\.experts(\.base_layer)?\.lora_B\.weight$", key):
                out[key] = a
            continue
        b = state[key.replace("lora_A", "lora_B")]
        a = a.reshape(experts, -1, a.shape[-1])
        b = b.reshape(b.shape[0], -1, experts).permute(2, 0, 1)
        half = b.shape[1] // 2
        parts = {"down_proj": b} if a.shape[-1] == c.moe_intermediate_size else {"gate_proj": b[:, :half], "up_proj": b[:, half:]}
        for name, rows in parts.items():
            for e in range(experts):
                out[f"{found[1]}.{e}.{name}.lora_A.weight"] = a[e].clone()
                out[f"{found[1]}.{e}.{name}.lora_B.weight"] = rows[e].clone()
    return out


def gguf_tensors(state: dict, scalings: dict, alpha: float, arch: str, c):
    """(name, A, B) as llama.cpp's converter names and stacks them. It knows one alpha: what other scalings add goes into B."""
    stacks = {}
    for key, a in separate_experts(state, c).items():
        found = re.fullmatch(r"base_model\.model\.(.*)\.lora_(?:A\.weight|embedding_A)", key)
        if not found:
            continue
        path = found[1]
        b = state.get(key.replace("_A", "_B"), None)
        b = (separate_experts(state, c)[key.replace("_A", "_B")] if b is None else b).numpy()
        a = a.numpy()
        rank = b.shape[-1]
        factor = scalings[re.sub(r"(\.experts)\..*", r"\1", path)] / (alpha / rank)
        b = b if abs(factor - 1) < 1e-9 else (b.astype(np.float64) * factor).astype(np.float32)
        if path == "model.embed_tokens":
            yield "token_embd.weight", a.T, b
        elif path == "lm_head":
            yield "output.weight", a, b
        else:
            layer, part = re.fullmatch(r"model\.layers\.(\d+)\.(.*)", path).groups()
            if arch == "llama" and part in ("self_attn.q_proj", "self_attn.k_proj"):
                b = permute(b, c.num_attention_heads if "q_proj" in part else c.num_key_value_heads)
            expert = re.fullmatch(r"mlp\.experts\.(\d+)\.(\w+)_proj", part)
            if expert:
                stacks.setdefault(f"blk.{layer}.ffn_{expert[2]}_exps.weight", []).append((a, b))
            else:
                yield f"blk.{layer}.{ {**NAMES, 'self_attn.kv_b_proj': 'attn_kv_b'}[part]}.weight", a, b
    for name, parts in stacks.items():
        yield name, np.stack([a for a, _ in parts]), np.stack([b for _, b in parts])


def half(x):
    """In half precision where that loses nothing."""
    y = np.ascontiguousarray(x).astype(np.float16)
    return y if np.array_equal(y.astype(np.float32), x) else np.ascontiguousarray(x, dtype=np.float32)


def write_gguf(file: Path, tensors, arch: str, alpha: float) -> None:
    w = gguf.GGUFWriter(file, arch)
    w.add_type("adapter")
    w.add_string("adapter.type", "lora")
    w.add_float32("adapter.lora.alpha", alpha)
    for name, a, b in tensors:
        w.add_tensor(f"{name}.lora_a", half(a))
        w.add_tensor(f"{name}.lora_b", half(b))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def write_peft(directory: Path, config, state: dict, **changes) -> None:
    directory.mkdir(exist_ok=True)
    text = {k: sorted(v) if isinstance(v, set) else v for k, v in config.to_dict().items()}
    text.update(peft_type="LORA", inference_mode=True, **changes)
    (directory / "adapter_config.json").write_text(json.dumps(text, indent=2) + "\n")
    save_file({k: v.half().contiguous() for k, v in state.items()}, directory / "adapter_model.safetensors", metadata={"format": "pt"})


def add(model, name: str, seed: int):
    """The model with one more adapter of random matrices."""
    _, arguments = ADAPTERS[name]
    config = peft.LoraConfig(**arguments)
    if isinstance(model, peft.PeftModel):
        model.add_adapter(name, config)
    else:
        model = peft.get_peft_model(model, config, adapter_name=name)
    randomise_adapter(model, name, seed)
    return model.eval()


def layers(model, name: str):
    return {path: m for path, m in model.base_model.model.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer) and name in m.scaling}


def export(model, name: str, arch: str, out: Path) -> None:
    config = model.peft_config[name]
    state = peft.get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    write_peft(out / name, config, state)
    c = model.config
    if name in PER_EXPERT:
        targets = sorted([*(config.target_modules or []), *FFN])
        write_peft(out / f"{name}_separate", config, separate_experts(state, c), target_modules=targets, target_parameters=None)
    scalings = {re.sub(r"(\.base_layer)+$", "", path): m.scaling[name] for path, m in layers(model, name).items()}
    write_gguf(out / f"{name}.gguf", gguf_tensors(state, scalings, config.lora_alpha, arch, c), arch, config.lora_alpha)


@torch.no_grad()
def logits(model, chosen):
    model.base_model.set_adapter([name for name, _ in chosen])
    for name, scale in chosen:
        for m in layers(model, name).values():
            m.set_scale(name, scale)
    return [[float(f"{x:.8g}") for x in model(torch.tensor([ids]), use_cache=False).logits[0, -1].tolist()] for ids in PROMPTS]


def main() -> None:
    out = Path(sys.argv[1])
    out.mkdir(exist_ok=True)
    cases = []
    for base, sets in CASES.items():
        arch = FAMILIES[base][0]
        model = base_model(base)
        for seed, name in enumerate(ADAPTERS, 100):
            if ADAPTERS[name][0] == base:
                model = add(model, name, seed)
                export(model, name, arch, out)
        for chosen in sets:
            cases.append({"base": f"{base}.gguf", "adapters": chosen, "logits": logits(model, chosen)})
            print(base, chosen, f"logits of size {np.std(cases[-1]['logits']):.2f}")
    goldens = {"reference": f"peft {peft.__version__}, transformers {hf.__version__}, torch {torch.__version__}, fp32 on the CPU", "prompts": PROMPTS, "cases": cases}
    (out / "goldens.json").write_text(json.dumps(goldens, separators=(",", ":")).replace('},{"', '},\n{"') + "\n")


if __name__ == "__main__":
    main()
