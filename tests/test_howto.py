"""The tutorial and the how-to pages, as their reader would do them: every block of a page, in its order, in one shell,
with an empty home and no network. Models are tests' models under the names that the pages have. Of the pages on
installing, fleets, the command line and clients each block is run, or says in its first line that it is not."""

import json
import os
import re
import shutil
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

import s3
from conftest import BIN, BUILD, ROOT
from test_pull import Hub

DOCS = ROOT / "docs"

# A coding agent that knows no more than what `torpor launch` has set: one turn, or with --continue the next one.
CLIENT = """#!{python}
import os, sys, json, pathlib, anthropic
history = pathlib.Path(os.environ["HOME"], "client.json")
said = json.loads(history.read_text()) if "--continue" in sys.argv else []
said.append({{"role": "user", "content": sys.argv[sys.argv.index("-p") + 1]}})
answer = anthropic.Anthropic().messages.create(
    model=os.environ["ANTHROPIC_MODEL"], max_tokens=8, messages=said, system="You read files. " * 20,
    extra_headers={{"X-Claude-Code-Session-Id": "5d6b"}})
text = "".join(block.text for block in answer.content if block.type == "text")
said.append({{"role": "assistant", "content": text}})
history.write_text(json.dumps(said))
print("client:", json.dumps([answer.usage.input_tokens, answer.usage.cache_read_input_tokens or 0]))
"""


def blocks(language, text):
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.M | re.S)


class Reader:
    """A new user in an empty home, in a directory that looks like a checkout that was built."""

    def __init__(self, directory, tiny_model):
        self.home, self.cwd, tools = directory / "home", directory / "checkout", directory / "tools"
        for path in (self.home, self.cwd / ".models", tools):
            path.mkdir(parents=True)
        (self.cwd / "build").symlink_to(BUILD)
        (self.cwd / "examples").symlink_to(ROOT / "examples")
        (self.cwd / ".models" / "smollm2-135m").symlink_to(tiny_model)
        (tools / "torpor").symlink_to(BIN)
        kept = {name: value for name, value in os.environ.items()
                if not re.match("TORPOR|HF_|HUGGING|XDG_|OLLAMA|ANTHROPIC|OPENAI|PYTHON", name)}
        self.env = {**kept, "HOME": str(self.home), "PYTHONPATH": str(BUILD / "python"),
                    "PATH": f"{tools}:{Path(sys.executable).parent}:{os.environ['PATH']}",
                    "HTTPS_PROXY": "http://127.0.0.1:9", "NO_PROXY": "127.0.0.1,localhost"}
        self.tools, self.hub = tools, None
        self.files = {path.name: path.read_bytes() for path in tiny_model.iterdir()}

    def installs(self, name, text):
        (self.tools / name).write_text(text)
        (self.tools / name).chmod(0o755)

    def serves(self, name):
        """The Hugging Face Hub has one model, by this name."""
        self.hub = Hub(self.files, name)
        self.env["HF_ENDPOINT"] = self.hub.url

    def follows(self, page, notes=0, **others):
        """What the page's blocks print. `others` stand in the place of words of the page; Torpor says so many notes."""
        text = (DOCS / page).read_text()
        for word, other in others.items():
            assert word in text
            text = text.replace(word, other)
        for language, file in {"cmake": "CMakeLists.txt", "cpp": "turns.cc"}.items():
            for block in blocks(language, text):
                (self.cwd / file).write_text(block)
        assert not re.search(r"^```(?!sh$|cmake$|cpp$|$)", text, re.M), f"{page} has a block that isn't run"
        return self.runs(blocks("sh", text), notes)

    def runs(self, commands, notes=0):
        script = "set -eu\n" + "".join(commands)
        done = subprocess.run(["bash", "-c", script], cwd=self.cwd, env=self.env, capture_output=True, text=True,
                              timeout=300)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        assert len(re.findall("^torpor: ", done.stderr, re.M)) == notes, done.stderr
        self.errors = done.stderr
        return done.stdout


@pytest.fixture
def reader(tmp_path, tiny_model):
    reader = Reader(tmp_path, tiny_model)
    yield reader
    if reader.hub:
        reader.hub.server.shutdown()
        reader.hub.server.server_close()


@pytest.fixture
def port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def objects(said):
    return [json.loads(line) for line in said.splitlines() if line.startswith('{"agent"')]


