"""The command line on stores that it may only read, and on agents that others wrote: what is refused, and what is shown."""

import json
import os
import pty
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import mlx.core as mx
import mlx_lm.models.cache as mlx_cache
import pytest

from conftest import BIN, EXIT, Result, make_tiny_model, preload, read_to_the_end

import torpor

# ---- stores that can only be read

READ_ONLY = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <string.h>
#include <sys/stat.h>
static int refused(const char* path, int flags) { return (flags & (O_CREAT | O_WRONLY | O_RDWR)) && strstr(path, "/read-only/"); }
int open(const char* path, int flags, ...) {
  va_list more; va_start(more, flags); int mode = va_arg(more, int); va_end(more);
  if (refused(path, flags)) { errno = EROFS; return -1; }
  return ((int (*)(const char*, int, ...))dlsym(RTLD_NEXT, "open"))(path, flags, mode);
}
int open64(const char* path, int flags, ...) {
  va_list more; va_start(more, flags); int mode = va_arg(more, int); va_end(more);
  if (refused(path, flags)) { errno = EROFS; return -1; }
  return ((int (*)(const char*, int, ...))dlsym(RTLD_NEXT, "open64"))(path, flags, mode);
}
int openat(int at, const char* path, int flags, ...) {
  va_list more; va_start(more, flags); int mode = va_arg(more, int); va_end(more);
  if (refused(path, flags)) { errno = EROFS; return -1; }
  return ((int (*)(int, const char*, int, ...))dlsym(RTLD_NEXT, "openat"))(at, path, flags, mode);
}
int mkdir(const char* path, mode_t mode) {
  if (strstr(path, "/read-only/")) { errno = EROFS; return -1; }
  return ((int (*)(const char*, mode_t))dlsym(RTLD_NEXT, "mkdir"))(path, mode);
}
"""


@pytest.mark.parametrize("locks", [True, False], ids=["with locks", "without"])
def test_an_agent_of_a_store_that_can_only_be_read_speaks_without_saving(ada, tmp_path, locks):
    cli = ada.copy(tmp_path / "read-only" / "store")
    if not locks:
        shutil.rmtree(cli.store / ".locks")
    env = preload(tmp_path, READ_ONLY)
    before = cli.state()
    turn = cli.run("ada", " and then", "--raw", "--no-save", env=env).ok().json
    assert turn["tokens"]["cached"] > 500
    assert turn["text"] == ada.run("ada", " and then", "--raw").ok().json["text"]
    assert cli.state() == before
    assert cli.run("ada", " and then", "--raw", env=env).code == EXIT["io"]


NO_LOCKS = """
#include <errno.h>
int flock(int fd, int operation) { errno = ENOLCK; return -1; }
"""


def test_a_file_system_without_locks_is_named_and_can_be_read(ada, tmp_path):
    env = preload(tmp_path, NO_LOCKS)
    ada.run("ada", " and then", "--raw", env=env).fails("io", "keeps no locks", "local disk")
    assert ada("ls", "--json", env=env).ok().json[0]["agent"] == "ada"
    ada("show", "ada", env=env).ok()


def test_the_doctor_finds_a_file_system_without_locks(tiny, tmp_path):
    looked = tiny("doctor", "--json", env=preload(tmp_path, NO_LOCKS))
    [disk] = [check for check in looked.json["checks"] if check["name"] == "disk"]
    assert looked.code == EXIT["io"] and disk["locks"] is False and "flock" in disk["advice"]


# ---- agents that others wrote, and what a terminal shows

def test_an_agent_of_mlx_lms_is_called_one(tiny):
    cache = mlx_cache.KVCache()
    cache.update_and_fetch(mx.ones((1, 1, 3, 64)), mx.zeros((1, 1, 3, 64)))
    for name, model in (("ada", None), ("eve", tiny.model)):
        torpor.CachePersistence(tiny.store, model).save_agent_cache(name, [cache], tokens=[1, 2, 3])
        tiny.run(name, "Hello").fails("incompatible", f"'{name}'", "saved from a cache by a program")
    shown = tiny("show", "ada").ok().out
    assert not re.search(r"(?m)^\w+$", shown), f"a line without a value: {shown}"
    assert "architecture" not in shown and "architecture" in tiny("show", "eve").ok().out


def test_ls_tells_of_files_that_are_missing(ada):
    assert ada("ls", "--json").ok().json[0]["missing_files"] == 0 and "missing" not in ada("ls").ok().out
    for segment in ada.segments():
        segment.unlink()
    assert ada("ls", "--json").ok().json[0]["missing_files"] == 2
    assert "asleep, 2 files missing" in ada("ls").ok().out


@pytest.fixture
def nobody():
    """nobody(...): a command as a user who owns the store, but not all of its files."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to be somebody else")
    with tempfile.TemporaryDirectory() as directory:
        os.chmod(directory, 0o755)

        def run(*args, check=True):
            return Result(subprocess.run([str(BIN), *args, "--store", f"{directory}/store"], capture_output=True, timeout=60,
                                         user=65534, group=65534, extra_groups=[], cwd="/"))

        run.store = Path(directory) / "store"
        try:
            started = run("--version").code
        except PermissionError:
            started = None
        if started != 0:
            pytest.skip("the program may not be started by others")
        yield run


def test_an_agent_of_somebody_else_is_not_readable(ada, nobody):
    cli = ada.copy(nobody.store)
    cli("fork", "ada", "eve").ok()
    for path in [nobody.store, *nobody.store.rglob("*")]:
        os.chown(path, 65534, 65534)
    os.chown(cli.agent_file("eve"), 0, 0)
    os.chmod(cli.agent_file("eve"), 0o600)
    (nobody.store / "eve.json").unlink()
    (nobody.store / ".locks" / "eve.lock").unlink(missing_ok=True)
    rows = {line.split()[0]: line for line in nobody("ls").ok().out.splitlines()[1:]}
    assert "not readable" in rows["eve"] and "asleep" in rows["ada"]
    assert [agent["agent"] for agent in nobody("ls", "--json").ok().json] == ["ada", "eve"]
    checked = nobody("verify")
    assert checked.code == EXIT["io"], checked.err
    assert "ada: intact" in checked.out and "eve: not readable" in checked.out
    assert {one["agent"]: one["readable"] for one in nobody("verify", "--json").json["agents"]} == {"ada": True, "eve": False}
    nobody("gc").fails("io", "eve")
    assert len(cli.segments()) == 2


def test_a_terminal_obeys_nothing_that_a_model_writes(tiny, tmp_path, tokenizer):
    escape = tokenizer.token_to_id("\u011b")  # as byte-level tokenizers write the byte 0x1B

    def says_escape(config, weights):
        weights["model.embed_tokens.weight"][:, 0] = 5
        weights["lm_head.weight"] *= 0.001
        weights["lm_head.weight"][escape, 0] = 100

    model = make_tiny_model(tmp_path / "escaping", says_escape)
    command = tiny.command("run", "--model", model, "--prompt", "hi", "--max-tokens", 3)
    assert subprocess.run(command, capture_output=True, timeout=60).stdout == b"\x1b\x1b\x1b\n"  # no terminal: as it is
    leader, follower = pty.openpty()
    process = subprocess.Popen(command, stdout=follower, stderr=subprocess.DEVNULL)
    os.close(follower)
    said = read_to_the_end(leader)
    os.close(leader)
    assert process.wait(timeout=60) == 0 and said == b"\\u001b" * 3 + b"\r\n"
