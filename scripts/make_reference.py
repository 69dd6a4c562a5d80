"""The pages of the documentation that the program itself writes: docs/commands.md, of what every command's --help says;
docs/routes.md, of the OpenAPI description that a server answers with; docs/names.md, of the Python module's docstrings;
docs/headers.md, of the public headers.

    .venv/bin/python scripts/make_reference.py [--check] [build/torpor]

--check writes nothing, and fails when a page is stale.
"""

import argparse
import ast
import json
import os
import re
import subprocess
import sys
import tempfile
import textwrap
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MADE = "This page is written by `make docs`."


def help_of(program, *command):
    """Without the exit codes, which end each command's help and stand once on the page."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("TORPOR_")}
    text = subprocess.run([program, *command, "--help"], capture_output=True, text=True, check=True, env=clean).stdout
    return text.partition("\nExit codes:")[0].rstrip()


def wrapped(text):
    """Lines of at most 120 columns; what goes on stands where CLI11 begins an option's meaning."""
    return "\n".join(part for line in text.splitlines() for part in textwrap.wrap(
        line, 120, subsequent_indent=" " * 30, drop_whitespace=True, replace_whitespace=False,
        break_on_hyphens=False, break_long_words=False) or [""])


def subcommands(text):
    listed = re.search(r"^Subcommands:\n((?: .*\n?)+)", text, re.M)
    return re.findall(r"^  (\S+)", listed[1], re.M) if listed else []


def commands_page(program):
    page = ["# Every command and option", "",
            f"What `torpor --help` and `torpor COMMAND --help` say. {MADE}",
            "[cli.md](cli.md) says what commands do, and has their JSON and exit codes.", ""]

    def add(*command):
        text = help_of(program, *command)
        page.extend([f"## {' '.join(['torpor', *command])}", "", "```text", wrapped(text), "```", ""])
        for name in subcommands(text):
            add(*command, name)

    add()
    return "\n".join(page)


def kind(schema):
    """A schema in a few words."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    for several in ("anyOf", "oneOf"):
        if several in schema:
            return " or ".join(kind(one) for one in schema[several])
    if "enum" in schema:
        return " or ".join(f"`{json.dumps(value)}`" for value in schema["enum"])
    if "const" in schema:
        return f"`{json.dumps(schema['const'])}`"
    types = schema.get("type", "any value")
    words = types if isinstance(types, str) else " or ".join(types)
    return f"{words} of {kind(schema['items'])}" if types == "array" and schema.get("items") else words


def members(schema):
    """A table of an object's members, or nothing."""
    if not schema.get("properties"):
        return []
    required = schema.get("required", [])
    rows = ["| member | type | |", "|---|---|---|"]
    for name, member in schema["properties"].items():
        meaning = member.get("description", "").replace("|", "/")
        said = " ".join(filter(None, ["Required." if name in required else "", meaning]))
        rows.append(f"| `{name}` | {kind(member)} | {said} |")
    return [*rows, ""]


def routes_page(description):
    page = ["# Every route of the server", "",
            f"What `/torpor/v1/openapi.json` says, OpenAPI {description['openapi']}. {MADE}",
            "[server.md](server.md) says how to use them, [dialects.md](dialects.md) what each dialect serves.", ""]
    titles = {"openai": "OpenAI's", "anthropic": "Anthropic's", "ollama": "Ollama's", "torpor": "Torpor's own",
              "server": "The server's"}
    operations = [(path, method, operation) for path, methods in description["paths"].items()
                  for method, operation in methods.items()]
    assert {tag for _, _, operation in operations for tag in operation["tags"]} == set(titles)
    for tag, title in titles.items():
        page.extend([f"## {title}", ""])
        for path, method, operation in operations:
            if tag not in operation["tags"]:
                continue
            page.extend([f"### {method.upper()} {path}", "", operation["summary"], ""])
            if body := operation.get("requestBody"):
                schema = body["content"]["application/json"]["schema"]
                page.extend([f"Body: {kind(schema)}.", ""] if "$ref" in schema else members(schema))
            for status, response in operation["responses"].items():
                if "$ref" in response:  # errors: the same for each route of a dialect
                    response = description["components"]["responses"][response["$ref"].rpartition("/")[2]]
                content = {media: kind(entry.get("schema", {"type": "no schema"}))
                           for media, entry in response.get("content", {}).items()}
                answers = ", ".join(f"`{media}`" + ("" if what == "no schema" else f" ({what})")
                                    for media, what in content.items())
                page.append(f"- {'any other status' if status == 'default' else status}: {answers or 'no body'}")
            page.append("")
    page.extend(["## Schemas", ""])
    for name, schema in description["components"]["schemas"].items():
        page.extend([f"### {name}", "", *([schema["description"], ""] if "description" in schema else []),
                     *(members(schema) or [f"{kind(schema)}", ""])])
    return "\n".join(page)


