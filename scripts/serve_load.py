"""Load on a server that speaks OpenAI's API: tokens a second, and the time to the first token.

Works the same against `ktx serve` and llama.cpp's `llama-server`, so that the two can be compared:

    python3 scripts/serve_load.py http://127.0.0.1:10002 --streams 8 --requests 32

Each stream sends one request after the other; prompts differ, so that no server has them in its cache.
Standard library only.
"""

import argparse
import asyncio
import json
import random
import time
from urllib.parse import urlparse

WORDS = "time way year work day man world life part house water room money story fact month right study book eye".split()


def prompt(seed, words):
    rng = random.Random(seed)
    return " ".join(rng.choice(WORDS) for _ in range(words))


async def ask(host, port, seed, args):
    """One streamed completion: time to the first token, whole time, tokens."""
    request = {
        "prompt": prompt(seed, args.words), "max_tokens": args.tokens, "stream": True, "ignore_eos": True,
        "temperature": args.temperature, "top_p": 0.95, "top_k": 40, "seed": seed, "stream_options": {"include_usage": True},
    }
    if args.model:
        request["model"] = args.model
    body = json.dumps(request).encode()
    begin = time.perf_counter()
    reader, writer = await asyncio.open_connection(host, port)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n" \
           f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    writer.write(head.encode() + body)
    first = usage = None
    while line := await reader.readline():
        if not line.startswith(b"data: {"):
            if line.startswith(b"HTTP/1.1") and b" 200 " not in line:
                raise SystemExit(line.decode() + (await reader.read()).decode())
            continue
        if first is None:
            first = time.perf_counter() - begin
        if b'"usage":{' in line:
            usage = json.loads(line[6:])["usage"]
    writer.close()
    return first, time.perf_counter() - begin, usage["prompt_tokens"], usage["completion_tokens"]


async def run(args):
    url = urlparse(args.url)
    seeds = iter(range(args.seed, args.seed + args.requests))
    results = []

    async def stream():
        for seed in seeds:
            results.append(await ask(url.hostname, url.port, seed, args))

    begin = time.perf_counter()
    await asyncio.gather(*(stream() for _ in range(args.streams)))
    wall = time.perf_counter() - begin
    firsts = sorted(r[0] for r in results)
    generated, read = sum(r[3] for r in results), sum(r[2] for r in results)

    def part(values, fraction):
        return values[min(len(values) - 1, int(fraction * len(values)))]

    print(json.dumps({
        "streams": args.streams, "requests": len(results), "seconds": round(wall, 2),
        "generated_per_s": round(generated / wall, 1), "total_per_s": round((generated + read) / wall, 1),
        "ttft_p50": round(part(firsts, 0.5), 3), "ttft_p95": round(part(firsts, 0.95), 3),
        "prompt_tokens": read, "generated_tokens": generated,
    }))


parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("url")
parser.add_argument("--streams", type=int, default=8)
parser.add_argument("--requests", type=int, default=32)
parser.add_argument("--words", type=int, default=100, help="words of a prompt")
parser.add_argument("--tokens", type=int, default=64, help="tokens of an answer")
parser.add_argument("--temperature", type=float, default=0.0)
parser.add_argument("--seed", type=int, default=int(time.time()))
parser.add_argument("--model")
asyncio.run(run(parser.parse_args()))
