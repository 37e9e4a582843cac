"""Run by the interpreter that has `lorax-client`: asks what its arguments say and prints what came back as JSON."""

import json
import sys

from lorax import Client
from lorax.errors import GenerationError, ValidationError

url, key, prompt, adapter = sys.argv[1:]
client = Client(url, headers={"Authorization": f"Bearer {key}"}, timeout=60)

whole = client.generate(prompt, adapter_id=adapter, adapter_source="local", max_new_tokens=64, return_k_alternatives=2)
base = client.generate(prompt, max_new_tokens=64)
events = list(client.generate_stream(prompt, adapter_id=adapter, max_new_tokens=64))
stopped = client.generate(prompt, max_new_tokens=64, stop_sequences=[prompt[2:4]])
errors = {}
try:
    client.generate(prompt, adapter_id="no-such-adapter")
except GenerationError as error:
    errors["missing"] = str(error)
try:
    client.generate(prompt, watermark=True)
except ValidationError as error:
    errors["watermark"] = str(error)
schema = {"type": "object", "properties": {"word": {"enum": ["left", "right"]}}, "required": ["word"]}
schema["additionalProperties"] = False
formed = [
    client.generate(prompt, adapter_id=name, response_format={"type": "json_object", "schema": schema}).generated_text
    for name in (None, adapter)
]
shaped = client.generate_stream(prompt, response_format={"type": "json_object", "schema": schema}, max_new_tokens=64)
formed.append("".join(event.token.text for event in shaped if not event.token.special))

print(
    json.dumps(
        {
            "whole": whole.generated_text,
            "finish": whole.details.finish_reason.value,
            "num_tokens": [whole.details.generated_tokens, len(whole.details.tokens)],
            "num_alternatives": len(whole.details.tokens[0].alternative_tokens),
            "base": base.generated_text,
            "streamed": "".join(event.token.text for event in events if not event.token.special),
            "last": events[-1].generated_text,
            "last_finish": events[-1].details.finish_reason.value,
            "stopped": [stopped.generated_text, stopped.details.finish_reason.value],
            "errors": errors,
            "formed": formed,
        }
    )
)
