"""torpor.asgi: the server inside a Python host, under uvicorn, and called without one."""

import asyncio
import http.client
import json
import threading
import time

import anthropic
import httpx
import openai
import pytest
import torpor
import torpor.asgi
import uvicorn

from conftest import MODEL, make_tiny_model

READ = {"type": "object", "properties": {"path": {"enum": ["a", "b"]}}, "required": ["path"],
        "additionalProperties": False}

# Of a chat: an answer that the context's end alone ends.
LONG = {"max_tokens": 4000, "temperature": 0, "logit_bias": {"2": -100}}


class Host:
    """uvicorn on a thread of its own, until the with block ends."""

    def __init__(self, app, **options):
        self.app = app
        self.server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", **options))
        self.thread = threading.Thread(target=self.server.run)

    def __enter__(self):
        self.thread.start()
        while not self.server.started:
            assert self.thread.is_alive()
            time.sleep(0.01)
        self.port = self.server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.http = httpx.Client(base_url=self.url, timeout=60, headers={"x-api-key": self.app.api_key})
        return self

    def __exit__(self, *_):
        self.http.close()
        self.server.should_exit = True
        self.thread.join()


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_model):
    return tmp_path_factory.mktemp("asgi")


@pytest.fixture(scope="module")
def host(place, tiny_model):
    """One server for what leaves nothing behind."""
    app = torpor.asgi.application(tiny_model, store=place / "store", api_key_file=place / "keys/api-keys",
                                  max_body="100KB", aliases={"gpt-*": "tiny"})
    with Host(app) as host:
        yield host


@pytest.fixture(scope="module")
def gpt(host):
    return openai.OpenAI(base_url=f"{host.url}/v1", api_key=host.app.api_key, max_retries=0)


@pytest.fixture(scope="module")
def claude(host):
    return anthropic.Anthropic(base_url=host.url, api_key=host.app.api_key, max_retries=0)


def user(text):
    return [{"role": "user", "content": text}]


def in_turn(host):
    return host.http.get("/torpor/v1/now").json()["turns"]


def test_openais_sdk_gets_whole_and_streamed_answers_calls_formats_and_errors(gpt):
    asked = {"model": "gpt-9", "messages": user("Who keeps the lamp?"), "max_tokens": 12, "temperature": 0}
    whole = gpt.chat.completions.create(**asked)
    chunks = list(gpt.chat.completions.create(**asked, stream=True))
    assert whole.model == "tiny" and whole.usage.completion_tokens == 12
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content
    tools = [{"type": "function", "function": {"name": "read", "parameters": READ}}]
    called = gpt.chat.completions.create(**{**asked, "max_tokens": 300}, tools=tools, tool_choice="required")
    assert json.loads(called.choices[0].message.tool_calls[0].function.arguments)["path"] in "ab"
    shape = {"type": "json_schema", "json_schema": {"name": "word", "schema": {"enum": ["a", "b"]}, "strict": True}}
    formed = gpt.chat.completions.create(**asked, response_format=shape)
    assert json.loads(formed.choices[0].message.content) in ("a", "b")
    with pytest.raises(openai.NotFoundError):
        gpt.chat.completions.create(**{**asked, "model": "none"})
    kept = gpt.responses.create(model="tiny", input="Hi.", max_output_tokens=4)
    assert gpt.responses.retrieve(kept.id).output_text == kept.output_text


def test_anthropics_sdk_gets_whole_and_streamed_answers_and_errors(claude):
    asked = {"model": "tiny", "messages": user("Who keeps the lamp?"), "max_tokens": 12}
    whole = claude.messages.create(**asked)
    with claude.messages.stream(**asked) as stream:
        assert "".join(stream.text_stream) == whole.content[0].text
    with pytest.raises(anthropic.BadRequestError, match="prompt is too long"):
        claude.messages.create(**{**asked, "messages": user("lamp " * 5000)})


