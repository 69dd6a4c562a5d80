"""A `torpor serve` of a test's own, and requests to it."""

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import threading

from conftest import BIN


class Answer:
    def __init__(self, response):
        self.status = response.status
        self.headers = {name.lower(): value for name, value in response.getheaders()}
        self.bytes = response.read()

    @property
    def text(self):
        return self.bytes.decode()

    def json(self):
        return json.loads(self.text)

    def events(self):
        """The data of a stream's events, but for the last word of OpenAI's."""
        lines = [line[6:] for line in self.text.splitlines() if line.startswith("data: ")]
        return [json.loads(line) for line in lines if line != "[DONE]"]


class UnixConnection(http.client.HTTPConnection):
    def __init__(self, path):
        super().__init__("localhost", timeout=120)
        self.path = path

    def connect(self):
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(120)
        self.sock.connect(str(self.path))


class Server:
    """Runs until the with block ends, with a port and keys of its own."""

    def __init__(self, torpor, directory, *args, env=None, host=True):
        self.keys = directory / "api-keys"
        command = torpor.command("serve", "--model", torpor.model, "--api-key-file", self.keys, *args)
        if host:
            command += ["--port", "0"]
        self.log = []
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                                        env={**os.environ, **(env or {})})
        self.greeting = ""
        while "Dashboard" not in self.greeting and "UNIX socket" not in self.greeting:
            line = self.process.stdout.readline()
            assert line, self.process.stderr.read()
            self.greeting += line
        match = re.search(r"http://127\.0\.0\.1:(\d+)\n", self.greeting)
        self.port = int(match[1]) if match else None
        self.reader = threading.Thread(target=lambda: self.log.extend(self.process.stderr), daemon=True)
        self.reader.start()
        local = self.keys.with_name("api-keys.local")
        self.key = local.read_text().strip() if local.exists() else None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self.reader.join()

    def connection(self):
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)

    def send(self, connection, method, path, body=None, key=None, headers=None):
        text = None if body is None else body if isinstance(body, (str, bytes)) else json.dumps(body)
        key = self.key if key is None else key
        bearer = {"authorization": f"Bearer {key}"} if key else {}
        connection.request(method, path, text, {**bearer, **(headers or {})})
        return connection

    def ask(self, method, path, body=None, key=None, headers=None, connection=None):
        with contextlib.closing(connection or self.connection()) as open_connection:
            return Answer(self.send(open_connection, method, path, body, key, headers).getresponse())

    def chat(self, text, agent=None, max_tokens=4, **more):
        headers = {"x-torpor-agent": agent} if agent else {}
        key = more.pop("key", None)
        body = {"model": "tiny", "messages": [{"role": "user", "content": text}], "max_tokens": max_tokens, **more}
        return self.ask("POST", "/v1/chat/completions", body, key=key, headers=headers)

    def metric(self, sample):
        text = self.ask("GET", "/metrics").text
        found = re.search(rf"^{re.escape(sample)} (\S+)$", text, re.MULTILINE)
        return float(found[1]) if found else None

    def signal(self, number):
        os.kill(self.process.pid, number)

    def stop(self):
        """Ends it as systemd does; its exit code."""
        self.signal(signal.SIGTERM)
        return self.process.wait(120)
