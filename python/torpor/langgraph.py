"""Models of LangGraph's graphs (1.2) that are agents of Torpor's: one for each thread.

    graph = StateGraph(MessagesState)
    graph.add_node("model", torpor.langgraph.node(engine, max_tokens=64))
    graph.add_edge(START, "model")
    app = graph.compile(checkpointer=InMemorySaver())
    app.invoke({"messages": [{"role": "user", "content": "Hello"}]}, {"configurable": {"thread_id": "ada"}})

LangGraph's checkpointer keeps the messages, and Torpor what the model has computed of them. So a thread goes on without
computing anything twice, in any process, and is rewound where the graph goes back to an earlier checkpoint.
"""

from collections.abc import Callable, Mapping
from typing import Any, Unpack

from langchain_core.messages import AIMessage, convert_to_openai_messages
from langchain_core.runnables import RunnableConfig
from langgraph.config import get_stream_writer

from .engine import Engine, TurnOptions
from .errors import InvalidArgumentError


def node(engine: Engine, name: str = "", **options: Unpack[TurnOptions]) -> Callable[..., dict[str, Any]]:
    """A node that answers a state's `messages`, text alone, and adds an AIMessage to them.

    name: of the node, where a graph has several: the agent is then `THREAD.NAME`, else `THREAD`. A thread's id has the
        characters of an agent's.
    options: what Agent.turn takes.

    The pieces of the answer are what `stream_mode="custom"` gives. The message's `usage_metadata` tells how many tokens
    were read, and how many of these the agent held (`cache_read`). A graph that is called without a thread raises
    InvalidArgumentError; Agent.turn's errors go to the graph's caller.
    """

    def answer(state: Mapping[str, Any], config: RunnableConfig) -> dict[str, Any]:
        thread = config.get("configurable", {}).get("thread_id")
        if thread is None:
            raise InvalidArgumentError("The graph was called without a thread; give one in its config, by "
                                       '{"configurable": {"thread_id": ...}}.')
        agent = engine.agent(f"{thread}.{name}" if name else str(thread))
        messages = convert_to_openai_messages(state["messages"])
        result = agent.turn(messages, on_text=get_stream_writer(), **options)
        tokens = result.tokens
        return {"messages": [AIMessage(
            result.text,
            usage_metadata={"input_tokens": tokens.prompt, "output_tokens": tokens.generated,
                            "total_tokens": tokens.prompt + tokens.generated,
                            "input_token_details": {"cache_read": tokens.cached}},
            response_metadata={"finish_reason": result.finish_reason, "agent": result.agent})]}

    return answer
