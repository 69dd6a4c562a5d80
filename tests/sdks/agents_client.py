"""OpenAI's Agents SDK against the scripted server: agents_client.py URL"""

import asyncio
import sys

import openai
import pytest
from agents import (Agent, ModelSettings, OpenAIChatCompletionsModel, OpenAIResponsesModel, Runner, function_tool,
                    set_tracing_disabled)
from pydantic import BaseModel

from cancelling import cancel

url = sys.argv[1]
set_tracing_disabled(True)


@function_tool
def read(path: str) -> str:
    """Reads a file."""
    return f"file {path}"


class Read(BaseModel):
    path: str


async def main():
    client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    for kind in (OpenAIChatCompletionsModel, OpenAIResponsesModel):
        agent = Agent(name="keeper", instructions="Be brief.", tools=[read], model=kind("scripted", client),
                      model_settings=ModelSettings())
        assert (await Runner.run(agent, "say one two")).final_output == "one two"
        assert (await Runner.run(agent, 'call read {"path": "a"}')).final_output == "read says file a"
        streamed = Runner.run_streamed(agent, "say one two")
        pieces = [event.data.delta async for event in streamed.stream_events()
                  if event.type == "raw_response_event" and event.data.type == "response.output_text.delta"]
        assert "".join(pieces) == streamed.final_output == "one two"
        reader = Agent(name="reader", output_type=Read, model=kind("scripted", client))
        assert (await Runner.run(reader, 'say {"path":"a"}')).final_output == Read(path="a")
        await cancel(url, lambda: Runner.run(agent, "wait"))
        for text, error in (("missing", openai.NotFoundError), ("full", openai.RateLimitError),
                            ("long", openai.BadRequestError)):
            with pytest.raises(error):
                await Runner.run(agent, text)


asyncio.run(main())
