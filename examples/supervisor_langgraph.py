"""A supervisor and its workers, in LangGraph, on `torpor serve`.

    export OPENAI_BASE_URL=http://127.0.0.1:8080/v1 OPENAI_API_KEY="$(cat ~/.config/torpor/api-keys.local)"
    python examples/supervisor_langgraph.py qwen2.5-coder-0.5b "My lamp is dark. Who mends it?"

The supervisor gives work to a keeper and to a clerk, and answers. Of Torpor there is the model's name alone:
`MODEL@supervisor`, `MODEL@keeper` and `MODEL@clerk` are agents of the server's. LangGraph keeps the conversation in a
file, and sends all of it each time. Start this again, also after the server was: each agent wakes where it was, and
reads what is new to it.

It needs `pip install langchain langchain-openai langgraph-supervisor langgraph-checkpoint-sqlite`, and a model that
calls tools.
"""

import argparse

from langchain.agents import create_agent
from langchain_openai import ChatOpenAI
from langgraph.checkpoint.sqlite import SqliteSaver
from langgraph_supervisor import create_supervisor


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="by which the server knows it")
    parser.add_argument("message")
    parser.add_argument("--session", default="supervisor.db", help="the file of the conversation (supervisor.db)")
    options = parser.parse_args()

    def model(agent):
        return ChatOpenAI(model=f"{options.model}@{agent}")

    workers = [create_agent(model("keeper"), name="keeper", system_prompt="You keep the lighthouse. You mend lamps."),
               create_agent(model("clerk"), name="clerk", system_prompt="You keep the books of the lighthouse.")]
    graph = create_supervisor(workers, model=model("supervisor"), prompt="You give work to the keeper and the clerk.")
    conversation = {"configurable": {"thread_id": "lighthouse"}}
    with SqliteSaver.from_conn_string(options.session) as saver:
        team = graph.compile(checkpointer=saver)
        # What a worker says is told again by the graph that it is part of, and so is all that was said before.
        told = {message.id for message in team.get_state(conversation).values.get("messages", [])}
        updates = team.stream({"messages": [{"role": "user", "content": options.message}]}, conversation,
                              subgraphs=True, stream_mode="updates")
        for _, update in updates:
            for message in (message for change in update.values() if change for message in change["messages"]):
                usage = getattr(message, "usage_metadata", None)
                if usage and message.id not in told:
                    told.add(message.id)
                    print(f"{message.name}: {usage['input_tokens']} tokens read, "
                          f"{usage['input_token_details']['cache_read']} of them were there: {message.text}")


if __name__ == "__main__":
    main()