def test_ten_minutes(reader):
    reader.serves("HuggingFaceTB/SmolLM2-135M-Instruct")
    said = reader.follows("tutorial.md")
    [second] = objects(said)
    assert second["tokens"]["cached"] > 40 and 0 < second["tokens"]["prefilled"] < 30
    assert re.search(r"^ada +\d+ .*asleep", said, re.M) and re.search(r"^bob +\d+ .*asleep", said, re.M)
    assert {path.name for path in reader.home.iterdir()} == {".agent_caches", ".cache"}
    assert sorted(path.stem for path in (reader.home / ".agent_caches").glob("*.safetensors")) == ["ada", "bob"]


@pytest.mark.skipif(not shutil.which("curl"), reason="needs curl")
def test_a_coding_agent_on_a_laptop(reader, port):
    reader.serves("mlx-community/Qwen3-4B-4bit")
    reader.installs("claude", CLIENT.format(python=sys.executable))
    said = reader.follows("howto/coding-agent.md", **{"8080": port})
    first, second = (json.loads(line) for line in re.findall(r"^client: (.*)$", said, re.M))
    assert first[1] == 0 and first[0] > 80
    # A server that was started anew computes the new message alone.
    assert second[1] >= first[0] and second[0] < 40
    assert re.search(r"^session-\S+ +\d+ .*asleep", said, re.M)


def test_ten_agents_under_a_budget(reader):
    reader.serves("mlx-community/Qwen3-4B-4bit")
    # The tests' model is so much smaller: three agents' rows.
    said = reader.follows("howto/ten-agents.md", **{"2GB": "300kB", "--budget 2000": "--budget 0.4"})
    awake = re.findall(r"^(\d+) of 10 agents are awake in 0\.4 MB of 0\.4 MB", said, re.M)
    assert awake == ["3", "3"] and said.count("; asleep now: ") >= 7
    assert said.count(" is new ") == 10  # in the first run, and none in the second
    assert len(re.findall(r"^a[123] +\d+ .*asleep", said, re.M)) == 3


def test_an_mlx_lm_script_remembers(reader):
    reader.follows("howto/mlx-lm.md", notes=1)  # its rows are mlx-lm's, new ones are not
    counts = re.findall(r"\[(\d+) tokens held before, (\d+) read\]", reader.errors)
    (held, read), (held_again, read_again) = [map(int, pair) for pair in counts]
    assert held == 0 and held_again > read > read_again
    assert {"once.safetensors", "nora.safetensors"} <= {path.name for path in reader.cwd.iterdir()}


@pytest.mark.skipif(not shutil.which("curl"), reason="needs curl")
def test_from_ollama(reader, port):
    models = reader.home / ".ollama" / "models"
    blob, manifest = models / "blobs/sha256-0123", models / "manifests/registry/library/smollm2/135m"
    for path in (blob, manifest):
        path.parent.mkdir(parents=True)
    blob.symlink_to(ROOT / ".models" / "smollm2-135m.gguf")
    layer = {"mediaType": "application/vnd.ollama.image.model", "digest": "sha256:0123"}
    manifest.write_text(json.dumps({"layers": [layer]}))
    said = reader.follows("howto/gguf.md", **{"8080": port})
    assert "Ollama smollm2:135m" in said and '"models":' in said
    assert '"done_reason":"length"' in said and '"eval_count":8' in said


def test_an_agent_moves(reader):
    [there] = objects(reader.follows("howto/move.md"))
    assert there["agent"] == "ada" and there["tokens"]["cached"] > 40
    assert (reader.cwd / "there" / "ada.safetensors").exists()


def test_a_store_is_copied_and_restored(reader):
    said = reader.follows("howto/backup.md")
    [restored] = objects(said)
    assert restored["tokens"]["cached"] > 40
    assert re.search(r"^ada-of-monday +\d+", said, re.M)
    assert stat.S_IMODE((reader.cwd / "backup" / "ada.safetensors").stat().st_mode) == 0o600


@pytest.mark.skipif(not shutil.which("cmake"), reason="needs cmake")
def test_a_cpp_program_embeds_torpor(reader):
    said = reader.follows("embedding.md")
    turns = re.findall(r"^(\d+) tokens, (\d+) of them held before$", said, re.M)
    (first, none), (_, held) = [map(int, turn) for turn in turns]
    assert none == 0 and held >= first - 1


