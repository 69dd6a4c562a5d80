"""Hand-offs between agents of OpenAI's Agents SDK, on `torpor serve`.

    export OPENAI_BASE_URL=http://127.0.0.1:8080/v1 OPENAI_API_KEY="$(cat ~/.config/torpor/api-keys.local)"
    python examples/handoff_openai_agents.py qwen2.5-coder-0.5b "My lamp is dark. Who mends it?"

A desk answers, or hands the conversation off to a keeper. Of Torpor there is the model's name alone: `MODEL@desk` and
`MODEL@keeper` are agents of the server's. The SDK keeps the conversation in a file, and sends all of it each time.
Start this again, also after the server was: each agent wakes where it was, and reads what is new to it.

It needs `pip install openai-agents`, and a model that calls tools.
"""

import argparse

from agents import Agent, Runner, SQLiteSession, set_tracing_disabled


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="by which the server knows it")
    parser.add_argument("message")
    parser.add_argument("--session", default="handoff.db", help="the file of the conversation (handoff.db)")
    options = parser.parse_args()

    set_tracing_disabled(True)  # it would be sent to OpenAI
    keeper = Agent(name="keeper", model=f"{options.model}@keeper",
                   instructions="You keep the lighthouse. You mend lamps.")
    desk = Agent(name="desk", model=f"{options.model}@desk", handoffs=[keeper],
                 instructions="You greet. What is about lamps you hand off to the keeper.")
    result = Runner.run_sync(desk, options.message, session=SQLiteSession("lighthouse", options.session))
    for response in result.raw_responses:
        usage = response.usage
        print(f"{usage.input_tokens} tokens read, {usage.input_tokens_details.cached_tokens} of them were there")
    print(f"{result.last_agent.name}: {result.final_output}")


if __name__ == "__main__":
    main()
