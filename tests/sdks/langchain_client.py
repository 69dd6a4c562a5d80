"""langchain's chat models against the scripted server: langchain_client.py URL"""

import asyncio
import sys

import anthropic
import openai
import pytest
from langchain_anthropic import ChatAnthropic
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel

from cancelling import cancel

url = sys.argv[1]


@tool
def read(path: str) -> str:
    """Reads a file."""
    return f"file {path}"


class Read(BaseModel):
    path: str


gpt = ChatOpenAI(model="scripted", base_url=f"{url}/v1", api_key="none", max_retries=0)
claude = ChatAnthropic(model="scripted", base_url=url, api_key="none", max_retries=0, max_tokens=100)
for model in (gpt, claude):
    assert model.invoke("say one two").text == "one two"
    assert "".join(chunk.text for chunk in model.stream("say one two")) == "one two"
    question = HumanMessage('call read {"path": "a"}')
    call = model.bind_tools([read]).invoke([question])
    assert call.tool_calls[0]["args"] == {"path": "a"}
    result = ToolMessage(read.invoke(call.tool_calls[0]["args"]), tool_call_id=call.tool_calls[0]["id"])
    assert model.bind_tools([read]).invoke([question, call, result]).text == "read says file a"
    structured = model.with_structured_output(Read, method="json_schema")
    assert structured.invoke('say {"path":"a"}') == Read(path="a")
    asyncio.run(cancel(url, lambda: model.ainvoke("wait")))
for text, error in (("full", openai.RateLimitError), ("long", openai.BadRequestError),
                    ("missing", openai.NotFoundError)):
    with pytest.raises(error):
        gpt.invoke(text)
with pytest.raises(anthropic.NotFoundError):
    claude.invoke("missing")
for model, error in ((gpt, openai.APIError), (claude, anthropic.APIError)):
    with pytest.raises(error, match="The disk is full."):
        list(model.stream("fail"))
