"""Torpor's own engine: the fast way, with agents instead of caches."""

import json
import os
import secrets
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TypedDict, TypeVar, Unpack

from . import _arguments
from ._engine_half import _core  # before MLX: it says what is missing
import mlx.core as mx

from .errors import Error, InvalidArgumentError
from .results import EngineWork, MemoryUsage, SaveResult, TurnResult

_T = TypeVar("_T")
#: One user message, or the whole conversation: messages as OpenAI has them, {"role": ..., "content": ...}.
Prompt = str | Sequence[Mapping[str, Any]]


class TurnOptions(TypedDict, total=False):
    """The keyword arguments of every turn, all optional; None is as good as left out.

    raw: append the prompt as it stands, without the chat template (False).
    special: special tokens, and what the template frames messages with, count as such where they are written in messages, tools
        and arguments. Else (False) they are text.
    on_divergence: of a turn by messages whose agent holds other ones, or more. "rewind" (the default): the agent forgets what
        follows the last equal message. "branch": it stays, and the turn is that of an agent "ID.2", "ID.3" and so on, which
        TurnResult.agent names.
    tools: a list of tools as the model's chat template takes them; such lists belong to a conversation's beginning (none; with a
        prompt, those that the agent began with).
    template_args: further variables for the template, such as {"enable_thinking": False}; as tools.
    save: "wait" (the default): on disk before the turn returns; "behind": by a writer thread, for which Agent.sleep,
        Engine.save_all and Engine.close wait; "no": by a later save, sleep or eviction.
    max_tokens: the longest answer (256).
    temperature: 0 (the default) always takes the likeliest token.
    top_p: samples from the smallest set of tokens with this much probability (1).
    seed: equal seeds, prompts and agents give equal tokens (another one each time, which the result tells).
    top_k: samples from so many of the likeliest tokens (0: all).
    min_p: samples from tokens with at least this part of the likeliest one's probability (0: all).
    repetition_penalty: logits of the last `penalty_context` tokens (64; 0: all), the prompt's too, are divided by it where
        they are positive, else multiplied (1: none).
    presence_penalty, frequency_penalty: taken from the logits of tokens that the answer has, the second for each time (0).
    logit_bias: added to logits, by token id; -inf forbids a token (none).
    logprobs: TurnResult.logprobs tells how probable each token was, and so many of the likeliest in its place, 0 to 64
        (None).
    stop: a text or several; the answer ends where it would contain one, or where a special token's text does. The agent keeps
        what is before it.
    speculate: what follows is guessed from what the agent holds, and several tokens are verified at once; no bit of the answer
        depends on it (True).
    key: with a bucket (Engine's `remote`), your name for the turn, of at most 256 bytes. The agent's last turn, asked for again
        under its key, on any machine, is not run again: TurnResult.repeated. InvalidArgumentError where another request had
        the key, or the agent has changed since (None: no name).
    """

    raw: bool | None
    special: bool | None
    on_divergence: Literal["rewind", "branch"] | None
    tools: Sequence[Mapping[str, Any]] | None
    template_args: Mapping[str, Any] | None
    save: Literal["wait", "behind", "no"] | None
    max_tokens: int | None
    temperature: float | None
    top_p: float | None
    seed: int | None
    top_k: int | None
    min_p: float | None
    repetition_penalty: float | None
    penalty_context: int | None
    presence_penalty: float | None
    frequency_penalty: float | None
    logit_bias: Mapping[int, float] | None
    logprobs: int | None
    stop: str | Sequence[str] | None
    speculate: bool | None
    key: str | None


class EngineSettings(TypedDict, total=False):
    """The keyword arguments of an Engine, but for its store. What they say stands there."""

    kv_format: str | None
    durability: Literal["full", "rename", "none"]
    memory_budget: int | str
    disk_budget: int | str
    min_free: int | str
    write_queue: int
    text_queue: int
    max_stall: int
    map_rows: bool
    backend: Literal["kernels", "mlx"] | None
    activations: Literal["f32", "int16"] | None
    threads: int
    cpu_target: str | None
    remote: str | None
    lease: float
    remote_tail: Literal["turn", "sleep"]
    ack: Literal["commit", "local"]
    advertise: str | None
    key_command: str | None


