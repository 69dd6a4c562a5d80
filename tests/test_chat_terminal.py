"""What is typed and pasted to `torpor chat` on a terminal."""

import contextlib
import os
import pty
import select
import signal
import subprocess
import termios

import pytest

from conftest import read_to_the_end


class Terminal:
    """`torpor chat` with a pseudo-terminal, and what it has written since the last word that was waited for."""

    def __init__(self, torpor, *args, **kwargs):
        self.leader, self.follower = pty.openpty()
        self.mode = termios.tcgetattr(self.follower)
        command = torpor.command("chat", "--model", torpor.model, "--agent", "ada", "--max-tokens", 2, "--temperature", 0, *args)
        self.process = subprocess.Popen(command, stdin=self.follower, stderr=self.follower, start_new_session=True,
                                        env={**os.environ, "TERM": "xterm"}, **{"stdout": self.follower, **kwargs})
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