def test_a_key_a_host_and_a_body_that_are_not_right_are_refused(host):
    assert httpx.get(f"{host.url}/v1/models").status_code == 401
    assert httpx.get(f"{host.url}/health").json()["ready"] is True
    assert host.http.get("/v1/models", headers={"host": "elsewhere.example"}).status_code == 403
    long = b'{"model": "' + b"x" * 100_000 + b'"}'
    for content in (long, (long[i:i + 10_000] for i in range(0, len(long), 10_000))):  # with its length, and in chunks
        refused = host.http.post("/v1/chat/completions", content=content)
        assert (refused.status_code, refused.json()["error"]["type"]) == (413, "invalid_request_error")


@pytest.mark.parametrize("ends", ["is given up", "fails"])
def test_a_body_whose_request_ends_before_it_leaves_room_for_others(host, ends):
    """All together have eight times as much room as one: the ninth would be refused."""
    async def lost(app):
        async def receive():
            if begun.is_set():
                if ends == "fails":
                    raise OSError("the host has lost it")
                await asyncio.Event().wait()
            begun.set()
            return {"type": "http.request", "body": b"x" * 100_000, "more_body": True}

        async def send(message):
            raise AssertionError(message)

        begun = asyncio.Event()
        scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": []}
        request = asyncio.create_task(app(scope, receive, send))
        await begun.wait()
        if ends == "is given up":
            request.cancel()
        await asyncio.wait([request])
        assert request.cancelled() or request.exception()

    async def talk():
        for _ in range(9):
            await lost(host.app)

    asyncio.run(talk())
    assert host.http.post("/v1/chat/completions", content=b"{").status_code == 400


def test_paths_queries_and_heads_arrive_as_they_were_sent(host):
    host.http.post("/torpor/v1/agents", json={"agent": "a.b", "prompt": "Hi.", "max_tokens": 1}).raise_for_status()
    assert host.http.get("/torpor/v1/agents/%61%2Eb").json()["agent"] == "a.b"
    assert host.http.get("/v1/models?after=%20x").status_code == 200
    head = host.http.head("/v1/models")
    assert (head.status_code, head.content) == (200, b"") and int(head.headers["content-length"]) > 2
    assert host.http.delete("/torpor/v1/agents/a%2eb").status_code == 204


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_has_its_turn_taken_back(host, stream):
    connection = http.client.HTTPConnection("127.0.0.1", host.port)
    body = {"model": "tiny", "messages": user("Go on."), "stream": stream, **LONG}
    connection.request("POST", "/v1/chat/completions", json.dumps(body),
                       {"x-api-key": host.app.api_key, "x-torpor-agent": "gone"})
    if stream:
        assert connection.getresponse().read(10)
    while not in_turn(host):
        pass
    connection.close()
    while in_turn(host):  # pytest's own limit ends it
        pass
    assert host.http.get("/torpor/v1/agents/gone").status_code == 404


def test_a_stream_reaches_its_reader_piece_by_piece(host):
    body = {"model": "tiny", "messages": user("Go on."), "max_tokens": 60, "stream": True, "temperature": 0}
    with host.http.stream("POST", "/v1/chat/completions", json=body) as answer:
        assert answer.headers["x-accel-buffering"] == "no"
        pieces = list(answer.iter_raw())
    assert len(pieces) > 10 and pieces[-1].endswith(b"data: [DONE]\n\n")


def test_an_application_needs_no_host_and_can_be_mounted(tmp_path, tiny_model):
    app = torpor.asgi.application(tiny_model, store=tmp_path / "store", authenticate=False, allow_hosts=["torpor"])

    async def talk():
        transport = httpx.ASGITransport(app=app, root_path="/llm")
        async with httpx.AsyncClient(transport=transport, base_url="http://torpor/llm") as client:
            body = {"model": "tiny", "messages": user("Hi."), "max_tokens": 4, "stream": True}
            answers = await asyncio.gather(*[client.post("/v1/chat/completions", json=body) for _ in range(4)])
            health = await client.get("/health")
        await app.aclose()
        async with httpx.AsyncClient(transport=transport, base_url="http://torpor/llm") as client:
            with pytest.raises(torpor.InvalidArgumentError, match="closed"):
                await client.get("/health")
        return answers, health

    answers, health = asyncio.run(talk())
    assert all(answer.text.endswith("data: [DONE]\n\n") for answer in answers)
    assert health.json()["ready"] is True


