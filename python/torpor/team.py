"""Agents that work together: members with roles over one beginning, and a coordinator who sums up."""

import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict, Unpack

from . import _arguments
from ._engine_half import _core
from .engine import Agent, Engine, _json
from .errors import InvalidArgumentError
from .results import TurnResult


class StepOptions(TypedDict, total=False):
    """The keyword arguments of every step, all optional; None is as good as left out. They hold for each of its turns.

    key: a name of the caller's for this step. The last step, asked again with its key, gives its answers again.
    max_tokens, temperature, top_p, top_k, min_p, stop: as TurnOptions have them.
    seed: as TurnOptions has it; the turn of the i-th member who answers, from 0 on, has this plus i.
    """

    key: str | None
    max_tokens: int | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    seed: int | None
    stop: str | Sequence[str] | None


@dataclass(frozen=True, slots=True)
class TeamAnswer:
    """What one member answered."""

    member: str  #: its name
    agent: str  #: id of its agent
    text: str  #: the answer; empty when there is none
    kept: bool  #: it had answered before, and nothing was computed
    turn: TurnResult | None  #: of a turn that was computed
    error: Exception | None  #: a torpor.Error: why it did not answer, or why its answer could not be saved


@dataclass(frozen=True, slots=True)
class TeamResult:
    """What a team answered in one step."""

    kind: str  #: "turn", "ask", "round", "handoff" or "conclude"
    answers: dict[str, TeamAnswer]  #: by member, in the order of turns
    complete: bool  #: all have answered; else asking again with the same words goes on
    speaker: str  #: who has the conversation from now on


