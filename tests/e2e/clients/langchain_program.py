"""langchain-openai, unmodified: chats whole and streamed, text, a form, vectors. Prints what came back as JSON."""

import json
import sys

from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings

url, key = sys.argv[1:]
where = {"base_url": f"{url}/v1", "api_key": key}
chat = ChatOpenAI(model="upper", temperature=0, max_tokens=64, **where)
schema = {
    "title": "word",
    "type": "object",
    "properties": {"word": {"enum": ["left", "right"]}},
    "required": ["word"],
    "additionalProperties": False,
}
former = ChatOpenAI(model="demo", temperature=0, **where).with_structured_output(schema, method="json_schema")
vectors = OpenAIEmbeddings(model="demo", check_embedding_ctx_length=False, **where)
print(
    json.dumps(
        {
            "whole": chat.invoke("hello world").content,
            "streamed": "".join(part.content for part in chat.stream("hello world")),
            "text": OpenAI(model="upper", temperature=0, max_tokens=64, **where).invoke("hello world\n"),
            "formed": former.invoke("hello world"),
            "vectors": [len(vector) for vector in vectors.embed_documents(["one", "two"])],
        }
    )
)
