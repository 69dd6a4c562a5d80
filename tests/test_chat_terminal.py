"""What is typed and pasted to `torpor chat` on a terminal."""

import contextlib
import http.server
import json
import os
import pty
import select
import signal
import subprocess
import termios
import threading

import pytest

from conftest import read_to_the_end


class Terminal:
    """`torpor chat` with a pseudo-terminal, and what it has written since the last word that was waited for."""

    def __init__(self, torpor, *args, **kwargs):
        self.leader, self.follower = pty.openpty()
        self.mode = termios.tcgetattr(self.follower)
        if "--server" not in args:
            args = ("--model", torpor.model, *args)
        command = torpor.command("chat", "--agent", "ada", "--max-tokens", 2, "--temperature", 0, *args)
        env = {**os.environ, "TERM": "xterm", "NO_COLOR": "", **kwargs.pop("env", {})}
        self.process = subprocess.Popen(command, stdin=self.follower, stderr=self.follower, start_new_session=True, env=env,
                                        **{"stdout": self.follower, **kwargs})
        self.said = b""

    def hear(self, word):
        while word not in self.said:
            assert select.select([self.leader], [], [], 60)[0], self.said  # nothing more is said
            self.said += os.read(self.leader, 4096)
        before, self.said = self.said.split(word, 1)
        return before

    def hear_answer(self):
        """Up to the next prompt. While a line is edited it is written anew, with the prompt before it."""
        self.hear(b"generated at")
        self.hear(b"ada> ")

    def type(self, keys):
        os.write(self.leader, keys)

    def paste(self, text):
        """As a terminal does that was asked for brackets; its Enter key is a carriage return, in a paste too."""
        for part in [b"\x1b[200~", *(text[i:i + 1000] for i in range(0, len(text), 1000)), b"\x1b[201~"]:
            os.write(self.leader, part.replace(b"\n", b"\r"))

    def end(self):
        """The exit status; the terminal must be as it was."""
        status = self.process.wait(60)
        assert termios.tcgetattr(self.follower) == self.mode
        return status

    def close(self):
        os.close(self.follower)
        read_to_the_end(self.leader)
        os.close(self.leader)


@pytest.fixture
def terminal(tiny):
    with contextlib.ExitStack() as open_ones:
        def start(*args, **kwargs):
            terminal = Terminal(tiny, *args, **kwargs)
            open_ones.callback(terminal.close)
            open_ones.callback(terminal.process.kill)
            terminal.hear(b"ada> ")
            return terminal
        yield start


def messages(tiny):
    return [message["content"] for message in tiny("show", "ada", "--json").ok().json["messages"] if message["role"] == "user"]


def test_a_paste_is_one_message_whatever_its_lines_and_length(tiny, terminal):
    chat = terminal()
    text = "\n".join(f"{i} one hundred bytes of a document that someone pastes".ljust(100, ".") for i in range(60)) + "\n\nlast"
    chat.paste(text.encode())
    chat.type(b" line\r")
    chat.hear_answer()
    chat.type(b"\x04")
    assert chat.end() == 0
    assert messages(tiny) == [text + " line"]


def test_a_line_can_be_edited_and_brought_back(tiny, terminal):
    chat = terminal()
    chat.type("cäne".encode() + b"\x1b[D\x7ft\r")  # left, backspace
    chat.hear_answer()
    chat.type(b"\x1b[A\r")  # up
    chat.hear_answer()
    chat.type(b"\x04")
    assert chat.end() == 0
    assert messages(tiny) == ["cäte", "cäte"]


def test_a_backslash_at_a_lines_end_takes_the_next_line_along(tiny, terminal):
    chat = terminal()
    chat.type(b"One\\\r")
    chat.hear(b"...> ")
    chat.type(b"\\\r")
    chat.hear(b"...> ")
    chat.paste(b"two\\\nthree")
    chat.type(b"\r")
    chat.hear_answer()
    chat.type(b"\x1b[A!\r")  # up: the whole message
    chat.hear_answer()
    chat.type(b"four\\\r")
    chat.hear(b"...> ")
    chat.type(b"\x04")
    assert chat.end() == 0
    text = "One\n\ntwo\\\nthree"
    assert messages(tiny) == [text, text + "!"]


def test_what_was_said_to_an_agent_before_comes_back_in_another_process(tiny, terminal):
    tiny.run("ada", "Said long ago.").ok()
    chat = terminal()
    chat.type(b"\x1b[A\r")
    chat.hear_answer()
    chat.type(b"\x04")
    assert chat.end() == 0
    assert messages(tiny) == ["Said long ago."] * 2


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_ends_a_chat_that_waits_in_the_middle_of_a_line(tiny, terminal, sent):
    chat = terminal("--write-behind")
    chat.type(b"One\r")
    chat.hear_answer()
    chat.type(b"half a l")
    chat.hear(b"half a l")
    if sent == signal.SIGINT:
        chat.type(b"\x03")  # the key sends none while a line is typed
    else:
        chat.process.send_signal(sent)
    assert chat.end() == 128 + sent
    assert messages(tiny) == ["One"]


