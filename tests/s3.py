"""S3 servers for tests: gofakes3 and versitygw (scripts/fetch-sdks), and a proxy that makes a worse store of one."""

import http.client
import http.server
import os
import secrets
import socket
import subprocess
import threading
import time
from pathlib import Path

from conftest import ROOT

BUCKET = "agents"


def is_here(name):
    return (ROOT / ".sdks" / name / "ready").exists()


def program(name):
    assert is_here(name), f"run scripts/fetch-sdks {name} first"
    return ROOT / ".sdks" / name / name


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


class Server:
    """A server in a process of its own, and the environment that finds it."""

    def __init__(self, command, env, port, host="127.0.0.1"):
        self.port = port
        self.key, self.secret = env.get("ROOT_ACCESS_KEY", "TESTKEY"), env.get("ROOT_SECRET_KEY", "test-secret")
        self.process = subprocess.Popen(list(map(str, command)), env={**os.environ, **env}, stdout=subprocess.DEVNULL,
                                        stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 30
        while True:
            try:
                socket.create_connection((host, port), timeout=1).close()
                return
            except OSError:
                assert self.process.poll() is None and time.monotonic() < deadline, f"{command[0]} doesn't serve"
                time.sleep(0.02)

    def env(self, port=None):
        return environment(port or self.port, self.key, self.secret)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()


def environment(port, key="TESTKEY", secret="test-secret", host="127.0.0.1"):
    """Nothing of the user's own settings holds."""
    return {"AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_ACCESS_KEY_ID": key, "AWS_SECRET_ACCESS_KEY": secret,
            "AWS_REGION": "us-east-1", "AWS_CONFIG_FILE": os.devnull, "AWS_SHARED_CREDENTIALS_FILE": os.devnull}


def gofakes3():
    """In memory; checks no signature."""
    port = free_port()
    return Server([program("gofakes3"), "-host", f"127.0.0.1:{port}", "-backend", "memory", "-initialbucket", BUCKET,
                   "-quiet"], {}, port)


def versitygw(directory):
    """Over plain files; checks signatures."""
    port = free_port()
    (Path(directory) / BUCKET).mkdir(parents=True)
    env = {"ROOT_ACCESS_KEY": "TEST" + secrets.token_hex(8), "ROOT_SECRET_KEY": secrets.token_hex(20)}
    return Server([program("versitygw"), "--port", f"127.0.0.1:{port}", "--quiet", "posix", directory], env, port)


class Proxy(http.server.ThreadingHTTPServer):
    """Before a server that checks no signatures. `fault` is called with each request's method, path and headers, which
    it may change. It returns None to pass the request on, or (status, body) to answer it. Where `lose` says so, the
    connection is cut in place of an answer."""

    daemon_threads = True
    request_queue_size = 256

    def __init__(self, upstream, fault=lambda method, path, headers: None, lose=lambda method, path: False):
        super().__init__(("127.0.0.1", 0), Handler)
        self.upstream, self.fault, self.lose = upstream, fault, lose
        self.seen = []
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    @property
    def port(self):
        return self.server_address[1]

    def ask(self, method, path, headers=(), body=None):
        """The server's answer: status, headers, body."""
        connection = http.client.HTTPConnection("127.0.0.1", self.upstream, timeout=30)
        try:
            connection.request(method, path, body, dict(headers))
            answer = connection.getresponse()
            return answer.status, answer.getheaders(), answer.read()
        finally:
            connection.close()

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()

    def handle_error(self, request, address):
        pass  # a client that has gone


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do(self):
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        headers = dict(self.headers.items())
        self.server.seen.append((self.command, self.path))
        faulty = self.server.fault(self.command, self.path, headers)
        if faulty:
            status, given, data = faulty[0], [], faulty[1]
        else:
            status, given, data = self.server.ask(self.command, self.path, headers, body)
        if self.server.lose(self.command, self.path):
            self.close_connection = True
            return
        self.send_response(status)
        length = len(data)
        for name, value in given:
            if name.lower() == "content-length" and self.command == "HEAD":
                length = int(value)
            elif name.lower() not in ("content-length", "transfer-encoding", "connection", "date", "server"):
                self.send_header(name, value)
        self.send_header("content-length", str(length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = do

    def log_message(self, *_):
        pass


def without_conditions(method, path, headers):
    """A store that never looks at them."""
    for name in [name for name in headers if name.lower() in ("if-match", "if-none-match")]:
        del headers[name]


class CheckThenPut:
    """A store that checks a condition, and writes later whatever has come between."""

    def __init__(self):
        self.proxy = None

    def __call__(self, method, path, headers):
        conditions = {name.lower(): value for name, value in headers.items()}
        without_conditions(method, path, headers)
        if method != "PUT" or not {"if-match", "if-none-match"} & set(conditions):
            return None
        status, found, _ = self.proxy.ask("HEAD", path)
        tag = next((value for name, value in found if name.lower() == "etag"), None)
        wanted = conditions.get("if-match")
        fits = status == 200 and tag == wanted if wanted else status == 404
        time.sleep(0.002)
        return None if fits else (412, b"<Error><Code>PreconditionFailed</Code></Error>")
