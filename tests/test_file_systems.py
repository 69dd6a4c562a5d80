"""File systems that keep less, or say other things, than a local disk does."""

import json
import os
import resource
import subprocess

import pytest

from conftest import BIN, Result, preload

# The path that a descriptor was opened by.
PATH_OF = """
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <sys/syscall.h>
static const char* path_of(int fd) {
  static __thread char path[4096];
  char name[64];
  snprintf(name, sizeof name, "/proc/self/fd/%d", fd);
  ssize_t size = readlink(name, path, sizeof path - 1);
  path[size < 0 ? 0 : size] = 0;
  return path;
}
"""


@pytest.mark.parametrize("store", ["store", "deep/er/store", "./store", "{tmp}/store"])
def test_each_directory_of_a_new_store_is_flushed_with_its_parent(tiny_model, tmp_path, store):
    """Or a power cut takes the store away whole."""
    env = preload(tmp_path, PATH_OF + """
int fsync(int fd) {
  FILE* log = fopen(getenv("SYNC_LOG"), "a");
  fprintf(log, "%s\\n", path_of(fd));
  fclose(log);
  return syscall(SYS_fsync, fd);
}""")
    cwd, log = tmp_path / "cwd", tmp_path / "log"
    cwd.mkdir()
    command = [BIN, "run", "--model", tiny_model, "--agent", "ada", "--prompt", "Hello", "--max-tokens", "2",
               "--store", store.format(tmp=cwd)]
    Result(subprocess.run(command, cwd=cwd, capture_output=True, env={**os.environ, **env, "SYNC_LOG": str(log)})).ok()
    flushed = log.read_text().splitlines()
    made = [path for path in cwd.rglob("*") if path.is_dir() and path.name in ("deep", "er", "store")]
    assert len(made) == (3 if "deep" in store else 1)
    for path in made:
        assert str(path.parent) in flushed, path


def mapped_files(cli, env):
    """What a conversation has mapped of the store's files."""
    chat = subprocess.Popen(cli.command("chat", "--model", cli.model, "--agent", "ada", "--raw", "--json", "--max-tokens", 4),
                            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **env})
    try:
        chat.stdin.write(" and then\n")
        chat.stdin.flush()
        turn = json.loads(chat.stdout.readline())
        with open(f"/proc/{chat.pid}/maps") as maps:
            return {line.split()[-1] for line in maps if str(cli.store) in line}, turn["text"]
    finally:
        chat.communicate("")


@pytest.mark.parametrize("kind", [0x6969, 0xFF534D42, 0x65735546, 0x01021997], ids=["nfs", "smb", "fuse", "9p"])
def test_nothing_is_mapped_from_a_network(ada, tmp_path, kind):
    """Whoever touches a page that can't be fetched dies."""
    local = ada.copy(tmp_path / "local")
    env = preload(tmp_path, f"""
#include <sys/statfs.h>
#include <sys/syscall.h>
#include <unistd.h>
int fstatfs(int fd, struct statfs* out) {{
  int result = syscall(SYS_fstatfs, fd, out);
  out->f_type = {kind};
  return result;
}}
int fstatfs64(int fd, struct statfs64* out) {{ return fstatfs(fd, (struct statfs*)out); }}""")
    mapped, text = mapped_files(local, {})
    assert sorted(map(str, local.segments())) == sorted(mapped)
    assert mapped_files(ada, env) == (set(), text)


def test_inodes_that_do_not_stay_are_an_error_and_no_endless_wait(tiny, tmp_path):
    env = preload(tmp_path, PATH_OF + """
#include <sys/stat.h>
int fstat(int fd, struct stat* out) {
  int result = syscall(SYS_newfstatat, fd, "", out, AT_EMPTY_PATH);
  if (strstr(path_of(fd), ".lock")) out->st_ino += 1;
  return result;
}
int fstat64(int fd, struct stat64* out) { return fstat(fd, (struct stat*)out); }""")
    try:
        result = tiny.run("ada", "Hello", env=env, timeout=60)
    except subprocess.TimeoutExpired:
        pytest.fail("it waits for ever")
    result.fails("io", ".lock", "file system")


def test_a_file_that_may_grow_no_further_is_an_error(ada, words, tmp_path):
    exported = tmp_path / "ada.safetensors"
    ada("export", "ada", exported).ok()
    before = ada.state()

    def limited(*command):
        return Result(subprocess.run(ada.command(*command), capture_output=True,
                                     preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))))

    for command in (["run", "--model", ada.model, "--agent", "ada", "--prompt", words(300), "--raw", "--max-tokens", 2],
                    ["fork", "ada", "eve"], ["import", exported, "eve"], ["export", "ada", tmp_path / "again.safetensors"]):
        limited(*command).fails("io", "too large", answered=command[0] == "run")
    assert ada.state() == before and not (tmp_path / "again.safetensors").exists()
