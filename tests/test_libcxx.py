"""clang 16 with libc++ is the nearest to a Mac's compiler, and checks what mutexes guard (src/base/mutex.h). `make libcxx` compiles
all files; here are those of the room base and those that lock a mutex."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BUILD = Path(os.environ.get("TORPOR_BIN", ROOT / "build" / "torpor")).parent

pytestmark = pytest.mark.skipif(shutil.which("clang++-16") is None or not Path("/usr/lib/llvm-16/include/c++/v1").is_dir(),
                                reason="clang-16 and libc++-16-dev are not installed")


def check(*prefixes):
    if not (BUILD / "compile_commands.json").is_file():
        pytest.skip(f"{BUILD} has no compile_commands.json: the program was not built here")
    done = subprocess.run([sys.executable, ROOT / "scripts" / "check-libcxx", "--build", BUILD, *prefixes], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_room_base_compiles_with_clang_16_and_libcxx():
    check("src/base/")


def test_what_a_mutex_guards_is_touched_under_it():
    sources = [path for room in ("src", "python") for path in (ROOT / room).rglob("*.cc") if "MutexLock" in path.read_text()]
    check(*(str(path.relative_to(ROOT)) for path in sources if path.parent != ROOT / "src" / "base"))


@pytest.mark.parametrize("access", ["return count_;", "bump(); return 0;", "const MutexLock lock(mutex_); const MutexUnlock unlocked(mutex_); return count_;"])
def test_an_access_without_the_mutex_does_not_compile(tmp_path, access):
    source = tmp_path / "counter.cc"
    source.write_text(f"""
#include "base/mutex.h"
class Counter {{
 public:
  int locked() {{ const torpor::MutexLock lock(mutex_); bump(); return count_; }}
  int planted() {{ using namespace torpor; {access} }}

 private:
  void bump() TORPOR_REQUIRES(mutex_) {{ ++count_; }}
  torpor::Mutex mutex_;
  int count_ TORPOR_GUARDED_BY(mutex_) = 0;
}};
""")
    command = ["clang++-16", "-stdlib=libc++", "-std=c++20", "-fsyntax-only", "-Wthread-safety", "-Werror=thread-safety", f"-I{ROOT}/src", source]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0
    assert done.stderr.count("error:") == 1 and "requires holding mutex 'mutex_'" in done.stderr, done.stderr
