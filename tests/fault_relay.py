"""HTTP over asyncio for chaos.py: a relay that makes a worse network of a good one, and requests to a server."""

import asyncio
import dataclasses
import json
import random

MOST_HEAD = 1 << 16
REFUSAL = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"


@dataclasses.dataclass
class Message:
    """A request or an answer, as it was sent."""

    head: bytes
    body: bytes

    @property
    def first_line(self):
        return self.head.split(b"\r\n", 1)[0].decode("latin-1")

    @property
    def status(self):
        return int(self.first_line.split()[1])

    def header(self, name):
        for line in self.head.split(b"\r\n")[1:]:
            key, _, value = line.partition(b":")
            if key.strip().lower() == name:
                return value.strip().decode("latin-1")
        return None


async def read_message(reader, bodiless=False):
    """`bodiless`: the answer to HEAD. None: the other side has closed between two messages."""
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError as error:
        if error.partial:
            raise ConnectionError("a head was cut off") from error
        return None
    message = Message(head, b"")
    if bodiless or message.first_line.startswith("HTTP/") and message.status in (204, 304):
        return message
    try:
        if (message.header(b"transfer-encoding") or "").lower() == "chunked":
            size = 1
            while size:
                line = await reader.readuntil(b"\r\n")
                size = int(line.split(b";")[0], 16)
                message.body += line + await reader.readexactly(size + 2)
        elif length := int(message.header(b"content-length") or 0):
            message.body = await reader.readexactly(length)
    except asyncio.IncompleteReadError as error:
        raise ConnectionError("a body was cut off") from error
    return message


async def ask(port, method, path, body=None, headers=(), timeout=30.0):
    """The answer of a server on this machine. OSError or TimeoutError: there is none."""
    async with asyncio.timeout(timeout):
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=MOST_HEAD)
        try:
            data = b"" if body is None else json.dumps(body).encode()
            lines = [f"{method} {path} HTTP/1.1", f"host: 127.0.0.1:{port}", "connection: close",
                     f"content-length: {len(data)}", *(f"{name}: {value}" for name, value in dict(headers).items())]
            writer.write("\r\n".join([*lines, "", ""]).encode() + data)
            answer = await read_message(reader)
            if answer is None:
                raise ConnectionError("no answer came")
            return answer
        finally:
            writer.close()


class Relay:
    """Passes requests on to `upstream`, host and port, one after the other of each connection.

    `state` is the network's: "open"; "held": nothing gets through until it is open again, and then all does, late;
    "cut": connections are reset. With `finishes`, what had been sent to the server is answered there all the same, and
    the answer is lost. Else the server sees the client go.
    Whoever sets it has `one_fault`. Shares of requests: `refuse` are answered 503, `lose` get no answer, `slow` take up
    to `most_delay` seconds."""

    def __init__(self, upstream, seed, finishes=False, refuse=0.0, lose=0.0, slow=0.0, most_delay=0.1):
        self.upstream, self.random, self.finishes = upstream, random.Random(seed), finishes
        self.refuse, self.lose, self.slow, self.most_delay = refuse, lose, slow, most_delay
        self.opened, self.one_fault = asyncio.Event(), asyncio.Lock()
        self.opened.set()
        self.state, self.under_way, self.counts = "open", 0, {"passed": 0, "refused": 0, "lost": 0, "slow": 0}
        self.writers, self.others = set(), set()

    async def start(self, host="127.0.0.1"):
        self.server = await asyncio.start_server(self.serve, host, 0, limit=MOST_HEAD, backlog=512)
        self.port = self.server.sockets[0].getsockname()[1]
        return self

    def set(self, state):
        self.state = state
        self.opened.clear() if state == "held" else self.opened.set()
        if state == "cut":
            for writer in list(self.writers | (set() if self.finishes else self.others)):
                writer.transport.abort()

    async def serve(self, reader, writer):
        self.writers.add(writer)
        there = None
        try:
            while (request := await read_message(reader)) is not None:
                there = await self.pass_on(request, writer, there)
                if there is None:
                    break
        except (OSError, ValueError, asyncio.LimitOverrunError, asyncio.IncompleteReadError):
            pass  # one of both sides has gone
        finally:
            self.writers.discard(writer)
            writer.transport.abort()
            if there is not None:
                self.others.discard(there[1])
                there[1].close()

    async def pass_on(self, request, writer, there):
        """The connection to the server; None: this one is over."""
        await self.opened.wait()
        if self.state == "cut":
            return None
        if self.random.random() < self.slow:
            self.counts["slow"] += 1
            await asyncio.sleep(self.random.uniform(0, self.most_delay))
        if self.random.random() < self.refuse:
            self.counts["refused"] += 1
            head = f"HTTP/1.1 503 Slow Down\r\ncontent-length: {len(REFUSAL)}\r\n\r\n"
            head_only = request.first_line.startswith("HEAD ")
            writer.write(head.encode() + (b"" if head_only else REFUSAL))
            await writer.drain()
            return there or await self.connect()
        there = there or await self.connect()
        self.under_way += 1
        try:
            there[1].write(request.head + request.body)
            answer = await read_message(there[0], request.first_line.startswith("HEAD "))
        finally:
            self.under_way -= 1
        await self.opened.wait()
        lost = self.random.random() < self.lose
        self.counts["lost" if lost else "passed"] += 1
        ends = answer is None or lost or self.state == "cut"
        if not ends:
            writer.write(answer.head + answer.body)
            await writer.drain()
            ends = (answer.header(b"connection") or "").lower() == "close"
        if ends:
            self.others.discard(there[1])
            there[1].close()
        return None if ends else there

    async def connect(self):
        there = await asyncio.open_connection(*self.upstream, limit=MOST_HEAD)
        self.others.add(there[1])
        return there

    async def idle(self):
        """Waits until the server has nothing of this relay's to answer; no new request gets there while it is held."""
        while self.under_way:
            await asyncio.sleep(0.005)