def test_an_engine_is_served_beside_its_own_users_and_outlives_the_application(tmp_path, tiny_model):
    with torpor.Engine(tiny_model, tmp_path / "store") as engine:
        said = engine.agent("ada").turn("My name is Ada.", max_tokens=4)
        with Host(torpor.asgi.application(engine, authenticate=False)) as host:
            answer = host.http.post("/torpor/v1/agents/ada/turn", json={"prompt": "And you?", "max_tokens": 4}).json()
            assert answer["tokens"]["cached"] >= said.tokens.context - 1
        assert len(engine.agent("ada").messages) == 4
        with pytest.raises(torpor.InvalidArgumentError, match="alone"):
            torpor.asgi.application(engine, tiny_model)


def test_the_end_of_a_hosts_life_takes_turns_back_and_saves_agents(tmp_path):
    app = torpor.asgi.application(MODEL, store=tmp_path / "store", authenticate=False, drain_timeout=0)
    with Host(app, timeout_graceful_shutdown=0) as host:
        first = {"agent": "ada", "prompt": "Hi.", "max_tokens": 4}
        said = host.http.post("/torpor/v1/agents", json=first).raise_for_status().json()["text"]
        connection = http.client.HTTPConnection("127.0.0.1", host.port)
        messages = [*user("Hi."), {"role": "assistant", "content": said}, *user("Go on.")]
        connection.request("POST", "/v1/chat/completions", json.dumps({"messages": messages, **LONG}),
                           {"x-torpor-agent": "ada"})
        while not in_turn(host):
            pass
    connection.close()
    with torpor.Engine(MODEL, tmp_path / "store") as engine:  # nobody has the agent awake
        assert len(engine.agent("ada").messages) == 2


def test_silence_is_filled_between_pieces_and_what_is_sent_last_ends_it():
    class Exchange:
        gone = False

        def leave(self):
            self.gone = True

    async def talk():
        sent = []

        async def send(message):
            sent.append(message)

        loop = asyncio.get_running_loop()
        answer = torpor.asgi._Answer(loop, send, Exchange(), False)

        def speak():
            answer.begin(200, [])
            answer.keep_alive(b": wait\n\n", 0.02)
            while len(sent) < 3:
                pass
            answer.write(b"data: 1\n\n")
            answer.end()

        await loop.run_in_executor(None, speak)
        count = len(sent)
        await asyncio.sleep(0.05)
        assert len(sent) == count and answer.ended
        return [message.get("body") for message in sent]

    bodies = asyncio.run(talk())
    assert bodies[0] is None and set(bodies[1:-2]) == {b": wait\n\n"} and bodies[-2:] == [b"data: 1\n\n", b""]


def test_mistakes_are_told_at_once(tmp_path, tiny_model):
    def fails(error, match, *models, **options):
        with pytest.raises(error, match=match):
            torpor.asgi.application(*models, store=tmp_path / "store", **options)

    fails(torpor.InvalidArgumentError, "No model")
    fails(torpor.NotFoundError, "nowhere", tmp_path / "nowhere", authenticate=False)
    fails(torpor.InvalidArgumentError, "queue", tiny_model, queue=0)
    fails(torpor.InvalidArgumentError, "alias", tiny_model, authenticate=False, aliases={"a": "none"})
    (tmp_path / "keys").write_text("nonsense\n")
    fails(torpor.InvalidArgumentError, "keys", tiny_model, api_key_file=tmp_path / "keys")

    def without_template(config, weights):
        pass

    bare = make_tiny_model(tmp_path / "bare", without_template)
    (bare / "chat_template.jinja").unlink(missing_ok=True)
    config = json.loads((bare / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (bare / "tokenizer_config.json").write_text(json.dumps(config))
    fails(torpor.InvalidArgumentError, "chat template", bare, authenticate=False)