MODULES = {"engine": "Torpor's engine", "async_engine": "With asyncio", "team": "Teams", "persistence": "Caches of mlx-lm",
           "extractor": "Generation by mlx-lm", "exchange": "Prompt-cache files", "__init__": "Functions of the module",
           "results": "Results", "errors": "Errors", "asgi": "torpor.asgi", "ray": "torpor.ray",
           "langgraph": "torpor.langgraph"}


def outline(lines, node):
    """Source of a class or function without what it does: signature, docstring, fields, public methods."""
    first = min([node.lineno, *(one.lineno for one in node.decorator_list)])
    shown = lines[first - 1:node.body[0].lineno - 1] or [lines[first - 1].split(": ")[0] + ":"]
    has_docstring = ast.get_docstring(node, clean=False) is not None
    if has_docstring:
        shown += lines[node.body[0].lineno - 1:node.body[0].end_lineno]
    if isinstance(node, ast.ClassDef):
        for member in node.body[has_docstring:]:
            name = getattr(member, "name", getattr(getattr(member, "target", None), "id", "_"))
            if isinstance(member, ast.AnnAssign) and name[0] != "_":
                shown += lines[member.lineno - 1:member.end_lineno]
            elif isinstance(member, ast.FunctionDef | ast.AsyncFunctionDef) and (name[0] != "_" or name == "__init__"):
                shown += ["", *outline(lines, member)]
    return shown


def names_page():
    """From the source, so that no interpreter's way of writing types shows."""
    page = ["# Every name of the Python module", "",
            f"The docstrings of `torpor`, as `help(torpor)` has them. {MADE}",
            "[python.md](python.md) says how to use it.", ""]
    module = ROOT / "python" / "torpor"
    tree = ast.parse((module / "__init__.py").read_text())
    public = next(ast.literal_eval(node.value) for node in tree.body
                  if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__")
    found = set()
    for name, title in MODULES.items():
        text = (module / f"{name}.py").read_text()
        page.extend([f"## {title}", ""])
        for node in ast.parse(text).body:
            if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) or node.name[0] == "_":
                continue
            if node.name in public or name in ("asgi", "ray", "langgraph"):
                found.add(node.name)
                page.extend([f"### {node.name}", "", "```python", *outline(text.splitlines(), node), "```", ""])
    assert found >= set(public), set(public) - found
    return "\n".join(page)


def headers_page():
    page = ["# Every public header", "", f"What `include/torpor/` has. {MADE}",
            "[embedding.md](embedding.md) says which header is for what, and how to build with them.", ""]
    for path in sorted((ROOT / "include" / "torpor").glob("*.h")):
        text = re.sub(r"^#(pragma once|include .*)\n", "", path.read_text(), flags=re.M)
        page.extend([f"## torpor/{path.name}", "", "```cpp", re.sub(r"\n{3,}", "\n\n", text).strip("\n"), "```", ""])
    return "\n".join(page)


def described(program):
    """The OpenAPI description, of a server that is started for it."""
    with tempfile.TemporaryDirectory() as directory:
        command = [program, "serve", "--model", ROOT / ".models" / "smollm2-135m", "--port", "0", "--no-auth",
                   "--store", directory, "--log", os.devnull]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            lines = (re.search(r"http://127\.0\.0\.1:\d+", line) for line in server.stdout)
            address = next(found[0] for found in lines if found)
            return json.load(urllib.request.urlopen(f"{address}/torpor/v1/openapi.json", timeout=60))
        finally:
            server.terminate()
            server.communicate()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("program", nargs="?", default=ROOT / "build" / "torpor")
    options = parser.parse_args()
    stale = []
    pages = {"commands.md": commands_page(options.program), "routes.md": routes_page(described(options.program)),
             "names.md": names_page(), "headers.md": headers_page()}
    for name, text in pages.items():
        path = ROOT / "docs" / name
        if not path.exists() or path.read_text() != text:
            stale.append(f"docs/{name}")
            if not options.check:
                path.write_text(text)
    if options.check and stale:
        sys.exit(f"{' and '.join(stale)}: stale; run `make docs` and commit what it writes")


if __name__ == "__main__":
    main()
