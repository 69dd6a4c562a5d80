"""The fleet of bench/fleet_sim.py: what happens when. Discrete events, in seconds; sizes are bytes, lengths tokens."""

import hashlib
import heapq
import itertools
from collections import OrderedDict, deque
from dataclasses import dataclass, field

import fleet_trace


class Tier:
    """Bytes under keys, the least recently used first: what came, what went, and bytes times seconds."""

    def __init__(self):
        self.entries = OrderedDict()
        self.level = self.added = self.removed = self.peak = 0
        self.area, self.since = 0.0, 0.0

    def tick(self, now):
        self.area += self.level * (now - self.since)
        self.since = now

    def put(self, key, size, now):
        """The entry has this size from now on, and was used last."""
        self.tick(now)
        before = self.entries.pop(key, 0)
        self.entries[key] = size
        self.added += max(0, size - before)
        self.removed += max(0, before - size)
        self.level += size - before
        self.peak = max(self.peak, self.level)

    def touch(self, key):
        if key in self.entries:
            self.entries.move_to_end(key)

    def drop(self, key, now):
        if key in self.entries:
            self.put(key, 0, now)
            del self.entries[key]


class Line:
    """Serves one after the other: a disk, one direction of a link, a prompt's computation."""

    def __init__(self):
        self.free = self.busy = 0.0

    def use(self, now, seconds):
        self.free = max(self.free, now) + seconds
        self.busy += seconds
        return self.free


@dataclass(eq=False)
class Agent:
    session: fleet_trace.Session
    next: int = 0            # its next turn
    context: int = 0         # tokens after its last turn
    uploaded: int = 0        # whole segments in the bucket
    archived: bool = False
    was_awake: bool = False  # as its turn began
    owner: object = None     # the worker that may commit
    used: float = 0.0
    arrived: float = 0.0
    attempt: int = 0         # grows when a turn is begun anew: what was under way means nothing then
    places: set = field(default_factory=set)  # workers with something of it on disk


@dataclass(eq=False)
class Worker:
    name: int
    memory: Tier = field(default_factory=Tier)
    disk: Tier = field(default_factory=Tier)
    down: Line = field(default_factory=Line)
    up: Line = field(default_factory=Line)
    drive: Line = field(default_factory=Line)
    compute: Line = field(default_factory=Line)
    queue: deque = field(default_factory=deque)
    busy: set = field(default_factory=set)     # agents whose turn holds memory here, committed or not yet
    slots: int = 0
    shared: dict = field(default_factory=dict)  # a prefix -> how many agents in memory have it
    takes: bool = True     # the ring has it
    dead: float = None     # when it was killed


