"""A conversation with a server, streamed: pip install openai; ktx serve; python examples/clients/chat.py"""

import os

from openai import OpenAI

url = os.environ.get("KTX_URL", "http://127.0.0.1:10002")
client = OpenAI(base_url=f"{url}/v1", api_key=os.environ.get("KTX_API_KEY", "none"))
model = client.models.list().data[0].id
messages = []
while question := input("you: "):
    messages.append({"role": "user", "content": question})
    answer = ""
    print("model: ", end="")
    for piece in client.chat.completions.create(model=model, messages=messages, stream=True):
        text = piece.choices[0].delta.content if piece.choices else None
        answer += text or ""
        print(text or "", end="", flush=True)
    print()
    messages.append({"role": "assistant", "content": answer})