def _core_options(model: str, store: str | os.PathLike[str] | None, settings: Mapping[str, Any]) -> _core.EngineOptions:
    """With the settings of EngineSettings."""
    root = Path(store).expanduser() if store is not None else _core.default_store_root()

    def checked(name: str, value: Any) -> Any:
        if name in ("memory_budget", "disk_budget", "min_free"):
            return _arguments.size(value, name)
        if name in ("write_queue", "text_queue"):
            return _arguments.whole(value, name, 0, 2**63 - 1)
        if name in ("max_stall", "threads"):
            return _arguments.whole(value, name, -2**31, 2**31 - 1)
        if name == "lease":
            return _arguments.seconds(value, name, 1, 3600)
        if name == "map_rows":
            return bool(value)
        is_needed = name in ("durability", "remote_tail", "ack")
        return None if value is None and not is_needed else _arguments.text(value, name)

    given = {name: checked(name, value) for name, value in settings.items()}
    texts = {name: given.get(name) or "" for name in ("cpu_target", "advertise", "key_command")}
    return _core.EngineOptions(model, root, **{**given, **texts})


@dataclass(frozen=True)
class AgentStatus:
    """One agent, as Engine.agents tells."""

    agent_id: str
    model: str  #: as given when it was last saved; an engine of another model can't wake it
    tokens: int
    awake: bool  #: in this engine's memory
    pinned: bool
    unsaved: bool  #: has changed since its last save
    memory_bytes: int  #: buffers it holds, shared ones included; 0 when asleep
    disk_bytes: int  #: its file and the segments it names; 0 before the first save
    in_turn: bool = False  #: its tokens grow as the turn goes on


