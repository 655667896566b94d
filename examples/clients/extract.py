"""An answer as a Python object: the server holds the model to the class's schema."""

import os

from openai import OpenAI
from pydantic import BaseModel


class Event(BaseModel):
    name: str
    year: int
    people: list[str]


client = OpenAI(base_url="http://127.0.0.1:10002/v1", api_key=os.environ.get("KTX_API_KEY", "none"))
answer = client.chat.completions.parse(
    model=client.models.list().data[0].id,
    messages=[{"role": "user", "content": "In 1969 Armstrong and Aldrin landed on the Moon."}],
    response_format=Event,
)
print(answer.choices[0].message.parsed)
