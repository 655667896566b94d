#!/usr/bin/env python3
"""Reference outputs of llama.cpp for synthetic models of about a billion parameters, in real shapes with random weights.

  make_synthetic_goldens.py LLAMA_CPP_FOLDER FOLDER_OF_MODELS tests/fixtures/synthetic.json

The folder holds `NAME.gguf` for each name below, as `synthetic_model.py NAME NAME.gguf` writes it. llama.cpp is a source
tree with a finished build and `llama_check` (see models/scripts/llama_check.cpp). Its exact logits are those of the
same model with all weights dequantised to F32, single-precision activations and cache, and no flash attention.
"""
import json
import sys
import tempfile
from pathlib import Path

import numpy as np

from llama_cpp import LlamaCpp

MODELS = ["dslite-1b", "dsv3-1b", "qwen2-1b", "qwen3-1b", "llama-1b"]
PROMPT = 24
TOKENS = 32
SAMPLES = 768


def case(llama: LlamaCpp, model: Path):
    ids = np.random.default_rng(7).integers(1000, 40000, PROMPT).tolist()
    text = " ".join(map(str, ids))
    with tempfile.TemporaryDirectory(dir=model.parent) as folder:
        dequantised = Path(folder) / "f32.gguf"
        llama.dequantize(model, dequantised)
        exact_answers, exact = llama.check(dequantised, [f"F {PROMPT} {text}", f"G {TOKENS} {text}"], cache="f32", flash_attention=False)
    _, eight_bit = llama.check(model, [f"F {PROMPT} {text}"], cache="f32", flash_attention=False)
    answer = next(a for a in exact_answers if "gaps" in a)
    stride = len(exact) // SAMPLES
    error = float(((eight_bit - exact).astype(np.float64) ** 2).sum() / (exact.astype(np.float64) ** 2).sum())
    return {"model": model.name, "prompt_ids": ids, "greedy_ids": answer["ids"],
            "top2_gaps": [round(x, 4) for x in answer["gaps"]], "vocabulary": len(exact), "stride": stride,
            "logits": [float(f"{x:.7g}") for x in exact[::stride]], "llama_cpp_8_bit_nmse": error}


def main():
    llama, folder, out = LlamaCpp(Path(sys.argv[1])), Path(sys.argv[2]), Path(sys.argv[3])
    cases = [case(llama, folder / f"{name}.gguf") for name in MODELS]
    lines = ",\n".join(json.dumps(c) for c in cases)
    out.write_text(f'{{"source": "llama.cpp {llama.version()}, scripts/make_synthetic_goldens.py", "cases": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    main()
