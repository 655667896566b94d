"""An answer as a Python object: the server holds the model to the class's schema."""

import os

from typing import Annotated

from openai import OpenAI
from pydantic import BaseModel, Field

Name = Annotated[str, Field(max_length=40)]


class Event(BaseModel):
    name: Name
    year: int = Field(ge=1, le=2100)
    people: list[Name] = Field(max_length=4)


url = os.environ.get("KTX_URL", "http://127.0.0.1:10002")
client = OpenAI(base_url=f"{url}/v1", api_key=os.environ.get("KTX_API_KEY", "none"))
answer = client.chat.completions.parse(
    model=client.models.list().data[0].id,
    messages=[{"role": "user", "content": "In 1969 Armstrong and Aldrin landed on the Moon."}],
    response_format=Event,
)
print(answer.choices[0].message.parsed)
