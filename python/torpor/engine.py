"""Torpor's own engine: the fast way, with agents instead of caches."""

import queue
import threading
from pathlib import Path

from . import _core


class Engine:
    """Durable agents over one model. Methods may be called from any thread and run one at a time.

    model: a model directory, or a repo id in the local Hugging Face cache.
    store: default $TORPOR_STORE, else ~/.agent_caches.
    memory_budget: bytes of KV held in memory (0: no bound); over it the agents used longest ago go to sleep.
    """

    def __init__(self, model, store=None, memory_budget=0):
        root = Path(store).expanduser() if store is not None else _core.default_store_root()
        self._core = _core.CoreEngine(str(model), root, memory_budget)

    def agent(self, agent_id, system=None):
        """The agent of that id, which its first turn makes. `system` is the system message of a new one."""
        return Agent(self, agent_id, system)


class Agent:
    """A named, durable conversation. Get one from Engine.agent."""

    def __init__(self, engine, agent_id, system=None):
        self.engine = engine
        self.id = agent_id
        self.system = system

    def turn(self, prompt, *, raw=False, max_tokens=256, temperature=0.0, top_p=1.0, seed=0, on_text=None):
        """One user turn, saved when it returns: a TurnResult. `on_text` is called with each piece of text."""
        return self.engine._core.turn(self.id, prompt, self.system, raw, max_tokens, temperature, top_p, seed, on_text)

    def stream(self, prompt, **options):
        """The turn's text, piece by piece. The turn goes on to its end also when the iterator is dropped."""
        pieces = queue.SimpleQueue()
        end = object()

        def work():
            try:
                self.turn(prompt, on_text=pieces.put, **options)
                pieces.put(end)
            except BaseException as error:  # raised where it is waited for
                pieces.put(error)

        threading.Thread(target=work, daemon=True).start()
        while (piece := pieces.get()) is not end:
            if isinstance(piece, BaseException):
                raise piece
            yield piece

    def fork(self, new_id, at_token=None):
        """Another agent that begins with this one's first `at_token` tokens (all of them); copies no tensor."""
        self.engine._core.fork(self.id, new_id, at_token)
        return Agent(self.engine, new_id, self.system)

    def rewind(self, n_tokens):
        """Forgets everything after the first `n_tokens` tokens."""
        self.engine._core.rewind(self.id, n_tokens)

    def pin(self, pinned=True):
        """Keeps the agent in memory when others must make room."""
        self.engine._core.pin(self.id, pinned)

    def sleep(self):
        """Saves if changed, and lets go of the memory and the lock."""
        self.engine._core.sleep(self.id)
