#!/usr/bin/env python3
"""Perplexities by llama.cpp of the texts in tests/fixtures, at a context of 512.

  make_perplexity_goldens.py LLAMA_CPP_FOLDER SmolLM2-135M-Instruct.Q4_1.gguf tests/fixtures

Each model is measured three ways: as llama.cpp runs it by default (8-bit activations, half-precision cache, flash
attention), with a single-precision cache, and with its weights dequantised to F32, which is free of activation
rounding. perplexity-pip.txt is written from models/pip-17m-qa.json.
"""
import json
import sys
import tempfile
from pathlib import Path

from llama_cpp import LlamaCpp, sha256

PIP = Path(__file__).resolve().parents[1] / "models" / "pip-17m.gguf"
EXACT = ("-fa", "off", "-ctk", "f32", "-ctv", "f32")


def write_pip_text(out: Path) -> None:
    """Text of the kind that the built-in model was trained on."""
    items = json.loads(PIP.with_name("pip-17m-qa.json").read_text())["items"]
    out.write_text("".join(f"{item['question']}\n{item['answer']}\n\n" for item in items))


def measure(llama: LlamaCpp, model: Path, text: Path):
    with tempfile.TemporaryDirectory() as folder:
        dequantized = Path(folder) / "f32.gguf"
        llama.dequantize(model, dequantized)
        return {
            "model": model.name, "model_sha256": sha256(model), "text": text.name, "text_sha256": sha256(text), "context": 512,
            "default": llama.perplexity(model, text), "f32_cache": llama.perplexity(model, text, *EXACT),
            "f32_weights": llama.perplexity(dequantized, text, *EXACT),
        }


def main() -> None:
    llama, smollm2, fixtures = LlamaCpp(Path(sys.argv[1])), Path(sys.argv[2]), Path(sys.argv[3])
    write_pip_text(fixtures / "perplexity-pip.txt")
    runs = [measure(llama, smollm2, fixtures / "perplexity.txt"), measure(llama, PIP, fixtures / "perplexity-pip.txt")]
    goldens = {"reference": f"llama.cpp {llama.version()}, CPU, weights not repacked", "runs": runs}
    (fixtures / "perplexity.json").write_text(json.dumps(goldens, indent=1) + "\n")
    for run in runs:
        print(run["model"], *(f"{way} {run[way]['ppl']}" for way in ("default", "f32_cache", "f32_weights")))


if __name__ == "__main__":
    main()