class Fleet:
    def __init__(self, sessions, settings):
        self.set = settings
        self.now = 0.0
        self.order = itertools.count()
        self.events = []
        self.workers = []
        self.bucket = Tier()
        self.sessions = Tier()     # rows of all agents that have turns to come: what memory would hold if none slept
        self.bucket_prefixes = {}  # a shared prefix -> its whole segments in the bucket
        self.agents = {session.agent: Agent(session) for session in sessions}
        if len(self.agents) != len(sessions):
            raise ValueError("two sessions have one agent's name")
        self.turns = []            # of each: tier, seconds to the first token, seconds in all, tokens computed
        self.puts = self.gets = self.lists = 0
        self.up_bytes = self.down_bytes = self.disk_read = self.disk_written = 0
        self.moved = self.forwarded = self.retried = self.takeovers = 0
        self.live = self.live_peak = 0
        self.live_area = self.live_since = 0.0
        self.route = {}
        for _ in range(int(settings.workers)):
            self.join()
        for agent in self.agents.values():
            self.later(agent.session.start + agent.session.turns[0].gap, self.arrive, agent)

    # Time.

    def later(self, at, action, *arguments):
        heapq.heappush(self.events, (max(at, self.now), next(self.order), action, arguments))

    def run(self):
        while self.events:
            self.now, _, action, arguments = heapq.heappop(self.events)
            action(*arguments)
        return self

    def unless_anew(self, agent, action):
        """The action, unless the agent's turn was begun anew meanwhile."""
        attempt = agent.attempt
        return lambda *arguments: action(agent, *arguments) if agent.attempt == attempt else None

    # Workers come and go.

    def join(self):
        self.workers.append(Worker(len(self.workers)))
        self.route.clear()

    def drain(self, name):
        """It takes no more turns, and lets go of its agents; what runs there ends."""
        worker = self.workers[name]
        worker.takes = False
        self.route.clear()
        for agent in self.agents.values():
            if agent.owner is worker and agent not in worker.busy and agent not in worker.queue:
                self.let_go(agent)

    def kill(self, name):
        worker = self.workers[name]
        worker.takes, worker.dead = False, self.now
        self.route.clear()
        lost = [agent for agent in self.agents.values() if agent in worker.busy or agent in worker.queue]
        worker.busy.clear()
        worker.queue.clear()
        for tier in (worker.memory, worker.disk):
            for key in list(tier.entries):
                tier.drop(key, self.now)
        worker.shared.clear()
        for agent in self.agents.values():
            agent.places.discard(worker)
        for agent in lost:
            agent.attempt += 1
            self.retried += 1
            self.later(self.now + self.set.retry_s, self.place, agent)

    def let_go(self, agent):
        self.sleep(agent, agent.owner)
        agent.owner = None
        self.puts += 1

    def worker_of(self, agent):
        """By the highest of hashes, which moves as few agents as a ring of hashes does."""
        name = agent.session.agent
        if name not in self.route:
            takers = [worker for worker in self.workers if worker.takes]
            if not takers:
                raise ValueError("no worker is left")
            self.route[name] = max(takers, key=lambda worker: hashlib.blake2b(
                f"{name}/{worker.name}".encode(), digest_size=8).digest())
        return self.route[name]

    # A turn, from its arrival to its commit.

    def arrive(self, agent):
        agent.arrived = self.now
        if agent.next == 0:
            self.count_live(1)
        self.place(agent)

    def place(self, agent):
        worker = self.worker_of(agent)
        owner = agent.owner
        if owner is not None and owner is not worker:
            if owner.dead is not None:
                wait = owner.dead + 1.25 * self.set.lease_ttl_s - self.now
                if wait > 0:
                    self.later(self.now + wait, self.unless_anew(agent, self.place))
                    return
                self.takeovers += 1
            else:
                worker = owner  # forwarded once, and let go of after the turn
                self.forwarded += 1
        worker.queue.append(agent)
        self.pump(worker)

    def pump(self, worker):
        while worker.queue and worker.slots < self.set.slots:
            agent = worker.queue[0]
            turn = agent.session.turns[agent.next]
            if not self.make_room(worker, agent, turn.tokens_in + turn.tokens_out):
                return
            worker.queue.popleft()
            worker.slots += 1
            worker.busy.add(agent)
            self.wake(worker, agent, turn)

    def own_bytes(self, agent, tokens):
        """Beyond the shared prefix, which a worker holds once."""
        return (tokens - min(tokens, self.prefix(agent) * self.set.segment_tokens)) * self.set.kv_bytes_per_token

    def prefix(self, agent):
        """Whole segments of the shared prefix."""
        return agent.session.shared[1] // int(self.set.segment_tokens)

    def prefix_key(self, agent):
        return ("prefix", agent.session.shared[0])

    def prefix_bytes(self, agent):
        return self.prefix(agent) * self.set.segment_tokens * self.set.kv_bytes_per_token

    def make_room(self, worker, agent, tokens):
        """Whether so many of the agent's tokens are in memory now, the least recently used put to sleep for them."""
        name = agent.session.agent
        wanted = self.own_bytes(agent, tokens)
        held = worker.memory.entries.get(name, 0)
        prefix = self.prefix_bytes(agent) if not worker.shared.get(self.prefix_key(agent)) else 0
        if wanted + self.prefix_bytes(agent) > self.set.memory_bytes:
            raise ValueError(f"{name} has {tokens} tokens, more than a worker's memory holds")
        more = max(0, wanted - held) + prefix
        if worker.memory.level + more > self.set.memory_bytes:
            pinned = {busy.session.agent for busy in worker.busy} | {name}
            for key in [key for key in worker.memory.entries if not isinstance(key, tuple) and key not in pinned]:
                self.sleep(self.agents[key], worker)
                prefix = self.prefix_bytes(agent) if not worker.shared.get(self.prefix_key(agent)) else 0
                more = max(0, wanted - held) + prefix
                if worker.memory.level + more <= self.set.memory_bytes:
                    break
            else:
                return False
        agent.was_awake = held > 0
        if not held:
            key = self.prefix_key(agent)
            worker.shared[key] = worker.shared.get(key, 0) + 1
            if worker.shared[key] == 1:
                worker.memory.put(key, self.prefix_bytes(agent), self.now)
        worker.memory.put(name, max(wanted, held), self.now)
        return True

    def sleep(self, agent, worker):
        """Its turn is committed: memory is let go of, and nothing is written."""
        name = agent.session.agent
        if name not in worker.memory.entries:
            return
        worker.memory.drop(name, self.now)
        key = self.prefix_key(agent)
        worker.shared[key] -= 1
        if worker.shared[key] == 0:
            del worker.shared[key]
            worker.memory.drop(key, self.now)
        self.trim(worker)

    def wake(self, worker, agent, turn):
        segment, row = int(self.set.segment_tokens), self.set.kv_bytes_per_token
        first = agent.next == 0
        kept = min(turn.kept, agent.context)
        if first:  # a new agent has what others left of its prefix
            known = worker.shared.get(self.prefix_key(agent), 0) > 1 or self.prefix_key(agent) in worker.disk.entries \
                or self.bucket_prefixes.get(self.prefix_key(agent))
            kept = min(self.prefix(agent) * segment, turn.tokens_in - 1) if known else 0
        latency = 0.0
        if agent.owner is not worker:  # the head, the sweep's generation, and the head swapped
            self.moved += not first
            self.gets += 2
            self.puts += 1
            latency += self.set.get_latency_s + self.set.put_latency_s
            agent.owner = worker
        tier, done, again = ("new" if first else "memory"), self.now + latency, 0
        if first or not agent.was_awake:
            read, fetched, objects = self.find(worker, agent, kept)
            if not first:
                tier = "bucket" if fetched else "disk"
            if fetched and agent.archived:
                tier, again = "computed", kept - read // row
                fetched = objects = 0
            elif fetched and not self.set.tail_rows and not first:
                again = kept % segment
                fetched -= again * row
            if read:
                self.disk_read += read
                done = max(done, worker.drive.use(self.now, self.set.disk_latency_s + read / self.set.disk_bytes_per_s))
            if objects:
                self.gets += objects
                self.down_bytes += fetched
                done = max(done, worker.down.use(self.now, fetched / self.set.net_bytes_per_s) + latency
                           + self.set.get_latency_s)
                self.write(worker, agent, kept)
        computed = turn.tokens_in - kept + again
        self.later(done, self.unless_anew(agent, self.read_prompt), worker, tier, kept, computed)

    def find(self, worker, agent, kept):
        """Of the first `kept` tokens: bytes to read from the worker's disk, bytes of the bucket, objects these are."""
        segment, row = int(self.set.segment_tokens), self.set.kv_bytes_per_token
        prefix = min(kept, self.prefix(agent) * segment)
        name, key = agent.session.agent, self.prefix_key(agent)
        read = fetched = objects = 0
        if prefix:
            worker.disk.touch(key)
            if worker.shared.get(key, 0) > 1:
                pass  # another agent has it in memory
            elif key in worker.disk.entries:
                read += prefix * row
            else:
                fetched += prefix * row
                objects += prefix // segment
        own = (kept - prefix) * row
        here = min(own, worker.disk.entries.get(name, 0))
        worker.disk.touch(name)
        read += here
        if own > here:
            fetched += own - here
            missing = kept // segment - (prefix * row + here) // (segment * row)
            objects += missing + 1  # and the save
        return read, fetched, objects

    def read_prompt(self, agent, worker, tier, kept, computed):
        done = worker.compute.use(self.now, computed / self.set.prefill_tokens_per_s)
        self.later(done, self.unless_anew(agent, self.answer), worker, tier, kept, computed)

    def answer(self, agent, worker, tier, kept, computed):
        turn = agent.session.turns[agent.next]
        waited = self.now - agent.arrived
        done = self.now + turn.tokens_out / self.set.decode_tokens_per_s
        self.later(done, self.unless_anew(agent, self.save), worker, (tier, waited, kept, computed))

    def save(self, agent, worker, said):
        """The answer is there. Its rows go to the disk, then to the bucket; then the head is swapped."""
        segment, row = int(self.set.segment_tokens), self.set.kv_bytes_per_token
        turn = agent.session.turns[agent.next]
        _, _, kept, computed = said
        context = turn.tokens_in + turn.tokens_out
        worker.slots -= 1
        rows = (computed + turn.tokens_out) * row
        self.disk_written += rows
        done = worker.drive.use(self.now, self.set.disk_latency_s + rows / self.set.disk_bytes_per_s)
        if kept < agent.context:
            self.forget(agent, kept)
        prefix = min(self.prefix(agent), context // segment)
        key = self.prefix_key(agent)
        known = self.bucket_prefixes.get(key, 0)
        whole = context // segment
        new = whole - max(agent.uploaded, prefix)
        if prefix > known:
            self.bucket_prefixes[key] = prefix
            self.bucket.put(key, prefix * segment * row, self.now)
            new += prefix - known
        tail = context % segment * row if self.set.tail_rows else 0
        save = self.set.save_bytes + 64 * whole + 4 * (context % segment) + tail
        sent = new * segment * row + save
        self.puts += new + 2
        self.up_bytes += sent
        # Segments go side by side; the save follows them, and the head follows that.
        done = max(done, worker.up.use(self.now, sent / self.set.net_bytes_per_s)) \
            + self.set.put_latency_s * (2 + (new > 0))
        self.later(done, self.unless_anew(agent, self.commit), worker, said, whole, prefix, save)
        self.pump(worker)

    def commit(self, agent, worker, said, whole, prefix, save):
        segment, row = int(self.set.segment_tokens), self.set.kv_bytes_per_token
        turn = agent.session.turns[agent.next]
        worker.busy.discard(agent)
        agent.uploaded, agent.archived = whole, False
        agent.context = turn.tokens_in + turn.tokens_out
        agent.used = self.now
        agent.next += 1
        name = agent.session.agent
        self.bucket.put(name, (whole - prefix) * segment * row, self.now)
        self.bucket.drop(("save", name), self.now)
        self.bucket.put(("save", name), save, self.now)
        worker.memory.put(name, self.own_bytes(agent, agent.context), self.now)
        self.write(worker, agent, agent.context)
        tier, waited, kept, computed = said
        self.turns.append((tier, waited, self.now - agent.arrived, computed, kept, turn.tokens_in))
        if agent.next < len(agent.session.turns):
            self.sessions.put(name, self.own_bytes(agent, agent.context), self.now)
            following = agent.session.turns[agent.next]
            self.later(max(following.at, self.now + following.gap), self.arrive, agent)
        else:
            self.sessions.drop(name, self.now)
            self.count_live(-1)
        if not worker.takes or self.worker_of(agent) is not worker:
            self.let_go(agent)
        elif self.set.sleep_after_s:
            self.later(self.now + self.set.sleep_after_s, self.idle, agent, worker, self.now)
        if self.set.archive_after_s:
            self.later(self.now + self.set.archive_after_s, self.archive, agent, self.now)
        self.pump(worker)

    def forget(self, agent, kept):
        """History was changed behind so many tokens. Segments behind them are of no use any more."""
        segment = int(self.set.segment_tokens)
        agent.uploaded = min(agent.uploaded, max(kept // segment, self.prefix(agent)))
        rows = max(0, agent.uploaded - self.prefix(agent)) * segment * self.set.kv_bytes_per_token
        if agent.session.agent in self.bucket.entries:
            self.bucket.put(agent.session.agent, rows, self.now)
        for worker in list(agent.places):
            size = worker.disk.entries.get(agent.session.agent, 0)
            worker.disk.put(agent.session.agent, min(size, self.own_bytes(agent, kept)), self.now)

    def write(self, worker, agent, tokens):
        """So many of the agent's tokens are on the worker's disk."""
        key, name = self.prefix_key(agent), agent.session.agent
        if self.prefix(agent):
            worker.disk.put(key, self.prefix_bytes(agent), self.now)
        worker.disk.put(name, max(worker.disk.entries.get(name, 0), self.own_bytes(agent, tokens)), self.now)
        agent.places.add(worker)
        self.trim(worker)

    def trim(self, worker):
        """Evicts the least recently used from the disk, but for those in memory: their rows go on from there."""
        over, victims = worker.disk.level - self.set.disk_bytes, []
        for key, size in worker.disk.entries.items():
            if over <= 0:
                break
            if key not in worker.memory.entries:
                victims.append(key)
                over -= size
        for key in victims:
            worker.disk.drop(key, self.now)
            if not isinstance(key, tuple):
                self.agents[key].places.discard(worker)

    def idle(self, agent, worker, since):
        if agent.used == since and agent not in worker.busy and agent not in worker.queue:
            self.sleep(agent, worker)

    def archive(self, agent, since):
        """Its rows leave the bucket and all disks; its tokens stay."""
        if agent.used == since and not any(agent in worker.busy for worker in self.workers):
            agent.archived, agent.uploaded = True, 0
            self.bucket.drop(agent.session.agent, self.now)
            self.bucket.put(("save", agent.session.agent), self.set.save_bytes + 4 * agent.context, self.now)
            self.puts += 2
            for worker in agent.places:
                worker.disk.drop(agent.session.agent, self.now)
            agent.places.clear()

    def count_live(self, change):
        self.live_area += self.live * (self.now - self.live_since)
        self.live_since = self.now
        self.live += change
        self.live_peak = max(self.live_peak, self.live)
