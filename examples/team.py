"""A team of three agents: all answer, hear each other, and one sums up. Run it twice: the team is still there.

    python examples/team.py .models/smollm2-135m "Shall we sail today?"

The members begin alike, so what they share is read once, and their turns are computed in one batch.
"""

import argparse

import torpor

ROLES = {"ada": "You look for what can go wrong.", "bob": "You look for what can go well.", "eve": "You decide."}


def show(result: torpor.TeamResult) -> None:
    for answer in result.answers.values():
        tokens = answer.turn.tokens if answer.turn else None
        cost = f"{tokens.cached} tokens reused, {tokens.prefilled} read" if tokens else "answered before"
        print(f"{result.kind} {answer.member}: {answer.error or answer.text.strip()} [{cost}]")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a model directory, or a repo id in the local Hugging Face cache")
    parser.add_argument("question")
    parser.add_argument("--store", help="where team and agents are kept ($TORPOR_STORE, else ~/.agent_caches)")
    parser.add_argument("--max-tokens", type=int, default=32)
    options = parser.parse_args()

    with torpor.Engine(options.model, options.store) as engine:
        if "crew" in torpor.Team.names(engine):
            team = torpor.Team(engine, "crew")
        else:
            team = torpor.Team.make(engine, "crew", ROLES, "eve", system="You are the crew of a small boat. Be brief.")
        show(team.ask(options.question, max_tokens=options.max_tokens))
        show(team.round("What do you say to that?", max_tokens=options.max_tokens))
        show(team.conclude("So what do we do?", max_tokens=options.max_tokens))
        show(team.hand_off("bob", "Tell the harbour master.", from_="eve", max_tokens=options.max_tokens))
        print(f"{team.speaker} has the conversation; the agents hold",
              ", ".join(f"{len(team.agent(name).tokens)} tokens ({name})" for name in team.members))


if __name__ == "__main__":
    main()
