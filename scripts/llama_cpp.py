"""llama.cpp as an oracle: the test program `models/scripts/llama_check.cpp`, `llama-perplexity`, `llama-quantize`.

Weights are never repacked: the repacked paths depend on the CPU, and some builds of llama.cpp crash in them.
"""
import hashlib
import json
import re
import subprocess
import tempfile
from pathlib import Path

import numpy as np


class LlamaCpp:
    """A llama.cpp source folder that holds `llama_check` and a finished `build`."""

    def __init__(self, folder: Path):
        self.folder = folder.resolve()

    def version(self) -> str:
        run = self._run([self._tool("perplexity"), "--version"])
        return re.search(r"version: (\S+)", run)[1]

    def check(self, model: Path, commands, cache="f16", flash_attention=True):
        """Answers to `llama_check` commands: a list of JSON values, and the raw logits of all `F` commands."""
        argv = [self.folder / "llama_check", model, "1", "0", cache, str(int(flash_attention))]
        with tempfile.NamedTemporaryFile() as raw:
            shell = ["sh", "-c", 'out=$1; shift; exec "$@" 3>"$out"', "sh", raw.name, *map(str, argv)]
            run = subprocess.run(shell, input="\n".join(commands) + "\n", capture_output=True, text=True, check=True)
            return [json.loads(line) for line in run.stdout.splitlines()], np.fromfile(raw.name, np.float32)

    def perplexity(self, model: Path, text: Path, *options: str):
        """Perplexity at a context of 512: final value with its standard error, and after each chunk."""
        argv = [self._tool("perplexity"), "-m", model, "-f", text, "-c", "512", "-t", "2", "-fit", "off", "-nr", *options]
        log = self._run(argv)
        final = re.search(r"PPL = ([\d.]+) \+/- ([\d.]+)", log)
        if not final:
            raise RuntimeError(f"no result in llama-perplexity's output: {log[-2000:]}")
        running = [float(x) for x in re.findall(r"\[\d+\]([\d.]+),", log)]
        return {"ppl": float(final[1]), "standard_error": float(final[2]), "chunks": len(running), "after_chunk": running}

    def dequantize(self, model: Path, out: Path):
        """The same model with all weights in F32."""
        self._run([self._tool("quantize"), "--allow-requantize", model, out, "F32", "2"])

    def _tool(self, name: str) -> Path:
        return self.folder / "build" / "bin" / f"llama-{name}"

    def _run(self, argv) -> str:
        run = subprocess.run(list(map(str, argv)), capture_output=True, text=True, errors="replace")
        if run.returncode:
            raise RuntimeError(f"{argv[0]} ended with {run.returncode}: {(run.stdout + run.stderr)[-2000:]}")
        return run.stdout + run.stderr


def tokenize_command(text: str, parse_special: bool, add_bos: bool) -> str:
    return f"T {int(parse_special)} {int(add_bos)} {text.encode().hex()}"


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
