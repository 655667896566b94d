"""`ktx serve` beside llama.cpp's `llama-server`: tokens a second and the time to the first token, as a table.

    python3 scripts/serve_compare.py target/release/ktx LLAMA_CPP/build/bin/llama-server MODEL.gguf... \\
        --threads 2 --streams 8 32 --rounds 3

The servers take turns, each alone on the machine, with the same number of slots, the same cache, and the same requests
(`serve_load.py`: prompts that no server has in its cache, greedy). Figures are medians of the rounds. `--ktx-flags` and `--llama-flags` go to
the servers. Standard library only.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

LOAD = Path(__file__).with_name("serve_load.py")
CACHE_TOKENS = 32768


def command(server, args, model, slots):
    """The command line of a server with `slots` slots, all of which fit the cache."""
    if server == "ktx":
        return [args.ktx, "serve", "--model", model, "--port", str(args.port), "--threads", str(args.threads), "--parallel", str(slots),
                "--context", "1024", "--cache-tokens", str(CACHE_TOKENS), "--temperature", "0", *args.ktx_flags.split()]
    return [args.llama, "-m", model, "--port", str(args.port), "-t", str(args.threads), "-np", str(slots), "-c", str(CACHE_TOKENS),
            "--no-webui", *args.llama_flags.split()]


def wait_for(url, process):
    for _ in range(600):
        if process.poll() is not None:
            raise SystemExit(f"the server ended with {process.returncode}: {' '.join(process.args)}")
        try:
            with urllib.request.urlopen(url + "/health", timeout=1):
                return
        except OSError:
            time.sleep(0.1)
    raise SystemExit("the server does not answer")


def measure(server, args, model, seed):
    """One start of a server: a result for each number of streams."""
    url = f"http://127.0.0.1:{args.port}"
    process = subprocess.Popen(command(server, args, model, max(args.streams)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(url, process)
        results = {}
        for streams in args.streams:
            load = [sys.executable, str(LOAD), url, "--streams", str(streams), "--requests", str(streams * args.requests), "--words",
                    str(args.words), "--tokens", str(args.tokens), "--seed", str(seed + 1000 * streams)]
            results[streams] = json.loads(subprocess.run(load, check=True, stdout=subprocess.PIPE).stdout)
        return results
    finally:
        process.terminate()
        process.wait()


def row(model, streams, rounds):
    """A row of the table; ratios above 1 are in favour of ktx."""
    def median(server, field):
        return statistics.median(result[server][streams][field] for result in rounds)

    ktx, llama = median("ktx", "total_per_s"), median("llama", "total_per_s")
    ktx_first, llama_first = median("ktx", "ttft_p95"), median("llama", "ttft_p95")
    cells = [Path(model).stem, streams, f"{ktx:.0f}", f"{llama:.0f}", f"{ktx / llama:.2f}", f"{ktx_first:.2f}", f"{llama_first:.2f}",
             f"{llama_first / ktx_first:.2f}"]
    return f"| {' | '.join(map(str, cells))} |"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("ktx")
    parser.add_argument("llama")
    parser.add_argument("models", nargs="+")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--streams", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--requests", type=int, default=2, help="requests of each stream")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--words", type=int, default=100, help="words of a prompt")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of an answer")
    parser.add_argument("--port", type=int, default=10600)
    parser.add_argument("--ktx-flags", default="")
    parser.add_argument("--llama-flags", default="")
    args = parser.parse_args()
    print("| model | streams | ktx, tokens/s | llama.cpp | ratio | ktx, 95 % have the first token in, s | llama.cpp | ratio |")
    print("|---|---|---|---|---|---|---|---|")
    for model in args.models:
        rounds = [{server: measure(server, args, model, seed) for server in ("ktx", "llama")} for seed in range(args.rounds)]
        for streams in args.streams:
            print(row(model, streams, rounds), flush=True)


main()