class Engine:
    """Durable agents over one model.

        with torpor.Engine("path/to/model") as engine:
            print(engine.agent("ada").turn("My name is Ada.").text)

    Methods may be called from any thread. They wait for the one thread that computes, which runs them between the steps of
    turns: a call waits for the turn of its own agent, and for no other. Turns run one at a time, in order. An `on_text` may call
    the engine, too; a call that would wait for its own turn raises InvalidArgumentError.

    Ctrl-C (KeyboardInterrupt) ends a wait for a turn and leaves the agent as it was before that turn, unless it was complete.
    In a process forked from the engine's own every call raises InvalidArgumentError; start processes by "spawn". Errors are
    subclasses of torpor.Error.
    """

    def __init__(self, model: str | os.PathLike[str], store: str | os.PathLike[str] | None = None, *,
                 kv_format: str | None = None, durability: Literal["full", "rename", "none"] = "full",
                 memory_budget: int | str = 0, disk_budget: int | str = 0, min_free: int | str = 0,
                 write_queue: int = 256 << 20, text_queue: int = 64 << 10, max_stall: int = 250, map_rows: bool = True,
                 backend: Literal["kernels", "mlx"] | None = None, activations: Literal["f32", "int16"] | None = None,
                 threads: int = 0, cpu_target: str | None = None, remote: str | None = None, lease: float = 10,
                 remote_tail: Literal["turn", "sleep"] = "turn", ack: Literal["commit", "local"] = "commit",
                 advertise: str | None = None, key_command: str | None = None) -> None:
        """Loads the model.

        model: a model directory, or a repo id in the local Hugging Face cache.
        store: a directory, made when it is not there. Default: $TORPOR_STORE, else ~/.agent_caches.
        kv_format: how rows are kept: "f32", "f16", "bf16", or quantized to 8 or 4 bits in groups of 32, 64 or 128, as
            "q8 group 64 f16"; "q8,4 group 64 f16" has keys of 8 bits and values of 4. None: the model's own for new
            agents, and an old one goes on in its own.
        durability: "full": a save survives a power cut; "rename": a killed process; "none" is for benchmarks.
        memory_budget: bytes of rows held in memory, each buffer once (0: no bound); a number, or a text as "64MB" or "1GiB",
            as for the next two. Over it agents that are not pinned go to sleep, the least recently used first, and turns that
            came last or whose readers are slow put their rows aside, in files, until they go on; when that is not enough,
            ResourceExhaustedError says what holds the memory.
        disk_budget: bytes that the store may take, all models together; min_free: bytes that stay free on the disk (0: no
            bound). Over them segments of no agent go, then the save fails. An agent is never removed to make room.
        write_queue: bytes of saves that may wait; beyond it all turns wait for the disk.
        text_queue: bytes of text of each turn that may wait for its reader; beyond it the turn waits, and others go on.
        max_stall: milliseconds that a step with tokens of prompts may take; other turns' answers wait so long for their next token.
        map_rows: rows of agents that wake are mapped from their files, whose pages all processes share. False: they are read
            into memory, where no later fault of the disk can reach them.
        backend: "kernels": Torpor's CPU kernels; "mlx": MLX's own operations (Metal, CUDA). None: $TORPOR_BACKEND, else "mlx"
            where MLX's default device is a GPU, else "kernels".
        activations: what the kernels round rows to before they multiply them with quantized weights: "f32": to nothing; "int16":
            to 16-bit integers. None: $TORPOR_ACTIVATIONS, else "int16" for quantized weights on a CPU with AVX-512 VNNI, else
            "f32".
        threads: of the kernels, 1 to 256. 0: $TORPOR_THREADS, else one per core that the process may use (docs/cli.md).
        cpu_target: the kernels' instruction set: "portable", "sse4", "avx2", "avx512", "amx" or "neon". None:
            $TORPOR_CPU_TARGET, else the CPU's best.
        remote: a bucket, "s3://BUCKET/PREFIX", "gs://BUCKET/PREFIX" or "az://CONTAINER/PREFIX", in which agents are kept;
            `store` is its cache then. An agent has one owner at a time: who opens it when nobody has it, until it sleeps or
            that engine is closed. Elsewhere it is BusyError, whose `found` is the owner's `advertise`. Each change is
            committed to the bucket before its call returns, turns by `ack`; save="behind" is "wait". Credentials:
            docs/fleet.md. None: none.
        lease: seconds, 1 to 3600. An engine that can't renew its lease for so long opens and commits nothing any more: make
            another one. A quarter later others take its agents over. All engines of a bucket should have the same.
        remote_tail: when the rows of an agent's last tokens, at most 255, go to the bucket: "turn": with each commit;
            "sleep": when it sleeps or the engine is closed. Its text goes with each commit. Who takes it over from an
            engine that was killed computes those rows again.
        ack: when a turn is over: "commit": when the bucket has it; "local": when the store has it. Its commit follows
            then, and the agent's next use waits for it, as `close` does. Until then the turn is lost with the disk, or
            with this engine if another one takes the agent over. An agent's first turn waits for the bucket.
        advertise: where the agents of this engine are asked for, as "http://10.0.0.7:8080". None: nowhere.
        key_command: a command of the shell that prints the key of a sealed bucket (docs/fleet.md, "A sealed bucket"). None:
            $TORPOR_KEY_COMMAND; without that the bucket is not sealed.

        Threads and CPU target are the process's: its first engine settles them, and others raise InvalidArgumentError when they
        ask for another value.

        Raises NotFoundError (also: no such bucket), InvalidArgumentError (a model or format that is not supported; a bucket
        whose conditional writes don't hold, or any in a build without TORPOR_REMOTE), CorruptionError, IoError.
        """
        self._model = _arguments.text(os.fspath(model), "The model's name")
        self._core = _core.CoreEngine(_core_options(self._model, store, dict(
            kv_format=kv_format, durability=durability, memory_budget=memory_budget, disk_budget=disk_budget,
            min_free=min_free, write_queue=write_queue, text_queue=text_queue, max_stall=max_stall, map_rows=map_rows,
            backend=backend, activations=activations, threads=threads, cpu_target=cpu_target, remote=remote, lease=lease,
            remote_tail=remote_tail, ack=ack, advertise=advertise, key_command=key_command)))
        self._talking = threading.local()  # .to: agents whose on_text runs on this thread

    def __repr__(self) -> str:
        return f"<torpor.Engine {self._model!r}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 traceback: TracebackType | None) -> None:
        try:
            self.close()
        except Error as failed:
            if error is None:
                raise
            error.add_note(f"Closing the engine also failed: {failed}")

    def close(self) -> None:
        """Waits for the turn and the saves under way, then frees the model, the agents' memory and their locks; in a bucket it
        lets others have the agents, and removes its lease. What turns with save="no" left unsaved is dropped; call save_all
        before to keep it. Raises, when all is freed, what a save "behind" met that no result has told yet."""
        self._core.close()

    def agent(self, agent_id: str, system: str | None = None) -> "Agent":
        """The agent of that id: 1 to 128 of A-Za-z0-9._-, the first neither '.' nor '-', else InvalidArgumentError. Its first
        turn makes it, when there is none.

        system: the system message of a new agent; for an old one None or its own, else its next turn raises
            InvalidArgumentError.
        """
        _core.check_agent_id(_arguments.text(agent_id, "An agent's id"))
        return Agent(self, agent_id, system)

    def agents(self) -> list[AgentStatus]:
        """All agents by id, those on disk and those in memory."""
        return [AgentStatus(*status) for status in self._core.agents()]

    def turn(self, prompt: Prompt, *, system: str | None = None, on_text: Callable[[str], object] | None = None,
             **options: Unpack[TurnOptions]) -> TurnResult:
        """Answers a prompt without an agent: as Agent.turn, but nothing with a name is left behind, only whole segments for
        prompts that begin alike."""
        return Agent(self, "", system).turn(prompt, on_text=on_text, **options)

    def stream(self, prompt: Prompt, *, system: str | None = None, **options: Unpack[TurnOptions]) -> "TextStream":
        """Answers a prompt without an agent, as Agent.stream."""
        return Agent(self, "", system).stream(prompt, **options)

    def prompt_tokens(self, prompt: Prompt, *, system: str | None = None, raw: bool | None = None, special: bool | None = None,
                      tools: Sequence[Mapping[str, Any]] | None = None,
                      template_args: Mapping[str, Any] | None = None) -> list[int]:
        """The ids that a turn of a new agent would hold before it answers. Computes nothing, and waits for nobody."""
        return self._core.prompt_tokens(*_prompt(prompt), _system(system), bool(raw), *_variables(tools, template_args),
                                        bool(special))

    def save_all(self) -> None:
        """Saves every agent that is awake, and waits. All are tried; then the first error is raised. Agents in a turn are saved
        after it, so an `on_text` gets InvalidArgumentError."""
        self._refuse_in_callback()
        self._core.save_all()

    def memory_usage(self) -> MemoryUsage:
        """Where the memory is: the model, and each agent that is awake."""
        return MemoryUsage.of_engine(self._core.memory_usage())

    def work(self) -> EngineWork:
        """What the engine has computed since it began."""
        return EngineWork.of(self._core.work())

    def _for(self, *agent_ids: str) -> _core.CoreEngine:
        """For calls that wait for the turns of these agents."""
        self._refuse_in_callback(*agent_ids)
        return self._core

    def _refuse_in_callback(self, *agent_ids: str) -> None:
        for agent_id in getattr(self._talking, "to", ()):
            if not agent_ids or agent_id in agent_ids:
                raise InvalidArgumentError(f"This call would wait for the turn of agent '{agent_id}', from whose on_text it is made; "
                                           "make it when that turn is over.")

    @contextmanager
    def _in_callback(self, *agent_ids: str) -> Iterator[None]:
        before = getattr(self._talking, "to", ())
        self._talking.to = (*before, *agent_ids)
        try:
            yield
        finally:
            self._talking.to = before

    def _start(self, agent_id: str, prompt: Prompt, system: str | None, *, raw: bool | None = None, special: bool | None = None,
               on_divergence: str | None = None, tools: Sequence[Mapping[str, Any]] | None = None,
               template_args: Mapping[str, Any] | None = None, save: str | None = None, max_tokens: int | None = None,
               temperature: float | None = None, top_p: float | None = None, seed: int | None = None,
               top_k: int | None = None, min_p: float | None = None, repetition_penalty: float | None = None,
               penalty_context: int | None = None, presence_penalty: float | None = None,
               frequency_penalty: float | None = None, logit_bias: Mapping[int, float] | None = None,
               logprobs: int | None = None, stop: str | Sequence[str] | None = None,
               speculate: bool | None = None, key: str | None = None) -> "TextStream":
        stops = [stop] if isinstance(stop, str) else list(stop or ())
        # 32 bits, which any reader of JSON keeps.
        drawn = secrets.randbits(32) if seed is None else _arguments.whole(seed, "seed", 0, 2**64 - 1)
        core = self._for(agent_id) if agent_id else self._core
        longest = 256 if max_tokens is None else _arguments.whole(max_tokens, "max_tokens", -2**31, 2**31 - 1)

        def real(value: float | None, name: str, otherwise: float) -> float:
            return _arguments.real(otherwise if value is None else value, name)

        def count(value: int | None, name: str, otherwise: int) -> int:
            return _arguments.whole(otherwise if value is None else value, name, -2**31, 2**31 - 1)

        biases = [(count(token, "A token of logit_bias", 0), real(bias, "A number of logit_bias", 0.0))
                  for token, bias in (logit_bias or {}).items()]
        running = core.start(
            agent_id, *_prompt(prompt), _system(system), bool(raw), on_divergence or "rewind",
            *_variables(tools, template_args), bool(special), save or "wait", longest,
            real(temperature, "temperature", 0.0), real(top_p, "top_p", 1.0), drawn, count(top_k, "top_k", 0),
            real(min_p, "min_p", 0.0), real(repetition_penalty, "repetition_penalty", 1.0),
            count(penalty_context, "penalty_context", 64), real(presence_penalty, "presence_penalty", 0.0),
            real(frequency_penalty, "frequency_penalty", 0.0), biases,
            None if logprobs is None else count(logprobs, "logprobs", 0),
            [_arguments.text(one, "A stop string") for one in stops], True if speculate is None else bool(speculate),
            "" if key is None else _arguments.text(key, "A turn's key"))
        return TextStream(running, drawn)