class Team:
    """A durable team of agents on one engine. Any number of objects may stand for the same team.

        team = torpor.Team.make(engine, "crew", {"ada": "You doubt.", "bob": "You hope.", "eve": "You decide."}, "eve")
        team.ask("Shall we sail?")
        team.round()
        print(team.conclude().answers["eve"].text)

    Each member is an agent of its own, "crew.ada", which its first turn makes. Its system message is the team's and
    then its role. Turns of a step begin together and are computed in one batch.

    A step stays open until all of its members have answered. Asked again with the same words it goes on, also after a
    crash: who has answered is not computed twice. One member's error stands beside the others' answers; when nobody
    answers it is raised.

    Every method raises NotFoundError when there is no such team. Steps and `remove` raise BusyError while it is in a
    step, in whatever process.
    """

    engine: Engine
    name: str

    def __init__(self, engine: Engine, name: str) -> None:
        self.engine = engine
        self.name = name

    def __repr__(self) -> str:
        return f"<torpor.Team {self.name!r}>"

    @classmethod
    def make(cls, engine: Engine, name: str, members: Mapping[str, str], coordinator: str, *, system: str = "",
             tools: Sequence[Mapping[str, Any]] | None = None) -> "Team":
        """A new team. Computes nothing.

        members: 2 to 16 roles by name; a role is text of the member's system message, and may be empty.
        coordinator: the member who sums up.
        system: what all system messages begin with. tools: of all members, as the chat template takes them.

        InvalidArgumentError: the name is taken, or an agent "NAME.MEMBER" is there; of several makers one succeeds.
        """
        roles = [(_arguments.text(member, "A member's name"), _arguments.text(role, "A role"))
                 for member, role in members.items()]
        _core.make_team(engine._core, _arguments.text(name, "The team's name"), roles, coordinator,
                        _arguments.text(system, "The system message"), _json("tools", list(tools)) if tools else "")
        return cls(engine, name)

    @staticmethod
    def names(engine: Engine) -> list[str]:
        """Teams in the engine's store, sorted."""
        return _core.list_teams(engine._core)

    @property
    def members(self) -> dict[str, str]:
        """Roles by name."""
        return dict(_core.find_team(self.engine._core, self.name)[0])

    @property
    def coordinator(self) -> str:
        """The member who sums up."""
        return _core.find_team(self.engine._core, self.name)[1]

    @property
    def speaker(self) -> str:
        """The member whom `turn` talks to: the one that the conversation was handed to, at first the coordinator."""
        return _core.find_team(self.engine._core, self.name)[2]

    def agent(self, member: str) -> Agent:
        """A member's agent."""
        return self.engine.agent(f"{self.name}.{member}")

    def turn(self, message: str, *, on_text: Callable[[str, str], object] | None = None,
             **options: Unpack[StepOptions]) -> TeamResult:
        """The speaker answers.

        on_text: of every step: called with a member's name and a piece of its text, on this thread. What it raises
            gives the step's turns up that are not complete, and is raised. Calls there that would wait for an agent of
            the team's are InvalidArgumentError.
        """
        return self._step("turn", message, on_text=on_text, **options)

    def ask(self, message: str, to: Iterable[str] | None = None, *, on_text: Callable[[str, str], object] | None = None,
            **options: Unpack[StepOptions]) -> TeamResult:
        """Members answer one message. to: who; None: all but the coordinator."""
        return self._step("ask", message, to, on_text=on_text, **options)

    def round(self, message: str = "", to: Iterable[str] | None = None, *,
              on_text: Callable[[str, str], object] | None = None, **options: Unpack[StepOptions]) -> TeamResult:
        """Each hears what the others said last, then `message`, and answers. to: as ask's."""
        return self._step("round", message, to, on_text=on_text, **options)

    def hand_off(self, to: str, message: str = "", *, from_: str | None = None, summary: bool = False,
                 on_text: Callable[[str, str], object] | None = None, **options: Unpack[StepOptions]) -> TeamResult:
        """The conversation goes on with member `to`, the new speaker, who hears the last answer of the one before, then
        `message`.

        from_: who hands over; None: the speaker. summary: that member sums up first, and `to` hears this instead.
        """
        return self._step("handoff", message, [to], from_ or "", summary, on_text=on_text, **options)

    def conclude(self, message: str = "", *, on_text: Callable[[str, str], object] | None = None,
                 **options: Unpack[StepOptions]) -> TeamResult:
        """The coordinator hears what the others said last, then `message`, and sums up."""
        return self._step("conclude", message, on_text=on_text, **options)

    def remove(self) -> None:
        """Removes the team and its members' agents."""
        _core.remove_team(self.engine._core, self.name)

    def _step(self, kind: str, message: str, to: Iterable[str] | None = None, from_: str = "", summary: bool = False, *,
              on_text: Callable[[str, str], object] | None = None, key: str | None = None,
              max_tokens: int | None = None, temperature: float | None = None, top_p: float | None = None,
              top_k: int | None = None, min_p: float | None = None, seed: int | None = None,
              stop: str | Sequence[str] | None = None) -> TeamResult:
        stops = [stop] if isinstance(stop, str) else list(stop or ())
        drawn = secrets.randbits(32) if seed is None else _arguments.whole(seed, "seed", 0, 2**64 - 1)

        def whole(value: int | None, name: str, otherwise: int) -> int:
            return _arguments.whole(otherwise if value is None else value, name, -2**31, 2**31 - 1)

        def real(value: float | None, name: str, otherwise: float) -> float:
            return _arguments.real(otherwise if value is None else value, name)

        if isinstance(to, str):
            raise InvalidArgumentError(f"'to' is one text; give a list of members, [{to!r}].")
        names = None if to is None else [_arguments.text(name, "A member's name") for name in to]
        if names == []:
            raise InvalidArgumentError("'to' names nobody; name a member, or leave it out.")
        running = _core.start_step(
            self.engine._core, self.name, kind, _arguments.text(message, "The message"), names or [], from_, summary,
            key or "", whole(max_tokens, "max_tokens", 256), real(temperature, "temperature", 0.0),
            real(top_p, "top_p", 1.0), drawn, whole(top_k, "top_k", 0), real(min_p, "min_p", 0.0),
            [_arguments.text(one, "A stop string") for one in stops])
        try:
            # Each member's turn waits for the callbacks of the others'.
            agents = [] if on_text is None else [f"{self.name}.{member}" for member in self.members]
            while (piece := running.next()) is not None:
                if on_text is not None:
                    with self.engine._in_callback(*agents):
                        on_text(*piece)
            return self._result(running.result(), drawn)
        except BaseException:  # a signal's, or on_text's; when it is the step's own, there is nothing to undo
            running.undo()
            raise

    def _result(self, core: _core.StepResult, seed: int) -> TeamResult:
        answers = {}
        for i, one in enumerate(core.answers):
            turn = None if one.turn is None else TurnResult.of_turn(one.turn, seed + i)
            answers[one.member] = TeamAnswer(one.member, one.agent, one.text, one.kept, turn, one.error)
        return TeamResult(core.kind, answers, core.complete, core.speaker)
