"""clang 16 with libc++ is the nearest to a Mac's compiler. `make libcxx` compiles all files; here are those of the room base."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BUILD = Path(os.environ.get("TORPOR_BIN", ROOT / "build" / "torpor")).parent


def test_the_room_base_compiles_with_clang_16_and_libcxx():
    if shutil.which("clang++-16") is None or not Path("/usr/lib/llvm-16/include/c++/v1").is_dir():
        pytest.skip("clang-16 and libc++-16-dev are not installed")
    if not (BUILD / "compile_commands.json").is_file():
        pytest.skip(f"{BUILD} has no compile_commands.json: the program was not built here")
    check = subprocess.run([sys.executable, ROOT / "scripts" / "check-libcxx", "--build", BUILD, "src/base/"], capture_output=True, text=True)
    assert check.returncode == 0, check.stdout + check.stderr