def test_the_readme_twice(reader):
    text = (ROOT / "README.md").read_text()
    # These are parts of what other tests run: docs/embedding.md's program, and (twice) docs/python.md.
    [part, engine] = blocks("python", text)
    assert part in (DOCS / "python.md").read_text()
    [part] = blocks("cpp", text)
    assert part in (ROOT / "tests" / "consumer" / "turns.cc").read_text()
    assert blocks("cmake", text)[0].splitlines()[0] in (DOCS / "embedding.md").read_text()
    reader.serves("mlx-community/Qwen3-4B-4bit")
    (reader.cwd / "eve.py").write_text(engine)
    first, second = (objects(reader.runs([*blocks("sh", text), "python eve.py\n"]))[0]["tokens"] for _ in range(2))
    assert first["cached"] > 20 and second["cached"] >= first["context"]


NOT_RUN = "# Not run by tests: "
# How the other blocks of these pages begin; tests/test_packages.py runs install.md's.
RUN = {"install.md": ["pip install build", 'pip install "$(echo', "pipx install", "python3 -m pip", "mkdir"],
       "fleet.md": ["torpor remote check", "torpor run --remote", "openssl rand"],
       "cli.md": ["torpor export", "mlx_lm.cache_prompt"],
       "clients.md": ["export KEY"]}
# A server starts, answers, and is stopped; all else is as it stands.
SERVES = """
torpor() {
  [ "$1" = serve ] || { command torpor "$@"; return; }
  command torpor "$@" --port 0 > served &
  until curl -sf "$(grep -m 1 -o 'http://127[^ ]*' served)/health" > health; do kill -0 $!; sleep 0.02; done
  kill -INT $!
  wait $!
  cat health
  echo
}
"""


def block(page, words):
    [found] = [one for one in blocks("sh", (DOCS / page).read_text()) if one.startswith(words)]
    return found


@pytest.fixture
def with_ada(reader, tiny_model):
    """Ada is there, of the model M."""
    (reader.cwd / "M").symlink_to(tiny_model)
    reader.runs(['torpor run --model M --agent ada --prompt "Hello" --max-tokens 4\n'])
    return reader


@pytest.mark.skipif(not shutil.which("curl") or not shutil.which("openssl"), reason="needs curl and openssl")
def test_agents_in_a_bucket(with_ada):
    with s3.gofakes3() as server:
        with_ada.env |= server.env()
        first, second, sealed = (block("fleet.md", words).replace("my-bucket", s3.BUCKET) for words in RUN["fleet.md"])
        here, there = first.split("torpor remote pull")
        said = with_ada.runs([here, "export TORPOR_STORE=there\n", "torpor remote pull", there])
        assert "ada: brought" in said and (with_ada.cwd / "there" / "ada.safetensors").exists(), said
        said = with_ada.runs([SERVES, "export TORPOR_STORE=third\n", second])
        assert '"status":"ready"' in said, said
        said = with_ada.runs([SERVES, "export TORPOR_STORE=fourth\n", sealed])
        assert '"status":"ready"' in said and stat.S_IMODE((with_ada.home / "torpor.key").stat().st_mode) == 0o600


def test_prompt_cache_files_on_the_page_of_commands(with_ada):
    with_ada.runs([block("cli.md", RUN["cli.md"][0])])
    assert (with_ada.cwd / "ada.safetensors").exists()
    said = with_ada.runs([block("cli.md", RUN["cli.md"][1])], notes=1)  # its rows are mlx-lm's, new ones are not
    assert "nora" in said


@pytest.mark.skipif(not shutil.which("curl"), reason="needs curl")
def test_the_key_that_clients_are_given_is_the_servers(with_ada):
    export = block("clients.md", RUN["clients.md"][0])
    said = with_ada.runs([SERVES, "torpor serve --model M\n", export, 'echo "key $KEY"\n'])
    assert re.search(r"^key \S{20,}$", said, re.M)


def test_every_block_of_commands_is_run_or_says_that_it_is_not():
    for page, begins in RUN.items():
        text = (DOCS / page).read_text()
        rest = [one for one in blocks("sh", text) if not one.startswith(NOT_RUN)]
        assert len(rest) == len(begins) and all(map(str.startswith, rest, begins)), page
        # The synopsis of the command line has brackets.
        programs = "torpor|pip|pipx|docker|make|export|mlx_lm|bench/|openssl|curl|tar"
        loose = re.findall(rf"^    (?:{programs})\b[^\[|\n]*$", text, re.M)
        assert loose == [], f"{page}: {loose}"
    packages = (ROOT / "tests" / "test_packages.py").read_text()
    assert all(words in packages for words in RUN["install.md"])


def test_every_page_of_the_kind_has_its_test():
    tested = set(re.findall(r'follows\("([^"]+)"', Path(__file__).read_text()))
    assert tested == {"tutorial.md", "embedding.md", *(f"howto/{path.name}" for path in (DOCS / "howto").glob("*.md"))}
