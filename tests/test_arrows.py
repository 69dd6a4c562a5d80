"""Rooms include only rooms they may know (docs/design.md, section 2)."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT

DIRECT = {
    "base": [],
    "store": ["base"], "remote": ["store"], "exchange": ["store"], "text": ["base"], "kernels": ["base"],
    "model": ["kernels"], "cache": ["model"],
    "agents": ["exchange", "cache", "text"],
    "engine": ["agents"],
    "teams": ["engine"],
    "faces": ["engine"],
    "server": ["engine", "teams", "faces"],
    "cli": ["server", "remote"], "python": ["engine", "teams", "faces", "server", "remote"],
}
PUBLIC = {"error": "base", "log": "base", "version": "base", "compute_options": "base", "kv_snapshot": "base",
          "store": "store", "remote_tier": "store", "remote": "remote", "exchange": "exchange", "text": "text", "message": "text", "model_info": "model", "model": "model", "cache": "cache",
          "agents": "agents", "memory_usage": "agents", "generate_options": "engine", "generate": "engine", "engine": "engine",
          "teams": "teams"}
NO_MLX = {"base", "store", "remote", "exchange", "text", "teams", "server"}


def may_know(room):
    known = {room}
    for other in DIRECT[room]:
        known |= may_know(other)
    return known


def room_of_header(name):
    """The room of an included file, or None when it is nobody's here."""
    if match := re.fullmatch(r"torpor/(\w+)\.h", name):
        return PUBLIC[match[1]]
    first = name.split("/")[0]
    return first if "/" in name and first in DIRECT else None


def violations(sources):
    """`sources`: (room, path, text) of every file."""
    found = []
    for room, path, text in sources:
        for name in re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', text, re.MULTILINE):
            other = room_of_header(name)
            if other is not None and other not in may_know(room):
                found.append(f"{path}: {room} may not include {name} of {other}")
            if name.startswith("mlx/") and room in NO_MLX:
                found.append(f"{path}: {room} may not include {name}")
            if room == "cache" and name in ("fstream", "filesystem", "base/env.h"):
                found.append(f"{path}: cache never sees a file, but includes {name}")
    return found


def tree():
    for path in sorted((ROOT / "src").rglob("*")):
        if path.suffix in (".h", ".cc"):
            yield path.relative_to(ROOT / "src").parts[0], str(path.relative_to(ROOT)), path.read_text()
    for path in sorted((ROOT / "python" / "bindings").iterdir()):
        yield "python", str(path.relative_to(ROOT)), path.read_text()
    for path in sorted((ROOT / "include/torpor").glob("*.h")):
        yield PUBLIC[path.stem], str(path.relative_to(ROOT)), path.read_text()


def test_every_room_is_in_the_list():
    assert {path.name for path in (ROOT / "src").iterdir() if path.is_dir()} <= set(DIRECT)


def test_no_arrow_points_the_wrong_way():
    assert violations(tree()) == []


def test_a_planted_arrow_is_found():
    for room, include in (("store", '#include "cache/dense.h"'), ("store", "#include <mlx/array.h>"),
                          ("base", '#include "torpor/store.h"'), ("store", '#include "torpor/exchange.h"'),
                          ("exchange", "#include <mlx/array.h>"), ("cache", '#include "store/segment.h"'),
                          ("cache", "#include <fstream>"), ("agents", '#include "engine/generation.h"'),
                          ("text", '  # include "torpor/generate.h"')):
        assert len(violations([(room, "planted.cc", include + "\n")])) == 1, (room, include)
    assert violations([("engine", "fine.cc", '#include "store/segment.h"\n#include <vector>\n')]) == []


def test_public_headers_include_public_headers_only():
    for path in Path(ROOT / "include/torpor").glob("*.h"):
        for name in re.findall(r'#include "([^"]+)"', path.read_text()):
            assert name.startswith("torpor/"), f"{path.name} includes {name}"


def included(name, seen):
    """All that a public header includes, directly or not."""
    for other in re.findall(r'^#include [<"]([^>"]+)[>"]', (ROOT / "include" / name).read_text(), re.MULTILINE):
        if other not in seen:
            seen.add(other)
            if other.startswith("torpor/"):
                included(other, seen)
    return seen


def test_engine_and_store_need_no_header_of_mlx():
    for name in ("torpor/engine.h", "torpor/store.h", "torpor/exchange.h", "torpor/agents.h", "torpor/teams.h"):
        assert not [other for other in included(name, set()) if other.startswith("mlx")], name
    assert "mlx/array.h" in included("torpor/cache.h", set())


@pytest.mark.skipif(sys.platform == "darwin", reason="its linker keeps Rust's runtime visible")
def test_the_rust_library_shows_its_c_abi_and_nothing_else():
    libraries = list((ROOT / "rust/target").glob("*/libtorpor_shim.a"))
    assert libraries
    for library in libraries:
        listed = subprocess.run(["nm", "-g", "--defined-only", library], capture_output=True, text=True, check=True).stdout
        symbols = {line.split()[2] for line in listed.splitlines() if len(line.split()) == 3}
        headers = {"remote": ["text", "http", "grammar", "line", "remote", "hub"], "http": ["text", "http", "grammar", "line"],
                   "line": ["text", "line"], "text": ["text"]}[library.parent.name]
        declared = {name for header in headers
                    for name in re.findall(r"\b(torpor_\w+)\(", (ROOT / f"rust/include/torpor_{header}_shim.h").read_text())}
        assert symbols == declared, library
