"""The OpenAPI description is that of all routes, and Schemathesis finds no answer that it does not describe.

TORPOR_EXAMPLES=N sets how many requests each operation gets, twice: of those that the description allows, and of others.
"""

import os

import hypothesis
import pytest
import schemathesis
from hypothesis import strategies
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import content_type_conformance, response_schema_conformance, status_code_conformance

from conftest import Torpor, make_tiny_model
from serving import Server
from test_serve_mutations import check_error

EXAMPLES = int(os.environ.get("TORPOR_EXAMPLES", 6))
METHODS = ["get", "post", "put", "patch", "delete"]
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    directory = tmp_path_factory.mktemp("described")
    model = make_tiny_model(directory / "tiny", lambda config, _: config.update(max_position_embeddings=512))
    with Server(Torpor(directory / "store", model), directory, "--log", directory / "log") as server:
        server.description = server.ask("GET", "/torpor/v1/openapi.json").json()
        yield server
        assert server.stop() == 0


def filled(path):
    return path.replace("{agent}", "ada").replace("{team}", "crew").replace("{model}", "tiny").replace("{response_id}", "resp_1")


def test_what_is_described_is_served_by_the_methods_that_are_described_and_no_others(server):
    for path, methods in server.description["paths"].items():
        for method in METHODS:
            answer = server.ask(method.upper(), filled(path), {} if method == "post" else None)
            assert (answer.status == 405) == (method not in methods), (method, path, answer.status)
            if answer.status == 405:
                check_error(path if path != "/" and "/health" not in path and path != "/metrics" else "/v1/", answer)
            assert "There is no /" not in answer.text and "there is no /" not in answer.text, (method, path)


def test_all_routes_are_described(server):
    """Those of the dialects are made of the description, those of the agents are described from their table."""
    others = {path for path in server.description["paths"] if not path.startswith(("/v1/", "/api/", "/torpor/v1/"))}
    assert others == {"/", "/health", "/health/live", "/health/ready", "/metrics"}
    ids = [operation["operationId"] for methods in server.description["paths"].values() for operation in methods.values()]
    assert len(ids) == len(set(ids))
    for path in ("/v1", "/v1/", "/v1/embeddings", "/v1/chat", "/v1/models/", "/v1/responses/a/b", "/api", "/api/pull", "/torpor/v1",
                 "/torpor/v1/agents/ada/what", "/torpor/v1/teams/crew/what", "/torpor/v2/agents", "/openapi.json", "/health/what", "/metrics/"):
        answer = server.ask("GET", path)
        assert answer.status == 404 or path == "/v1/models/" and answer.status == 200, path


@pytest.mark.parametrize("tag", ["openai", "anthropic", "ollama", "torpor", "server"])
def test_schemathesis_finds_no_failure_of_the_servers_and_no_answer_that_is_not_described(server, tag):
    schema = schemathesis.openapi.from_dict(server.description)
    operations = [result.ok() for result in schema.include(tag=tag).get_all_operations()]
    assert operations

    bounds = {"/v1/responses": "max_output_tokens", "/v1/chat/completions": "max_tokens", "/v1/completions": "max_tokens",
              "/v1/messages": "max_tokens", "/torpor/v1/agents": "max_tokens", "/torpor/v1/agents/{agent}/turn": "max_tokens",
              **{f"/torpor/v1/teams/{{team}}/{step}": "max_tokens" for step in ("turn", "ask", "round", "handoff", "conclude")}}

    def limited(path, body):
        """Answers end soon, however long the request would have them."""
        if isinstance(body, dict):
            if path in bounds:
                body.setdefault(bounds[path], 4)
            for name in ("max_tokens", "max_output_tokens", "max_completion_tokens"):
                if isinstance(body.get(name), int) and body[name] > 4:
                    body[name] = 4
        return body

    def check(case, there):
        for name, own in (("agent", "ada"), ("team", "crew")):
            if there and name in (case.path_parameters or {}):
                case.path_parameters[name] = own
        case.body = limited(case.operation.path, case.body)
        response = case.call(base_url=f"http://127.0.0.1:{server.port}", headers={"authorization": f"Bearer {server.key}"},
                             timeout=300)
        case.validate_response(response, checks=CHECKS)

    for operation in operations:
        server.ask("POST", "/torpor/v1/agents", {"agent": "ada", "prompt": "Hi.", "max_tokens": 2})  # unless it is there
        server.ask("POST", "/torpor/v1/teams", {"team": "crew", "coordinator": "eve",
                                                "members": [{"name": "ada"}, {"name": "eve"}]})
        takes_any = "requestBody" in operation.definition.raw or "parameters" in operation.definition.raw
        for mode in [schemathesis.GenerationMode.POSITIVE] + [schemathesis.GenerationMode.NEGATIVE] * takes_any:
            settings = hypothesis.settings(max_examples=EXAMPLES, deadline=None, database=None, derandomize=True,
                                           suppress_health_check=list(hypothesis.HealthCheck),
                                           phases=[hypothesis.Phase.generate])
            settings(hypothesis.given(case=operation.as_strategy(generation_mode=mode), there=strategies.booleans())(check))()
    assert server.chat("Hi.").status == 200
