"""Sends requests through a router to servers behind it.

usage: through.py ROUTER MODEL SERVER...    the servers are asked how many requests they saw; the key is in KTX_API_KEY
"""

import json
import os
import re
import ssl
import sys
import time
import urllib.request

ROUTER, MODEL, *SERVERS = sys.argv[1:]
TRUSTING = ssl._create_unverified_context()


def call(url, body=None):
    headers = {"Authorization": f"Bearer {os.environ['KTX_API_KEY']}", "Content-Type": "application/json"}
    data = None if body is None else json.dumps(body).encode()
    context = TRUSTING if url.startswith("https") else None
    return urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=60, context=context)


def chat(text, **fields):
    body = {"model": MODEL, "messages": [{"role": "user", "content": text}], **fields}
    return call(f"{ROUTER}/v1/chat/completions", body)


def counted(name):
    """The sum of a metric over all servers."""
    pages = (call(f"{server}/metrics").read().decode() for server in SERVERS)
    return sum(float(value) for page in pages for value in re.findall(rf"^{name}{{.*}} (\S+)$", page, re.M))


def pieces(answer):
    """Each piece of a streamed answer, with when it came."""
    for line in answer:
        if line.startswith(b"data: {"):
            for choice in json.loads(line[6:])["choices"]:
                yield time.monotonic(), choice["delta"].get("content") or ""


def main():
    answer = json.load(chat("What is 7 + 5?"))
    assert answer["choices"][0]["message"]["content"] == "7 + 5 = 12.", answer
    text = "".join(text for _, text in pieces(chat("What is 7 + 5?", stream=True)))
    assert text == "7 + 5 = 12.", text

    # Token by token: what a router holds back comes at once.
    times = [at for at, text in pieces(chat("Tell me a long story.", stream=True, max_tokens=400)) if text]
    apart = len({round(at, 3) for at in times})
    assert len(times) > 50 and apart > len(times) / 4, f"{len(times)} pieces came at {apart} times"

    # A client that goes away.
    before = counted("ktx:requests_cancelled_total")
    for attempt in range(5):
        stream = chat(f"Tell me long story number {attempt}.", stream=True, max_tokens=900)
        for _ in range(10):
            stream.readline()
        stream.close()
    end = time.monotonic() + 20
    while counted("vllm:num_requests_running") > 0:
        assert time.monotonic() < end, "answers that nobody waits for go on"
        time.sleep(0.05)
    cancelled = counted("ktx:requests_cancelled_total") - before
    assert cancelled > 0, "no answer was given up"
    print(f"{len(times)} pieces at {apart} times; {cancelled:.0f} of 5 answers were given up with their clients")


main()
