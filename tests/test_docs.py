"""What the documentation names exists."""

import functools
import re
import subprocess

import pytest

from conftest import BIN, ROOT

# By the program (tests/test_site.py):
WRITTEN = {ROOT / "docs" / name for name in ("commands.md", "headers.md", "names.md", "routes.md")}
DOCS = [path for path in [ROOT / "README.md", ROOT / "HACKING.md", ROOT / "CONTRIBUTING.md",
                          *sorted((ROOT / "docs").rglob("*.md"))] if path not in WRITTEN]


def code(text):
    return "\n".join(re.findall(r"```(?:.|\n)*?```|`[^`\n]+`|^    .+$", text, re.MULTILINE))


@functools.cache
def help_of(*command):
    """What --help says, and the options of all commands; None where there is no such command."""
    told = subprocess.run([BIN, *command, "--help"], capture_output=True, text=True)
    known = told.returncode == 0 and f"Usage: torpor {' '.join(command)} " in told.stdout  # else the program's own help
    return told.stdout + " --store --version --help --verbose" if known else None


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_commands_and_options_exist(path):
    text = code(path.read_text())
    hashed = {"key", "lineage", "names", "object", "segment", "state"}  # docs/format.md: words that digests begin with
    for command in set(re.findall(r"(?<![-/\w])torpor ([a-z]+)\b(?! *[:=])", text)) - hashed:
        assert help_of(command), f"{path.name} names `torpor {command}`"
    # Options up to the end of the command; behind ` -- ` are those of a client.
    for line in re.findall(r"(?<![-/\w])torpor ((?:remote )?[a-z]+\b.*)$", text, re.MULTILINE):
        line = re.split(r" -- |[`#>|;&]", line)[0]
        command = re.match(r"(?:remote )?[a-z]+", line)[0].split()
        for option in re.findall(r"(?<![\w-])--[a-z-]+", line):
            assert option in (help_of(*command) or ""), f"{path.name}: `torpor {' '.join(command)}` has no {option}"


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_make_targets_scripts_and_links_exist(path):
    text = path.read_text()
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"\bmake ([a-z]+(?:-[a-z]+)*)\b", code(text))):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"{path.name} names `make {target}`"
    for script in set(re.findall(r"\bscripts/[\w.-]+", code(text))):
        assert (ROOT / script).exists(), f"{path.name} names {script}"
    for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (path.parent / link).exists(), f"{path.name} links to {link}"


def test_the_program_of_the_page_on_embedding_is_the_one_that_is_compiled():
    [program] = re.findall(r"```cpp\n(.*?)```", (ROOT / "docs" / "embedding.md").read_text(), re.DOTALL)
    assert program == (ROOT / "tests" / "consumer" / "turns.cc").read_text()


def test_every_test_that_the_table_of_others_faults_names_exists():
    rows = [line.strip("|").split("|") for line in (ROOT / "tests/server_acceptance.md").read_text().splitlines()
            if line.startswith("| ") and "#" in line]
    assert len(rows) > 45
    for report, _, tests in rows:
        files = re.findall(r"`(test_\w+(?:\.py)?)`(?:: ([^;|]*))?", tests)
        assert files or "the same" in tests, report
        for file, names in files:
            source = (ROOT / "tests" / (file if file.endswith(".py") else file + ".cc")).read_text()
            for name in re.findall(r"\b(?:test_\w+|[A-Z]\w+[a-z][A-Z]\w*)", names):
                assert name in source, f"{file} has no {name}"


def test_every_test_that_the_table_of_promises_names_exists():
    rows = [line.strip("|").split("|") for line in (ROOT / "docs/promises.md").read_text().splitlines()
            if line.startswith("| **")]
    assert len(rows) >= 10
    for promise, _, tests in rows:
        files = re.findall(r"`(test_\w+(?:\.py)?)`", tests)
        assert files, promise
        for file in files:
            path = ROOT / "tests" / (file if file.endswith(".py") else file + ".cc")
            assert path.exists(), f"{promise} names {file}"
