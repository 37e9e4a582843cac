"""llama-index's OpenAI-like model, unmodified: a chat, a streamed one, a completion. Prints what came back as JSON."""

import json
import sys

from llama_index.core.llms import ChatMessage
from llama_index.llms.openai_like import OpenAILike

url, key = sys.argv[1:]
where = {"model": "upper", "api_base": f"{url}/v1", "api_key": key, "temperature": 0, "max_tokens": 64}
chat = OpenAILike(is_chat_model=True, **where)
said = [ChatMessage(role="user", content="hello world")]
print(
    json.dumps(
        {
            "whole": chat.chat(said).message.content,
            "streamed": "".join(part.delta or "" for part in chat.stream_chat(said)),
            "text": OpenAILike(is_chat_model=False, **where).complete("hello world\n").text,
        }
    )
)
