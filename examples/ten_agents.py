"""Ten agents in the memory of three: who sleeps, who wakes, and what it costs.

    python examples/ten_agents.py .models/smollm2-135m

Each agent is told something, then each is asked about it. Over the memory budget the agents used longest ago go to sleep, to
disk; their next turn wakes them, and reads nothing again.
"""

import argparse
import tempfile

import torpor

NAMES = ["ada", "bob", "cleo", "dan", "eve", "finn", "gus", "hal", "ida", "jan"]
ROUNDS = ["My name is {name}, and I keep lighthouse number {number}. Greet me.", "Which lighthouse do I keep?"]


def awake(engine: torpor.Engine) -> set[str]:
    return {agent.agent_id for agent in engine.agents() if agent.awake}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a model directory, or a repo id in the local Hugging Face cache")
    parser.add_argument("--budget", type=float, default=20, help="megabytes of KV cache in memory (20)")
    parser.add_argument("--store", help="where the agents are kept (a temporary directory)")
    parser.add_argument("--max-tokens", type=int, default=16)
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as temporary, torpor.Engine(
            options.model, options.store or temporary, memory_budget=int(options.budget * 1e6)) as engine:
        known = {agent.agent_id for agent in engine.agents()}
        for message in ROUNDS:
            for number, name in enumerate(NAMES, 1):
                before = awake(engine)
                result = engine.agent(name).turn(message.format(name=name.title(), number=number),
                                                 max_tokens=options.max_tokens)
                asleep = ", ".join(sorted(before - awake(engine)))
                came = "was awake" if name in before else f"wakes in {result.timing_ms.wake:.1f} ms" if name in known else "is new"
                known.add(name)
                print(f"{name:<4} {came:<16} {result.tokens.cached:>4} tokens reused, {result.tokens.prefilled:>3} read, first after "
                      f"{result.timing_ms.ttft:>4.0f} ms" + (f"; asleep now: {asleep}" if asleep else ""))
        usage = engine.memory_usage()
        print(f"{len(usage.agents)} of {len(engine.agents())} agents are awake in {usage.kv_bytes / 1e6:.1f} MB of {usage.budget / 1e6:.1f} MB; "
              f"the model has {usage.model_bytes / 1e6:.0f} MB.")


if __name__ == "__main__":
    main()
