"""Ollama's Python package against a server with the built-in model."""

import os

import ollama

client = ollama.Client(
    host=os.environ["KTX_URL"], headers={"Authorization": "Bearer " + os.environ["KTX_API_KEY"]})
HOT = [{"role": "user", "content": "What is the opposite of hot?"}]
COLD = "The opposite of hot is cold."

assert [m.model for m in client.list().models] == ["pip"]
assert client.show("pip").details.family == "deepseek2"

answer = client.chat("pip", messages=HOT, options={"temperature": 0})
assert answer.message.content == COLD, answer
assert answer.done and answer.eval_count > 3 and answer.total_duration > 0

pieces = list(client.chat("pip", messages=HOT, options={"temperature": 0}, stream=True))
assert "".join(p.message.content for p in pieces) == COLD
assert pieces[-1].done_reason == "stop"

text = client.generate("pip", "What is the opposite of hot?", options={"temperature": 0, "num_predict": 2})
assert text.response == "The opposite" and text.done_reason == "length"

form = client.generate("pip", "Who?", format={
    "type": "object", "properties": {"yes": {"type": "boolean"}}, "required": ["yes"]})
assert "yes" in form.response

try:
    client.chat("llama3", messages=HOT)
except ollama.ResponseError as error:
    assert error.status_code == 404
else:
    raise AssertionError("another model is not refused")
print("ollama's package understands the server")
