"""instructor, unmodified: answers as objects, by JSON Schema. Prints what came back as JSON."""

import json
import sys
from typing import Literal

import instructor
from openai import OpenAI
from pydantic import BaseModel, ConfigDict, Field


class Town(BaseModel):
    model_config = ConfigDict(extra="forbid")

    city: Literal["Rome", "Oslo"]
    people: int = Field(ge=0, le=9999)


url, key = sys.argv[1:]
client = instructor.from_openai(OpenAI(base_url=f"{url}/v1", api_key=key), mode=instructor.Mode.JSON_SCHEMA)
said = [{"role": "user", "content": "hello world"}]
towns = [
    client.chat.completions.create(
        model=model, response_model=Town, messages=said, temperature=0, max_tokens=200, max_retries=0
    )
    for model in ("demo", "upper")
]
print(json.dumps({"towns": [town.model_dump() for town in towns]}))