def _json(name: str, value: object) -> str:
    try:
        written = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as failed:
        raise InvalidArgumentError(f"The {name} can't be written as JSON: {failed}") from None
    return _arguments.text(written, f"The JSON of the {name}")


def _prompt(prompt: Prompt) -> tuple[str, str]:
    """A text, or messages as JSON."""
    if isinstance(prompt, Iterable) and not isinstance(prompt, (str, bytes)):
        return "", _json("messages", list(prompt))
    return _arguments.text(prompt, "The prompt"), ""


def _count(tokens: int, name: str) -> int:
    return _arguments.whole(tokens, name, -2**63, 2**63 - 1)  # the engine tells what is out of its bounds


def _system(system: str | None) -> str | None:
    return None if system is None else _arguments.text(system, "The system message")


def _variables(tools: Sequence[Mapping[str, Any]] | None, template_args: Mapping[str, Any] | None) -> tuple[str, str]:
    return _json("tools", list(tools)) if tools else "", _json("template_args", dict(template_args)) if template_args else ""


class TextStream(Iterator[str]):
    """The text of a turn, in pieces, as soon as each can no longer change.

    The turn runs ahead of whoever iterates by the engine's `text_queue` at most; then it waits, and other agents' turns go on. It
    waits for nobody while `result` is asked for, nor once it is left: what was not read can be read afterwards.

    Iterating raises what the turn raises. Ctrl-C while waiting gives the turn up; `close`, or dropping the stream, ends it
    early and keeps what was said.
    """

    def __init__(self, running: _core.RunningTurn, seed: int) -> None:
        self._running = running
        self._seed = seed

    def __repr__(self) -> str:
        return f"<torpor.TextStream, seed {self._seed}>"

    def __next__(self) -> str:
        piece = self._interruptible(self._running.next)
        if piece is None:
            raise StopIteration
        return piece

    def close(self) -> None:
        """Ends the turn before its next token, and waits until it is over. Its result says "cancelled", unless it was
        complete; the agent keeps what was said."""
        try:
            self._running.cancel()
            self._running.result()
        except Error:
            pass  # iterating, or `result`, tells

    @property
    def result(self) -> TurnResult:
        """The turn's TurnResult; waits until it is over. Raises what the turn raised."""
        return TurnResult.of_turn(self._interruptible(self._running.result), self._seed)

    def _interruptible(self, wait: Callable[[], _T]) -> _T:
        try:
            return wait()
        except BaseException:  # a signal's; when it is the turn's own, there is nothing to undo
            self._undo()
            raise

    def _undo(self) -> None:
        self._running.undo()


