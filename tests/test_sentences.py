"""The library's sentences name no option and no command: each face adds its own hints."""

import re
from functools import cache

from conftest import ROOT

LIBRARY = ("base", "store", "remote", "text", "kernels", "model", "cache", "agents", "engine")


@cache
def commands():
    """The names of the command line's commands."""
    text = "".join(path.read_text() for path in (ROOT / "src/cli").glob("*.cc"))
    return set(re.findall(r'\badd(?:_subcommand)?\("(\w+)"', text))


def literals(source):
    """String literals of C++ code, with those that stand next to each other joined."""
    code = re.sub(r'^\s*#\s*include.*$|//[^\n"]*$', "", source, flags=re.M)
    return ["".join(re.findall(r'"((?:[^"\\]|\\.)*)"', run)) for run in re.findall(r'(?:"(?:[^"\\\n]|\\.)*"\s*)+', code)]


def names_a_face(literal):
    return re.search(rf"(^|[ (`'])--[a-z]|\btorpor ({'|'.join(sorted(commands()))})\b", literal) is not None


def test_no_sentence_of_the_library_names_an_option_or_a_command():
    found = [f"{path.relative_to(ROOT)}: {literal}" for room in LIBRARY for path in sorted((ROOT / "src" / room).rglob("*.*"))
             if path.suffix in (".cc", ".h") for literal in literals(path.read_text()) if names_a_face(literal)]
    assert found == []


def test_what_is_looked_for_is_found():
    assert {"run", "chat", "rm", "export", "gc", "rewind"} <= commands()
    for planted in ('"Use --raw."', '"no template; use " "--raw"', '"make one with `torpor export`."', '"or delete agents (torpor rm)."'):
        assert any(names_a_face(literal) for literal in literals(f"throw Error(code, {planted});")), planted
    for fine in ('"torpor segment 1"', '"a -- b"', '"torpor.messages"'):
        assert not any(names_a_face(literal) for literal in literals(f"f({fine}); // use --raw")), fine


def test_environment_variables_are_read_in_one_place():
    """Settings are options; what the environment says is only their default."""
    readers = {str(path.relative_to(ROOT)) for folder in ("src", "include", "python/bindings") for path in (ROOT / folder).rglob("*.*")
               if path.suffix in (".cc", ".h") and "getenv" in path.read_text()}
    assert readers == {"src/base/environment.h", "src/base/environment.cc"}  # one place: a header and what it declares
