"""litellm against the scripted server: litellm_client.py URL"""

import asyncio
import json
import sys

import litellm
import pytest

from cancelling import cancel

url = sys.argv[1]
litellm.telemetry = False
READ = {"type": "object", "properties": {"path": {"type": "string"}}, "required": ["path"],
        "additionalProperties": False}
TOOLS = [{"type": "function", "function": {"name": "read", "parameters": READ}}]


def ask(text, dialect="openai", **more):
    base = f"{url}/v1" if dialect == "openai" else url
    messages = text if isinstance(text, list) else [{"role": "user", "content": text}]
    return litellm.completion(model=f"{dialect}/scripted", api_base=base, api_key="none", max_tokens=100, num_retries=0,
                              max_retries=0, messages=messages, **more)


for dialect in ("openai", "anthropic"):
    assert ask("say one two", dialect).choices[0].message.content == "one two"
    pieces = [chunk.choices[0].delta.content or "" for chunk in ask("say one two", dialect, stream=True)]
    assert "".join(pieces) == "one two" and len([piece for piece in pieces if piece]) == 2
    call = 'call read {"path": "a"}'
    for answer in (ask(call, dialect, tools=TOOLS),
                   litellm.stream_chunk_builder(list(ask(call, dialect, tools=TOOLS, stream=True)))):
        message = answer.choices[0].message
        assert json.loads(message.tool_calls[0].function.arguments) == {"path": "a"}
    heard = [{"role": "user", "content": call}, message.model_dump(),
             {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "hello"}]
    assert ask(heard, dialect, tools=TOOLS).choices[0].message.content == "read says hello"
    for text, error in (("long", litellm.BadRequestError), ("missing", litellm.NotFoundError)):
        with pytest.raises(error):
            ask(text, dialect)
    with pytest.raises((litellm.APIError, litellm.ServiceUnavailableError), match="The disk is full."):
        list(ask("fail", dialect, stream=True))
    base = f"{url}/v1" if dialect == "openai" else url
    asyncio.run(cancel(url, lambda: litellm.acompletion(model=f"{dialect}/scripted", api_base=base, api_key="none",
                                                        messages=[{"role": "user", "content": "wait"}])))
with pytest.raises(litellm.RateLimitError):
    ask("full")
structured = ask('say {"path":"a"}',
                 response_format={"type": "json_schema", "json_schema": {"name": "r", "schema": READ}})
assert json.loads(structured.choices[0].message.content) == {"path": "a"}
