#!/usr/bin/env python3
"""Reference outputs of llama.cpp for SmolLM2-135M-Instruct.

  make_smollm2_goldens.py LLAMA_CPP_FOLDER SmolLM2-135M-Instruct.Q4_1.gguf tests/fixtures/smollm2.json

The folder is a llama.cpp source tree with a finished build and `llama_check` (see models/scripts/llama_check.cpp).
"""
import json
import sys
import tempfile
from pathlib import Path

import gguf
import jinja2
import numpy as np

from llama_cpp import LlamaCpp, sha256, tokenize_command

TOKENS = 48
COMPARABLE = 32
SMALLEST_GAP = 0.4
# Chosen so that no step of the first 32 is a near tie, and so that llama.cpp's 8-bit activations do not decide.
CHATS = ["Name the days of the week."]
CONTINUATIONS = [
    "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12,", "10 9 8 7 6 5", "Chapter 1\nChapter 2\nChapter 3\nChapter 4\n",
    '{"id": 1, "name": "a"}, {"id": 2, "name": "b"}, {"id": 3, "name": "c"},',
]
# Plain text, then texts with special tokens.
TEXTS = [
    " ", "   three spaces", "Hello", " Hello", "Hello, world!", "hello  world", "The quick brown fox jumps over the lazy dog.", "1234567890",
    "3.14159", "1,000,000", "2024-01-02", "x=1;y=22;z=333", "I'm don't it's we'll they've I'd you're", "DON'T", "he said \"yes\"",
    "foo.bar(baz)[0]{1}", "C:\\dir\\x", "https://example.com/?q=1&r=2", "\n", "\n\n", "a\r\nb", "line one\n\n    indented\n\ttab", "trailing space ",
    "café naïve über ñandú", "e\u0301 combining", "你好，世界！", "こんにちは世界", "привет мир", "مرحبا بالعالم", "👍🏽 family 👨\u200d👩\u200d👧",
    "½ ² Ⅷ ٣٤٥", "—…“quoted”", "\u3000wide\u00a0space", "fn main() { println!(\"hi {}\", x); }",
]
SPECIAL_TEXTS = ["<|im_start|>user\nHello<|im_end|>\n", "a<|endoftext|>b", "<|im_start", "<|im_end|><|im_end|> 12"]


def prompts(model: Path):
    template = gguf.GGUFReader(model).fields["tokenizer.chat_template"].contents()
    render = jinja2.Environment().from_string(template).render
    for question in CHATS:
        messages = [{"role": "user", "content": question}]
        yield {"messages": messages, "text": render(messages=messages, add_generation_prompt=True)}
    for text in CONTINUATIONS:
        yield {"text": text}


def greedy(llama: LlamaCpp, model: Path):
    """Prompts with ids, greedy ids and gaps; refuses a near tie, and an answer that f32 weights and activations change."""
    cases = list(prompts(model))
    ids, _ = llama.check(model, [tokenize_command(case["text"], True, False) for case in cases])
    answers, _ = llama.check(model, [f"G {TOKENS} " + " ".join(map(str, x)) for x in ids])
    with tempfile.TemporaryDirectory() as folder:
        dequantized = Path(folder) / "f32.gguf"
        llama.dequantize(model, dequantized)
        exacts, _ = llama.check(dequantized, [f"G {TOKENS} " + " ".join(map(str, x)) for x in ids], cache="f32", flash_attention=False)
    for case, prompt_ids, answer, exact in zip(cases, ids, answers, exacts):
        if min(answer["gaps"][:COMPARABLE]) < SMALLEST_GAP:
            sys.exit(f"near tie after {case['text']!r}: choose another prompt")
        if answer["ids"][:COMPARABLE] != exact["ids"][:COMPARABLE]:
            sys.exit(f"8-bit activations change the answer to {case['text']!r}: choose another prompt")
        case.update(prompt_ids=prompt_ids, greedy_ids=answer["ids"], top2_gaps=[round(x, 3) for x in answer["gaps"]])
    return cases


def logits(llama: LlamaCpp, model: Path, ids):
    """The 64 largest logits after the prompt, and the size of all; no flash attention, single-precision cache."""
    _, z = llama.check(model, [f"F {len(ids)} " + " ".join(map(str, ids))], cache="f32", flash_attention=False)
    top = np.argsort(-z, kind="stable")[:64]
    return {"prompt_ids": ids, "vocabulary": len(z), "sum_of_squares": float((z.astype(np.float64) ** 2).sum()),
            "mean": float(z.astype(np.float64).mean()), "top_ids": top.tolist(), "top_values": [float(x) for x in z[top]]}


def tokenizer(llama: LlamaCpp, model: Path):
    cases = [{"text": t, "parse_special": False} for t in TEXTS]
    cases += [{"text": t, "parse_special": special} for t in SPECIAL_TEXTS for special in (True, False)]
    ids, _ = llama.check(model, [tokenize_command(c["text"], c["parse_special"], False) for c in cases])
    return [{**case, "ids": x} for case, x in zip(cases, ids)]


def main() -> None:
    llama, model, out = LlamaCpp(Path(sys.argv[1])), Path(sys.argv[2]), Path(sys.argv[3])
    cases = greedy(llama, model)
    goldens = {
        "model": model.name, "model_sha256": sha256(model), "reference": f"llama.cpp {llama.version()}, CPU, weights not repacked",
        "comparable_steps": COMPARABLE, "smallest_gap": min(min(c["top2_gaps"][:COMPARABLE]) for c in cases),
        "greedy": cases, "logits": logits(llama, model, cases[0]["prompt_ids"]), "tokenizer": tokenizer(llama, model),
    }
    out.write_text(json.dumps(goldens, ensure_ascii=False, indent=None, separators=(",", ":")).replace('},{"', '},\n{"') + "\n")
    print(f"{out}: {len(cases)} prompts, smallest gap {goldens['smallest_gap']}, {len(goldens['tokenizer'])} tokenizer cases")


if __name__ == "__main__":
    main()