def test_answers_that_go_to_a_file_leave_the_terminal_its_lines(tiny, terminal, tmp_path):
    with open(tmp_path / "answers", "wb") as answers:
        chat = terminal("--json", stdout=answers)
        chat.type(b"One\n")
        chat.hear(b"ada> ")
        chat.type(b"\x04")
        assert chat.end() == 0
    assert (tmp_path / "answers").read_text().count("\n") == 1 and messages(tiny) == ["One"]


# ---- answers of a script, as a server of Torpor's sends them

ANSWER = ["# Oil\n\nUse **whale", " oil** and `wi", "ck\x1b[31m`:\n- 2*3*4 *cans", "*\n```sh\nls *\n", "```\nDo"]
PLAIN = "".join(ANSWER).replace("\x1b", "\\u001b")
STYLED = ("\x1b[0;1;4mOil\x1b[0m\n\nUse \x1b[0;1mwhale oil\x1b[0m and \x1b[0;36mwick\\u001b[31m\x1b[0m:\n\u2022 2*3*4 "
          "\x1b[0;3mcans\x1b[0m\n\x1b[0;2m```sh\x1b[0m\n\x1b[0;36mls *\x1b[0m\n\x1b[0;2m```\x1b[0m\nDo\n")


class Script(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def send(self, status, text):
        self.send_response(status)
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(text.encode())

    def do_GET(self):
        if self.path == "/torpor/v1/agents":
            agents = [{"agent": name, "model": "m", "tokens": 3, "awake": True, "pinned": False, "unsaved": False}
                      for name in ("ada", "eve-one", "eve-two")]
            return self.send(200, json.dumps({"agents": agents}))
        self.send(404, json.dumps({"error": {"message": "no agent", "code": "kNotFound", "agent": self.path.split("/")[4]}}))

    def do_POST(self):
        if not self.path.endswith("/turn"):
            return self.do_GET()
        result = {"agent": "ada", "text": "".join(ANSWER), "tokens": dict.fromkeys(["context", "cached", "prefilled", "generated"], 1),
                  "bytes": {"written": 1}, "timing_ms": {"ttft": 1, "decode": 1, "save": 1}}
        events = [("text", {"text": text}) for text in ANSWER] + [("result", result)]
        self.send(200, "".join(f"event: {name}\ndata: {json.dumps(data)}\n\n" for name, data in events))

    def log_message(self, *_):
        pass


@pytest.fixture
def script():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Script) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield "--server", f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("env, answer", [({}, STYLED), ({"NO_COLOR": "1"}, PLAIN), ({"TERM": "dumb"}, PLAIN), ({"TERM": ""}, PLAIN)],
                         ids=["xterm", "NO_COLOR", "dumb", "no TERM"])
def test_an_answer_is_shown_as_markdown_where_a_terminal_may_have_styles(script, terminal, env, answer):
    chat = terminal(*script, env=env)
    chat.type(b"Hi.\r")
    chat.hear(b"Hi.")
    heard = chat.hear(b"[ada: 1 tokens").replace(b"\r\n", b"\n").decode()
    assert answer in heard
    if answer == PLAIN:
        assert "\x1b[0" not in heard and "\x1b[1m" not in heard
    chat.hear(b"ada> ")
    chat.type(b"\x04")
    assert chat.end() == 0


def test_an_answer_in_a_pipe_has_every_byte_that_the_model_wrote(script, tiny):
    chat = subprocess.run(tiny.command("chat", "--agent", "ada", *script), input=b"Hi.\n", capture_output=True, timeout=60,
                          env={**os.environ, "TERM": "xterm"})
    assert chat.returncode == 0 and chat.stdout.decode() == "".join(ANSWER) + "\n"


def test_tab_completes_commands_and_the_names_of_agents(script, terminal):
    chat = terminal(*script)
    chat.type(b"/unp\t\r")  # a command that takes nothing
    chat.hear(b"/unpin")
    chat.hear(b"no agent")
    chat.hear(b"ada> ")
    chat.type(b"/agent\t\t")  # /agent or /agents
    chat.hear(b"/agents")
    chat.type(b" e\t")
    chat.hear(b"eve-")
    chat.type(b"tw\t\r")
    chat.hear(b"eve-two is new.")
    chat.hear(b"eve-two> ")
    chat.type(b"\x04")
    assert chat.end() == 0
