"""litellm, unmodified: chats whole and streamed by an adapter, vectors, a form. Prints what came back as JSON."""

import json
import sys

import litellm

url, key = sys.argv[1:]
where = {"api_base": f"{url}/v1", "api_key": key}
chat = {**where, "messages": [{"role": "user", "content": "hello world"}], "temperature": 0, "max_tokens": 64}
schema = {"type": "object", "properties": {"word": {"enum": ["left", "right"]}}, "required": ["word"]}
wanted = {"type": "json_schema", "json_schema": {"name": "w", "schema": {**schema, "additionalProperties": False}}}
whole = litellm.completion(model="hosted_vllm/upper", **chat)
parts = litellm.completion(model="hosted_vllm/upper", stream=True, stream_options={"include_usage": True}, **chat)
formed = litellm.completion(model="hosted_vllm/demo", response_format=wanted, **chat)
vectors = litellm.embedding(model="hosted_vllm/demo", input=["one", "two"], **where)
print(
    json.dumps(
        {
            "whole": whole.choices[0].message.content,
            "streamed": "".join(part.choices[0].delta.content or "" for part in parts if part.choices),
            "formed": json.loads(formed.choices[0].message.content),
            "vectors": [len(item["embedding"]) for item in vectors.data],
        }
    )
)
