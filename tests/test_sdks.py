"""The vendors' own SDKs against the dialects, over HTTP, with a script in place of a model (tests/scripted_server.cc)."""

import json
import subprocess

import anthropic
import httpx
import ollama
import openai
import pydantic
import pytest

from conftest import BIN

READ = {"type": "object", "properties": {"path": {"type": "string"}}, "required": ["path"]}


@pytest.fixture(scope="module")
def base():
    server = subprocess.Popen([BIN.parent / "tests/scripted_server"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                              text=True)
    yield f"http://127.0.0.1:{int(server.stdout.readline())}"
    server.stdin.close()
    assert server.wait() == 0


@pytest.fixture(scope="module")
def gpt(base):
    return openai.OpenAI(base_url=f"{base}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def claude(base):
    return anthropic.Anthropic(base_url=base, api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def llama(base):
    return ollama.Client(host=base)


def user(text):
    return [{"role": "user", "content": text}]


# OpenAI: chat completions


def test_openai_chat_whole_and_streamed(gpt):
    whole = gpt.chat.completions.create(model="scripted", messages=user("say one two three"))
    assert whole.choices[0].message.content == "one two three"
    assert whole.usage.prompt_tokens_details.cached_tokens == 4
    chunks = list(gpt.chat.completions.create(model="scripted", messages=user("say one two three"), stream=True,
                                              stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "one two three"
    assert chunks[-1].choices == [] and chunks[-1].usage.total_tokens == 17
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"


def test_openai_chat_calls_a_tool_and_hears_its_result(gpt):
    tools = [{"type": "function", "function": {"name": "read", "parameters": READ}}]
    messages = user('call read {"path": "a b"}')
    with gpt.chat.completions.stream(model="scripted", messages=messages, tools=tools) as stream:
        streamed = stream.get_final_completion().choices[0]
    whole = gpt.chat.completions.create(model="scripted", messages=messages, tools=tools).choices[0]
    for choice in (whole, streamed):
        assert choice.finish_reason == "tool_calls"
        assert json.loads(choice.message.tool_calls[0].function.arguments) == {"path": "a b"}
    messages += [whole.message, {"role": "tool", "tool_call_id": whole.message.tool_calls[0].id, "content": "hello"}]
    answer = gpt.chat.completions.create(model="scripted", messages=messages, tools=tools)
    assert answer.choices[0].message.content == "read says hello"


def test_openai_chat_tells_thinking_apart(gpt):
    message = gpt.chat.completions.create(model="scripted", messages=user("think yes")).choices[0].message
    assert (message.reasoning_content, message.content) == ("Let me think.", "yes")


def test_openai_logprobs_whole_and_streamed(gpt):
    asked = {"model": "scripted", "messages": user("say one two three"), "logprobs": True, "top_logprobs": 2}
    whole = gpt.chat.completions.create(**asked).choices[0].logprobs.content
    assert [token.token for token in whole] == ["one", " two", " three"]
    assert bytes(whole[1].bytes) == b" two" and whole[1].logprob == -0.5
    assert [(other.token, other.logprob) for other in whole[1].top_logprobs] == [(" two", -0.5), ("other", -9999)]
    with gpt.chat.completions.stream(**asked) as stream:
        assert stream.get_final_completion().choices[0].logprobs.content == whole
    chunks = [chunk.choices[0] for chunk in gpt.chat.completions.create(**asked, stream=True)]
    told = [(chunk.delta.content, chunk.logprobs.content[0].token) for chunk in chunks if chunk.logprobs]
    assert told == [("one", "one"), (" two", " two"), (" three", " three")]
    text = gpt.completions.create(model="scripted", prompt="one two", logprobs=1).choices[0].logprobs
    assert (text.tokens, text.token_logprobs, text.text_offset) == (["one", " two"], [-0.5, -0.5], [0, 3])
    assert text.top_logprobs == [{"one": -0.5}, {" two": -0.5}]
    response = gpt.responses.create(model="scripted", input="say one two", include=["message.output_text.logprobs"],
                                    top_logprobs=1)
    assert [token.token for token in response.output[0].content[0].logprobs] == ["one", " two"]
    with gpt.responses.stream(model="scripted", input="say one two", top_logprobs=1) as stream:
        deltas = [event.logprobs[0].token for event in stream if event.type == "response.output_text.delta"]
        assert deltas == ["one", " two"]
        assert stream.get_final_response().output[0].content[0].logprobs == response.output[0].content[0].logprobs


def test_openai_errors_have_their_classes(gpt):
    for text, kind in (("full", openai.RateLimitError), ("long", openai.BadRequestError),
                       ("missing", openai.NotFoundError)):
        for stream in (False, True):
            with pytest.raises(kind) as error:
                gpt.chat.completions.create(model="scripted", messages=user(text), stream=stream)
    assert error.value.param == "model"
    with pytest.raises(openai.BadRequestError) as error:
        gpt.chat.completions.create(model="scripted", messages=user("say x"), n=2)
    assert error.value.param == "n"
    with pytest.raises(openai.APIError, match="The disk is full."):
        list(gpt.chat.completions.create(model="scripted", messages=user("fail"), stream=True))


def test_openai_completions_and_models(gpt):
    assert gpt.completions.create(model="scripted", prompt="one two").choices[0].text == "one two"
    pieces = gpt.completions.create(model="scripted", prompt="one two", stream=True)
    assert "".join(piece.choices[0].text for piece in pieces) == "one two"
    assert [model.id for model in gpt.models.list()] == ["scripted"]
    assert gpt.models.retrieve("scripted").owned_by == "torpor"


# OpenAI: responses


def test_openai_responses_whole_streamed_and_gone_on_from(gpt):
    whole = gpt.responses.create(model="scripted", input="say one two")
    assert whole.output_text == "one two" and whole.status == "completed"
    with gpt.responses.stream(model="scripted", input="think yes") as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert kinds[0] == "response.created" and kinds[-1] == "response.completed"
    assert [item.type for item in final.output] == ["reasoning", "message"]
    assert final.output[0].content[0].text == "Let me think." and final.output_text == "yes"
    again = gpt.responses.create(model="scripted", input="say three", previous_response_id=final.id)
    assert again.previous_response_id == final.id
    assert gpt.responses.retrieve(again.id).output_text == "three"
    gpt.responses.delete(again.id)
    with pytest.raises(openai.NotFoundError):
        gpt.responses.retrieve(again.id)


def test_openai_responses_call_a_tool_and_hear_its_result(gpt):
    tools = [{"type": "function", "name": "read", "parameters": READ}]
    given = user('call read {"path": "a"}')
    call = gpt.responses.create(model="scripted", input=given, tools=tools).output[0]
    assert (call.type, call.name, json.loads(call.arguments)) == ("function_call", "read", {"path": "a"})
    given += [call, {"type": "function_call_output", "call_id": call.call_id, "output": "hello"}]
    assert gpt.responses.create(model="scripted", input=given, tools=tools).output_text == "read says hello"


def test_openai_responses_tell_an_error_in_the_stream(gpt):
    events = list(gpt.responses.create(model="scripted", input="fail", stream=True))
    assert events[-1].type == "response.failed" and events[-1].response.error.message == "The disk is full."


# Anthropic


def test_anthropic_messages_whole_and_streamed(claude):
    whole = claude.messages.create(model="scripted", max_tokens=100, messages=user("say one two"))
    assert whole.content[0].text == "one two" and whole.stop_reason == "end_turn"
    assert (whole.usage.input_tokens, whole.usage.cache_read_input_tokens) == (6, 4)
    with claude.messages.stream(model="scripted", max_tokens=100, messages=user("think one two")) as stream:
        assert "".join(stream.text_stream) == "one two"
        final = stream.get_final_message()
    assert [block.type for block in final.content] == ["thinking", "text"]
    assert final.content[0].thinking == "Let me think." and final.content[0].signature
    assert (final.usage.input_tokens, final.usage.output_tokens) == (6, 9)


def test_anthropic_calls_a_tool_and_hears_its_result(claude):
    tools = [{"name": "read", "input_schema": READ}]
    messages = user('call read {"path": "a"}')
    with claude.messages.stream(model="scripted", max_tokens=100, messages=messages, tools=tools) as stream:
        streamed = stream.get_final_message()
    whole = claude.messages.create(model="scripted", max_tokens=100, messages=messages, tools=tools)
    for message in (streamed, whole):
        assert message.stop_reason == "tool_use"
        assert message.content[0].input == {"path": "a"}
    messages += [{"role": "assistant", "content": whole.content},
                 {"role": "user", "content": [{"type": "tool_result", "tool_use_id": whole.content[0].id,
                                               "content": "hello"}]}]
    answer = claude.messages.create(model="scripted", max_tokens=100, messages=messages, tools=tools)
    assert answer.content[0].text == "read says hello"


def test_anthropic_names_the_stop_sequence_and_counts_tokens(claude):
    stopped = claude.messages.create(model="scripted", max_tokens=100, messages=user("stop"), stop_sequences=["HALT"])
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", "HALT")
    assert claude.messages.count_tokens(model="scripted", messages=user("say x")).input_tokens == 42
    assert [model.id for model in claude.models.list()] == ["scripted"]


def test_anthropic_errors_have_their_classes(claude):
    for text, kind in (("long", anthropic.BadRequestError), ("missing", anthropic.NotFoundError)):
        with pytest.raises(kind) as error:
            claude.messages.create(model="scripted", max_tokens=100, messages=user(text))
    with pytest.raises(anthropic.APIStatusError) as error:
        claude.messages.create(model="scripted", max_tokens=100, messages=user("full"))
    assert error.value.status_code == 529 and error.value.response.headers["retry-after"] == "1"
    with pytest.raises(anthropic.APIStatusError, match="The disk is full."):
        with claude.messages.stream(model="scripted", max_tokens=100, messages=user("fail")) as stream:
            stream.until_done()


# Ollama


def test_ollama_chats_generates_and_lists(llama):
    assert llama.chat(model="scripted", messages=user("say one two")).message.content == "one two"
    parts = llama.chat(model="scripted", messages=user("say one two"), stream=True)
    assert "".join(part.message.content for part in parts) == "one two"
    thought = llama.chat(model="scripted", messages=user("think yes"), think=True)
    assert (thought.message.thinking, thought.message.content) == ("Let me think.", "yes")
    assert llama.generate(model="scripted", prompt="say three").response == "three"
    assert [model.model for model in llama.list().models] == ["scripted"]
    assert [model.model for model in llama.ps().models] == ["scripted"]
    assert "tools" in llama.show("scripted").capabilities


def test_ollama_logprobs_whole_and_streamed(llama):
    asked = {"model": "scripted", "messages": user("say one two"), "logprobs": True, "top_logprobs": 1}
    whole = llama.chat(**asked).logprobs
    assert [(token.token, token.logprob, token.top_logprobs[0].token) for token in whole] == [
        ("one", -0.5, "one"), (" two", -0.5, " two")]
    parts = [part for part in llama.chat(**asked, stream=True) if part.logprobs]
    assert [token for part in parts for token in part.logprobs] == whole


def test_ollama_calls_a_tool_and_hears_its_result(llama):
    tools = [{"type": "function", "function": {"name": "read", "parameters": READ}}]
    messages = user('call read {"path": "a"}')
    message = llama.chat(model="scripted", messages=messages, tools=tools).message
    assert message.tool_calls[0].function.arguments == {"path": "a"}
    messages += [message, {"role": "tool", "tool_name": "read", "content": "hello"}]
    assert llama.chat(model="scripted", messages=messages, tools=tools).message.content == "read says hello"


def test_ollama_errors_have_their_status(llama):
    for text, status in (("full", 429), ("long", 400), ("missing", 404)):
        for stream in (False, True):
            with pytest.raises(ollama.ResponseError) as error:
                list(llama.chat(model="scripted", messages=user(text), stream=stream))
            assert error.value.status_code == status
    with pytest.raises(ollama.ResponseError, match="The disk is full."):
        list(llama.chat(model="scripted", messages=user("fail"), stream=True))


# Every dialect


def test_structured_output_comes_back_as_what_each_sdk_makes_of_it(gpt, claude, llama):
    class Read(pydantic.BaseModel):
        path: str

    asked, read = user('say {"path":"a"}'), Read(path="a")
    chat = gpt.chat.completions.parse(model="scripted", messages=asked, response_format=Read)
    assert chat.choices[0].message.parsed == read
    assert gpt.responses.parse(model="scripted", input=asked[0]["content"], text_format=Read).output_parsed == read
    message = claude.messages.parse(model="scripted", max_tokens=100, messages=asked, output_format=Read)
    assert message.parsed_output == read
    answer = llama.chat(model="scripted", messages=asked, format=Read.model_json_schema())
    assert Read.model_validate_json(answer.message.content) == read


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path, body", [("/v1/chat/completions", {"messages": user("wait")}),
                                        ("/v1/messages", {"messages": user("wait"), "max_tokens": 9}),
                                        ("/v1/responses", {"input": "wait"}),
                                        ("/api/chat", {"messages": user("wait")})])
def test_a_client_that_goes_is_noticed_in_each_shape(base, llama, path, body, stream):
    def count():
        return int(llama.chat(model="scripted", messages=user("how many gone")).message.content)
    before = count()
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(base + path, json={"model": "scripted", "stream": stream, **body}, timeout=0.2)
    while count() == before:  # pytest's own limit ends it
        pass
