"""torpor.langgraph: threads of LangGraph's graphs that are agents. LangGraph is in .sdks/python."""

import ast
import json
import os
import re
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest

from conftest import BUILD, ROOT
from test_python_docs import blocks

PYTHON = ROOT / ".sdks" / "python" / "bin" / "python"

AGAIN = """
import json, sys
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, MessagesState, StateGraph
import torpor.langgraph

with torpor.Engine(sys.argv[1]) as engine:
    graph = StateGraph(MessagesState)
    graph.add_node("one", torpor.langgraph.node(engine, "one", max_tokens=4, temperature=0))
    graph.add_edge(START, "one")
    app = graph.compile(checkpointer=InMemorySaver())
    bob = {"configurable": {"thread_id": "bob"}}
    app.invoke({"messages": [("user", "My name is Bob.")]}, bob)
    earlier = next(iter(app.get_state_history(bob))).config
    def last():
        pieces = ""
        for mode, data in app.stream({"messages": [("user", "What is my name?")]}, bob, stream_mode=["custom", "values"]):
            if mode == "custom":
                pieces += data
            else:
                message = data["messages"][-1]
        assert pieces and pieces == message.text, (pieces, message)
        used = message.usage_metadata
        return message.text, used["input_token_details"]["cache_read"], used["input_tokens"]
    first = last()
    bob = earlier                     # back before that question
    second = last()
    print(json.dumps([first, second, sorted(agent.agent_id for agent in engine.agents())]))
    try:
        graph.compile().invoke({"messages": [("user", "Hello")]})
    except torpor.InvalidArgumentError as error:
        assert "thread" in str(error)
    else:
        sys.exit("a graph without a thread was answered")
"""


@pytest.fixture
def run(tmp_path):
    assert (PYTHON.parent.parent / "ready").exists(), "run scripts/fetch-sdks python first"
    for name in ("mlx", "nanobind_backend"):
        (tmp_path / name).symlink_to(Path(next(iter(find_spec(name).submodule_search_locations))))

    def run(program, *args):
        ended = subprocess.run([PYTHON, "-c", program, *args], capture_output=True, text=True, timeout=300,
                               cwd=tmp_path, env={**os.environ, "PYTHONPATH": f"{BUILD / 'python'}:{tmp_path}",
                                                  "TORPOR_STORE": str(tmp_path / "store")})
        assert ended.returncode == 0, ended.stderr
        return ended.stdout
    return run


def test_the_program_of_the_page_goes_on_in_another_process(run, tiny_model):
    [block] = blocks((ROOT / "docs" / "clients.md").read_text())
    program = f"import sys\npath = sys.argv[1]\n{block}"
    first, second = (ast.literal_eval(re.search(r"\{'input_tokens.*", run(program, tiny_model))[0])
                     for _ in range(2))
    assert first["input_token_details"]["cache_read"] == 0
    assert second["input_token_details"]["cache_read"] >= first["total_tokens"] - 1


def test_a_named_nodes_agent_goes_back_as_the_graph_does(run, tiny_model):
    first, second, agents = json.loads(run(AGAIN, tiny_model))
    (text, cached, read), (text_again, cached_again, read_again) = first, second
    assert text == text_again and read == read_again and 0 < cached <= cached_again < read
    assert agents == ["bob.one"]
