"""What calls give back: plain values, which print, compare and can be pickled."""

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:  # the engine may not be installed
    from . import _core


class _Result:
    """A value with the attributes of one of _core's results."""

    __slots__ = ()

    @classmethod
    def of(cls, core: Any, **more: Any) -> Self:
        names = [field.name for field in fields(cls) if field.name not in more]  # type: ignore[arg-type]
        return cls(**{name: getattr(core, name) for name in names}, **more)


@dataclass(frozen=True, slots=True)
class TurnTokens(_Result):
    """Tokens of a turn, counted."""

    prompt: int  #: before generation, the whole conversation: cached + prefilled
    cached: int  #: of those, reused from the agent or from whoever has begun alike
    again: int  #: computed now though known: they lay behind the last state of recurrent layers
    prefilled: int  #: of those, computed now
    generated: int  #: sampled, one that ends the turn included
    proposed: int  #: guessed before they were sampled
    accepted: int  #: of those, the ones that were right
    context: int  #: held by the agent afterwards


@dataclass(frozen=True, slots=True)
class TurnTiming(_Result):
    """Times of a turn, in milliseconds."""

    load: float  #: loading the model, once per engine
    wake: float  #: loading the agent's cache from disk; 0 when it was awake
    ttft: float  #: from the turn's start, the agent still asleep, to the first token
    decode: float  #: from the first token to the last
    save: float  #: saving; with save="behind" handing over


@dataclass(frozen=True, slots=True)
class TurnBytes(_Result):
    """Bytes of a turn."""

    read: int  #: by waking
    written: int  #: by saving; 0 with save="behind"


@dataclass(frozen=True, slots=True)
class MessageDivergence(_Result):
    """Where a turn's messages part from those that its agent held."""

    message: int  #: index of the first that differs
    held: str  #: the agent's there, as JSON; empty: it has no more
    given: str  #: the turn's there, as JSON; empty: it has no more
    beginning: bool  #: whether tools or template arguments render the beginning otherwise; `held` and `given` are those


@dataclass(frozen=True, slots=True)
class TokenLogprob(_Result):
    """How probable a token was."""

    token: int  #: its id
    text: str  #: its text after the token before it; a part of a character is U+FFFD
    logprob: float  #: natural logarithm of the model's own probability


@dataclass(frozen=True, slots=True)
class TokenLogprobs(_Result):
    """How probable a token was that was generated."""

    token: int  #: its id
    text: str  #: its text after the token before it; a part of a character is U+FFFD
    logprob: float  #: natural logarithm of the model's own probability
    top: list[TokenLogprob]  #: the likeliest in its place, in order
    begin: int  #: bytes of the answer's text before it


@dataclass(frozen=True, slots=True)
class TurnResult(_Result):
    """What one turn answered, computed and cost."""

    agent: str  #: the agent's id; empty for a prompt without an agent
    model: str  #: as given to the Engine
    text: str  #: the answer
    repeated: bool  #: whether it is the answer of a turn that was committed before (the turn's `key`), not computed now
    #: "stop": the model or a stop string ended it; "length": max_tokens or the model's context; "cancelled": TextStream.close
    finish_reason: str
    stop: str  #: the stop string that ended it, or empty
    logprobs: list[TokenLogprobs]  #: of each token generated; empty unless asked for
    divergence: MessageDivergence | None  #: of a turn by messages that don't repeat all that the agent held: where they part
    tokens: TurnTokens  #: how many
    timing_ms: TurnTiming  #: how long
    bytes: TurnBytes  #: from and to the disk
    notices: list[str]  #: sentences: what has changed since the agent's last turn that makes no row unusable
    #: one sentence when the agent was damaged on disk and went on from its longest intact prefix; else None
    damage: str | None
    #: a torpor.Error when the answer is complete but could not be saved, or the turn before it (save="behind"); nothing is
    #: lost while the agent stays awake. Else None
    save_error: Exception | None
    seed: int  #: with it the same turn gives the same answer

    @classmethod
    def of_turn(cls, core: "_core.TurnResult", seed: int) -> Self:
        divergence = None if core.divergence is None else MessageDivergence.of(core.divergence)
        logprobs = [TokenLogprobs.of(one, top=[TokenLogprob.of(other) for other in one.top]) for one in core.logprobs]
        return cls.of(core, logprobs=logprobs, divergence=divergence, tokens=TurnTokens.of(core.tokens), timing_ms=TurnTiming.of(core.timing_ms),
                      bytes=TurnBytes.of(core.bytes), seed=seed)


@dataclass(frozen=True, slots=True)
class SaveResult(_Result):
    """What a save wrote."""

    bytes_written: int  #: of files written whole: segments, and the agent's own
    segments_written: int  #: runs of 256 tokens that were not on disk yet
    segments_shared: int  #: already on disk, by this agent's last save or another's
    segments: list[str]  #: the names of all, first to last


@dataclass(frozen=True, slots=True)
class AgentMemory(_Result):
    """What an agent that is awake holds in memory."""

    agent: str  #: its id
    tokens: int  #: that it holds
    bytes: int  #: buffers it holds, shared ones included
    shared_bytes: int  #: of those, held by another agent too
    pinned: bool  #: whether it stays in memory when others must make room
    unsaved: bool  #: whether it has changed since its last save


@dataclass(frozen=True, slots=True)
class MemoryUsage(_Result):
    """Where an engine's memory is, in bytes; each buffer counts once."""

    model_bytes: int  #: the model's weights
    agents: list[AgentMemory]  #: one for each agent that is awake
    kv_bytes: int  #: all agents' rows: what the budget bounds
    mapped_bytes: int  #: of those, pages of segment files
    queued_bytes: int  #: waiting to be written
    budget: int  #: as given to the Engine; 0: no bound

    @classmethod
    def of_engine(cls, core: "_core.MemoryUsage") -> Self:
        return cls.of(core, agents=[AgentMemory.of(agent) for agent in core.agents])


@dataclass(frozen=True, slots=True)
class EngineWork(_Result):
    """What an engine has computed since it began."""

    passes: int  #: forward passes
    turns: int  #: turns in each of them, added up
    most_turns: int  #: turns in one of them
    prompt_tokens: int  #: whose rows were computed
    answer_tokens: int  #: whose rows were computed
    accepted_tokens: int  #: of those, guessed before they were sampled
    rejected_tokens: int  #: guessed wrongly; their rows were computed, too, and dropped
    put_aside: int  #: how often a turn's rows were written to a file so that another one had their memory