class Agent:
    """A named, durable conversation. Get one from Engine.agent; any number of them may stand for the same agent.

    Every method raises NotFoundError when there is no such agent, in memory or on disk (but `turn`, `stream`: they make it;
    and `sleep`, `prefetch`), BusyError when another process or, in a bucket, another worker has it awake, and IncompatibleError
    when it belongs to another model.
    """

    engine: Engine
    id: str  #: changed by `rename`
    system: str | None

    def __init__(self, engine: Engine, agent_id: str, system: str | None = None) -> None:
        self.engine = engine
        self.id = agent_id
        self.system = system

    def __repr__(self) -> str:
        return f"<torpor.Agent {self.id!r}>"

    def turn(self, prompt: Prompt, *, on_text: Callable[[str], object] | None = None,
             **options: Unpack[TurnOptions]) -> TurnResult:
        """One user turn: wakes the agent or makes it, computes what is new, answers, saves. The agent stays awake.

        prompt: the user's message, or the whole conversation as messages: what the agent holds of them is not computed again.
        on_text: called with each piece of text, on this thread. What it raises gives the turn up, and is raised. It may call the
            engine, for other agents.

        A turn that raises leaves the agent as it was. ResourceExhaustedError: the prompt does not fit the model's context, or
        the agent the memory. A save that fails is told by TurnResult.save_error, for the answer stands.
        """
        stream = self.stream(prompt, **options)
        try:
            for piece in stream:
                if on_text is not None:
                    with self.engine._in_callback(self.id):
                        on_text(piece)
            return stream.result
        except BaseException:
            stream._undo()
            raise

    def stream(self, prompt: Prompt, **options: Unpack[TurnOptions]) -> TextStream:
        """As `turn`, which begins at once; gives a TextStream to iterate over. `result` is its TurnResult."""
        return self.engine._start(self.id, prompt, self.system, **options)

    def fork(self, new_id: str, at_token: int | None = None, *, save: Literal["wait", "behind"] = "wait") -> "Agent":
        """A new agent that begins with this one's first `at_token` tokens (None: all); copies no tensor. InvalidArgumentError
        when the id is taken or the agent holds fewer.

        save: "wait": the change is on disk when this returns; what a save raises leaves it in memory, unsaved. "behind": by a
            writer thread; a crash may lose it.
        """
        core = self.engine._for(self.id, _arguments.text(new_id, "An agent's id"))
        core.fork(self.id, new_id, None if at_token is None else _count(at_token, "at_token"), save)
        return Agent(self.engine, new_id, self.system)

    def rewind(self, n_tokens: int, *, save: Literal["wait", "behind"] = "wait") -> None:
        """Forgets everything after the first `n_tokens` tokens. InvalidArgumentError when the agent holds fewer. `save`: as fork's."""
        self.engine._for(self.id).rewind(self.id, _count(n_tokens, "n_tokens"), save)

    def rename(self, new_id: str) -> None:
        """Gives the agent another id. InvalidArgumentError when it is taken."""
        self.engine._for(self.id, _arguments.text(new_id, "An agent's id")).rename(self.id, new_id)
        self.id = new_id

    def remove(self) -> None:
        """Removes the agent from memory and disk, and segments that no other agent names."""
        self.engine._for(self.id).remove(self.id)

    def pin(self, pinned: bool = True, *, save: Literal["wait", "behind"] = "wait") -> None:
        """Keeps the agent in memory when others must make room; no longer, with False. Saved with the agent. `save`: as fork's."""
        self.engine._for(self.id).pin(self.id, pinned, save)

    def prefetch(self) -> bool:
        """Begins to load the agent from disk beside whatever is under way, so that its turn finds it ready. Does not wait.
        False when nothing was begun: no such agent, awake or being loaded already, or enough others are."""
        return self.engine._core.prefetch(self.id)

    def save(self) -> SaveResult:
        """Saves the agent if it has changed, and waits. IoError, ResourceExhaustedError (a disk limit)."""
        return SaveResult.of(self.engine._for(self.id).save(self.id))

    def sleep(self) -> None:
        """Saves if changed, then lets go of the memory and the lock. Does nothing when the agent is not awake."""
        self.engine._for(self.id).sleep(self.id)

    @property
    def tokens(self) -> list[int]:
        """The ids that the agent holds to the end of its last turn, saved or not. Ids that are not known (an agent of mlx-lm's
        file) are negative. Waits for a turn of the agent."""
        return self.engine._for(self.id).tokens(self.id)

    @property
    def messages(self) -> list[dict[str, Any]]:
        """What these tokens say, oldest first: {"role": ..., "content": ...}, with `thinking`, `tool_calls` and the like if
        there are any. A turn with raw=True adds none. Waits for a turn of the agent."""
        return [json.loads(message) for message in self.engine._for(self.id).messages(self.id)]

    def next_logits(self) -> mx.array:
        """Logits, float32 `[vocab]`, that follow the agent's last token; for inspection. The agent is not changed."""
        return self.engine._for(self.id).next_logits(self.id)
