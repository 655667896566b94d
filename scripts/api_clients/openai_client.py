"""OpenAI's Python package against a server with the built-in model."""

import json
import os

import openai

client = openai.OpenAI(base_url=os.environ["KTX_URL"] + "/v1", api_key=os.environ["KTX_API_KEY"])
HOT = [{"role": "user", "content": "What is the opposite of hot?"}]
COLD = "The opposite of hot is cold."

assert [m.id for m in client.models.list()] == ["pip"]

answer = client.chat.completions.create(model="pip", messages=HOT, temperature=0, seed=1)
assert answer.choices[0].message.content == COLD, answer
assert answer.choices[0].finish_reason == "stop"
assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
assert answer.usage.prompt_tokens_details.cached_tokens == 0

pieces = list(client.chat.completions.create(
    model="pip", messages=HOT, temperature=0, stream=True, stream_options={"include_usage": True}))
assert "".join(p.choices[0].delta.content or "" for p in pieces if p.choices) == COLD
assert pieces[-1].usage.completion_tokens == answer.usage.completion_tokens

probable = client.chat.completions.create(
    model="pip", messages=HOT, temperature=0, logprobs=True, top_logprobs=3, n=2, max_completion_tokens=2)
assert len(probable.choices) == 2
assert probable.choices[1].logprobs.content[0].token == "The"
assert probable.choices[0].finish_reason == "length"

text = client.completions.create(model="pip", prompt="The opposite of", max_tokens=4, temperature=0, logprobs=2)
assert len(text.choices[0].logprobs.tokens) == 4

# With a schema from a class, parsed by the package.
from pydantic import BaseModel


class Person(BaseModel):
    name: str
    age: int
    happy: bool


try:
    parsed = client.chat.completions.parse(
        model="pip", messages=[{"role": "user", "content": "Who are you?"}], response_format=Person, max_tokens=300)
    assert isinstance(parsed.choices[0].message.parsed, Person), parsed
except openai.LengthFinishReasonError:
    pass  # The small model did not end its string; the form was kept as far as it came.

tools = [{"type": "function", "function": {"name": "weather", "strict": True, "parameters": {
    "type": "object", "properties": {"city": {"type": "string", "enum": ["Ulm", "Rome"]}}, "required": ["city"],
    "additionalProperties": False}}}]
called = client.chat.completions.create(
    model="pip", messages=[{"role": "user", "content": "Weather in Ulm?"}], tools=tools, tool_choice="required")
call = called.choices[0].message.tool_calls[0]
assert json.loads(call.function.arguments)["city"] in ("Ulm", "Rome")
turns = [{"role": "user", "content": "Weather in Ulm?"}, called.choices[0].message,
         {"role": "tool", "tool_call_id": call.id, "content": "sunny"}]
client.chat.completions.create(model="pip", messages=turns, tools=tools, max_tokens=8)

for kind, arguments in [
    (openai.BadRequestError, {"temperature": 9}),
    (openai.NotFoundError, {"model": "gpt-4"}),
]:
    try:
        client.chat.completions.create(**({"model": "pip", "messages": HOT} | arguments))
    except kind as error:
        assert error.body["message"], error
    else:
        raise AssertionError(f"{arguments} is not refused")
try:
    openai.OpenAI(base_url=client.base_url, api_key="wrong").models.list()
except openai.AuthenticationError:
    pass
else:
    raise AssertionError("a wrong key is not refused")
try:
    client.embeddings.create(model="pip", input="x")
except openai.APIStatusError as error:
    assert error.status_code == 501

# A stream that is left is given up.
with client.chat.completions.create(model="pip", messages=HOT, stream=True, extra_body={"ignore_eos": True}) as stream:
    next(iter(stream))
print("openai", openai.__version__, "understands the server")
