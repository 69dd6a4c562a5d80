"""The Python package as it is installed: what is in it, what it links, what it says when something is missing.

It is installed from the build tree into a fresh virtual environment, beside a link to mlx. `make wheel` runs the same tests
in an environment that pip made from the wheels ($TORPOR_WHEEL_PYTHON is its interpreter).
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest

from conftest import BUILD, ROOT

VERSION = re.search(r'#define TORPOR_VERSION "([\d.]+)"', (ROOT / "include/torpor/version.h").read_text())[1]


class Installed:
    def __init__(self, python):
        self.python = Path(python)
        self.site = Path(self("import sysconfig; print(sysconfig.get_path('platlib'))").stdout.strip())
        self.package = self.site / "torpor"

    def __call__(self, script, *args, env=None):
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        return subprocess.run([self.python, "-c", script, *map(str, args)], capture_output=True, text=True, cwd="/", timeout=300,
                              env={**environment, **(env or {})})

    def ok(self, script, *args, **kwargs):
        ended = self(script, *args, **kwargs)
        assert ended.returncode == 0, ended.stderr
        return ended.stdout


def bare_environment(where):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", where], check=True)
    return where / "bin" / "python"


@pytest.fixture(scope="session")
def installed(tmp_path_factory):
    if wheel := os.environ.get("TORPOR_WHEEL_PYTHON"):
        return Installed(wheel)
    installed = Installed(bare_environment(tmp_path_factory.mktemp("python") / "venv"))
    for half in ("python_store", "python_engine"):
        subprocess.run(["cmake", "--install", BUILD, "--component", half, "--prefix", installed.site], check=True,
                       stdout=subprocess.DEVNULL)
    def theirs(name):
        return Path(next(iter(find_spec(name).submodule_search_locations)))

    for name in ("nanobind_backend", "mlx"):
        (installed.site / name).symlink_to(theirs(name))
    (installed.site / "others.pth").write_text(f"{theirs('mlx_lm').parent}\n")  # mlx-lm and what it needs
    return installed


def is_of_the_engine(path):
    return path.name.startswith("_core.") or path.name in ("_linked.py", "bin")


@pytest.fixture(scope="session")
def store_alone(installed, tmp_path_factory):
    """As where torpor-store is installed, with mlx-lm, and torpor is not."""
    alone = Installed(bare_environment(tmp_path_factory.mktemp("store") / "venv"))
    for path in installed.site.iterdir():
        if not re.match(r"_?torpor(?!_store\.libs)", path.name) and not (alone.site / path.name).exists():
            (alone.site / path.name).symlink_to(path.resolve())
    shutil.copytree(installed.package, alone.package, symlinks=True,
                    ignore=lambda where, names: [name for name in names if is_of_the_engine(Path(where, name))])
    return alone


def test_the_package_and_nothing_else_is_installed(installed):
    files = {path.name for path in installed.package.iterdir() if path.name != "__pycache__"}
    extensions = {name for name in files if re.fullmatch(r"_core\..*\.so|_store\.abi3\.so", name)}
    sources = {path.name for path in (ROOT / "python" / "torpor").iterdir() if path.name != "__pycache__"}
    program = {"bin"} if os.environ.get("TORPOR_WHEEL_PYTHON") else set()
    assert len(extensions) == 2 and files == sources | extensions | program | {"_core.pyi", "_store.pyi", "_linked.py"}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_extension_finds_the_mlx_beside_it(installed):
    """Loaded alone: nobody has loaded libmlx before."""
    maps = installed.ok("import ctypes, sys; ctypes.CDLL(sys.argv[1]); print(open('/proc/self/maps').read())",
                        next(installed.package.glob("_core*.so")))
    libraries = {line.split()[-1] for line in maps.splitlines() if "libmlx" in line}
    assert libraries == {str((installed.site / "mlx" / "lib" / "libmlx.so").resolve())}


def test_a_round_trip(installed, tiny_model, tmp_path):
    script = """
import sys, mlx.core as mx, torpor
from mlx_lm.models.cache import KVCache
cache = KVCache()
cache.update_and_fetch(*(mx.random.normal((1, 2, 300, 64)) for _ in range(2)))
torpor.save_agent_cache("ada", [cache])
(again,), _ = torpor.load_agent_cache("ada")
for a, b in zip(cache.keys_and_values(), again.keys_and_values()):
    assert type(b) is mx.array and mx.array_equal(a, b)
with torpor.Engine(sys.argv[1]) as engine:
    result = engine.agent("eve").turn("hello", raw=True, max_tokens=4)
    assert isinstance(engine.agent("eve").next_logits(), mx.array)
print(result.tokens.generated, torpor.__file__)
"""
    said = installed.ok(script, tiny_model, env={"TORPOR_STORE": str(tmp_path / "store")})
    assert said == f"4 {installed.package / '__init__.py'}\n"


CACHES = """
import sys, ctypes, mlx.core as mx, torpor
from mlx_lm.models.cache import KVCache, QuantizedKVCache, RotatingKVCache

def address(array):
    return ctypes.addressof(ctypes.c_char.from_buffer(memoryview(array.view(mx.uint8))))

def some(n, dtype):
    return [mx.random.normal((1, 2, n, 64)).astype(dtype) for _ in range(2)]

rows, packed, ring = KVCache(), QuantizedKVCache(), RotatingKVCache(64)
rows.update_and_fetch(*some(300, mx.bfloat16))
packed.update_and_fetch(*some(300, mx.float32))
ring.update_and_fetch(*some(5, mx.float16))
ring.offset = 300
saved = [rows, packed, ring]
torpor.save_agent_cache("ada", saved, tokens=range(300))
loaded, _ = torpor.load_agent_cache("ada")
for before, after in zip(saved, loaded):
    assert type(before) is type(after) and before.offset == after.offset
    for name in ("keys", "values"):
        arrays = [getattr(cache, name) for cache in (before, after)]
        for a, b in zip(*arrays) if isinstance(arrays[0], tuple) else [arrays]:
            assert a.dtype == b.dtype and a.shape[:2] == b.shape[:2] and type(b) is mx.array
            assert mx.array_equal(a[..., :300, :], b[..., :300, :]).item()
rows, packed, ring = loaded
where = address(rows.keys)
assert where % 64 == 0, where
rows.update_and_fetch(*some(1, mx.bfloat16))
packed.update_and_fetch(*some(1, mx.float32))
mx.eval(rows.keys)
assert address(rows.keys) == where, "MLX has copied what was loaded"
written = torpor.save_agent_cache("ada", loaded, tokens=range(301))
assert (written.segments_shared, written.segments_written) == (1, 0), written
print(mx.__version__, "torpor._core" in sys.modules)
"""


def test_the_stores_half_keeps_caches_without_the_engine_and_links_no_mlx(store_alone, tmp_path):
    said = store_alone.ok(CACHES, env={"TORPOR_STORE": str(tmp_path / "store")})
    assert said.endswith(" False\n")
    needed = subprocess.run(["readelf", "-d", store_alone.package / "_store.abi3.so"], capture_output=True, text=True)
    assert needed.returncode != 0 or "xxhash" in needed.stdout and "mlx" not in needed.stdout


def test_a_name_of_the_engine_says_which_distribution_has_it(store_alone):
    doors = ("torpor.Engine", "from torpor import AsyncEngine", "import torpor.asgi", "import torpor.team")
    for door in doors:
        said = failing(store_alone, f"import torpor; {door}")
        assert said == ("ImportError: Torpor's engine is the distribution torpor, which is not installed beside "
                        f"torpor-store; run pip install torpor=={VERSION}.")
    said = store_alone.ok("import torpor\nfrom torpor import *\nprint(CachePersistence, 'Engine' in dir(torpor))\nhelp(torpor)")
    assert "False" in said.splitlines()[0] and "class CachePersistence" in said and "class Engine(" not in said


def test_halves_in_two_directories_are_one_package(installed, store_alone, tmp_path):
    (tmp_path / "torpor").mkdir()
    for path in filter(is_of_the_engine, installed.package.iterdir()):
        (tmp_path / "torpor" / path.name).symlink_to(path)
    (tmp_path / "torpor.libs").symlink_to(installed.site / "torpor.libs")  # of a wheel
    said = store_alone.ok("import torpor; print(torpor.Engine, torpor.__file__)", env={"PYTHONPATH": str(tmp_path)})
    assert said == f"<class 'torpor.engine.Engine'> {store_alone.package / '__init__.py'}\n"


def test_halves_of_two_versions_say_so(installed, store_alone, tmp_path):
    (tmp_path / "torpor").mkdir()
    (tmp_path / "torpor" / "_linked.py").write_text("MLX_VERSION, TORPOR_VERSION = '0', '9.9'")
    said = failing(store_alone, "import torpor; torpor.Engine", env={"PYTHONPATH": str(tmp_path)})
    assert said == (f"ImportError: torpor 9.9 needs torpor-store of its own version, but {VERSION} is installed; run pip "
                    "install torpor==9.9 torpor-store==9.9.")


def test_one_handler_hears_both_halves(installed, tmp_path):
    script = """
import pathlib, torpor, torpor._log
heard = []
torpor.set_log_handler(lambda level, sentence: heard.append(sentence))
torpor.Engine
assert [half.__name__ for half in torpor._log._halves] == ["torpor._store", "torpor._core"]
def fails(handler):
    raise torpor.InvalidArgumentError("from within")
torpor._log.join(type("Half", (), {"set_log_handler": staticmethod(lambda handler: None)}))
torpor._log._halves[-1].set_log_handler = staticmethod(fails)
before = torpor._log._handler
try:
    torpor.set_log_handler(None)
except torpor.InvalidArgumentError:
    print(torpor._log._handler is before)
del torpor._log._halves[-1]
"""
    assert installed.ok(script) == "True\n"


def test_help_names_everything(installed):
    script = """
import pydoc, torpor
print(pydoc.plain(pydoc.render_doc(torpor)))
for name in torpor.__all__:
    assert getattr(torpor, name).__doc__, name
    if isinstance(getattr(torpor, name), type):
        for member, value in vars(getattr(torpor, name)).items():
            assert member.startswith("_") or not (callable(value) or isinstance(value, property)) or value.__doc__, (name, member)
"""
    text = installed.ok(script)
    for words in ("`CachePersistence` keeps it per agent", "class Engine", "memory_budget: bytes of rows", "raises BusyError"):
        assert words in text


def failing(installed, script, env=None):
    ended = installed(script, env=env)
    assert ended.returncode == 1
    return ended.stderr.splitlines()[-1]


def without(package):
    return f"import sys; sys.modules['{package}'] = None; import torpor; "


def test_without_its_mlx_it_says_what_to_do(installed, tmp_path):
    other = tmp_path / "mlx"
    other.mkdir()
    (other / "__init__.py").touch()
    (other / "core.py").write_text("__version__ = '0.1.0'")
    version = re.search(r'= "(.+)"', (installed.package / "_linked.py").read_text())[1]
    for sentence, words in {
            failing(installed, without("mlx") + "torpor.Engine"): ["needs mlx " + version, "pip install"],
            failing(installed, "import torpor; torpor.Engine", {"PYTHONPATH": str(tmp_path)}):
                ["mlx " + version, "mlx 0.1.0 is installed", "pip install"],
            failing(installed, without("mlx") + "torpor.CachePersistence"): ["needs mlx ", "pip install"],
            failing(installed, without("mlx_lm") + "torpor.save_agent_cache('ada', [])"): ["needs mlx-lm", "pip install"],
    }.items():
        assert sentence.startswith("ImportError: torpor ") and sentence.endswith(".") and all(word in sentence for word in words)


def test_the_engine_needs_no_mlx_lm(installed):
    assert installed.ok(without("mlx_lm") + "print(torpor.Engine)") == "<class 'torpor.engine.Engine'>\n"


def test_the_pins_agree():
    """What is linked, what is tested and what is required are one version; the halves are, too."""
    engine, store = (tomllib.loads((ROOT / path / "pyproject.toml").read_text()) for path in ("", "python/store"))
    pinned = set(re.findall(r"^(mlx(?:\[cpu\])?==[\d.]+|nanobind(?:-backend)?==[\d.]+)", (ROOT / "requirements.txt").read_text(), re.M))
    needed = engine["build-system"]["requires"] + store["build-system"]["requires"] + engine["project"]["dependencies"][1:]
    for name in (re.match(r"[^;<>]+", line)[0] for line in needed):
        assert name in pinned or name.startswith("scikit-build-core=="), name
    said = (ROOT / "python" / "torpor" / "_mlx_lm.py").read_text()
    [mlx_lm] = store["project"]["optional-dependencies"]["mlx-lm"]
    assert mlx_lm in said and "mlx>=0.32" in store["project"]["dependencies"] and "mlx[cpu]>=0.32" in said
    header = (ROOT / "include/torpor/version.h").read_text()
    assert VERSION == ".".join(re.findall(r"#define TORPOR_VERSION_[A-Z]+ (\d+)", header))
    assert engine["project"]["version"] == store["project"]["version"] == VERSION
    assert engine["project"]["dependencies"][0] == f"torpor-store=={VERSION}"
    assert engine["project"]["optional-dependencies"]["mlx-lm"] == [f"torpor-store[mlx-lm]=={VERSION}"]


USER = """
from typing import assert_type
import mlx.core as mx
import torpor

with torpor.Engine("model", memory_budget=1 << 30) as engine:
    ada = engine.agent("ada", system="Be brief.")
    result = ada.turn("Hello", max_tokens=3, stop=["."], on_text=print)
    assert_type(result, torpor.TurnResult)
    assert_type(result.tokens.cached, int)
    assert_type(result.damage, str | None)
    for piece in ada.stream("Hello", save="behind"):
        assert_type(piece, str)
    assert_type(ada.fork("bob").next_logits(), mx.array)
    assert_type([s.tokens for s in engine.agents()], list[int])
    assert_type(engine.memory_usage().agents, list[torpor.AgentMemory])


async def main() -> None:
    async with torpor.AsyncEngine("model", memory_budget="1GB") as engine:
        eve = engine.agent("eve")
        assert_type(await eve.turn("Hello", top_k=3), torpor.TurnResult)
        async for piece in eve.stream("Hello"):
            assert_type(piece, str)
        assert_type(await eve.tokens(), list[int])
        assert_type((await eve.fork("bob")).id, str)
        assert_type((await engine.memory_usage()).agents, list[torpor.AgentMemory])
        try:
            await eve.save()
        except KeyError as missing:
            assert_type(missing, KeyError)


store = torpor.CachePersistence(model={"weights": "one"})
cache, metadata = store.load_agent_cache("ada")
assert_type(metadata, dict[str, str])
assert_type(store.save_agent_cache("ada", cache, tokens=range(3)).segments, list[str])
assert_type(torpor.get_cache_size(cache), int)
"""
MISTAKES = {
    'ada.turn("Hello", maxtokens=3)': "call-arg",
    'ada.turn("Hello", save="soon")': "typeddict-item|arg-type",
    "ada.turn(3)": "arg-type",
    "torpor.AsyncEngine('model', memory_bugdet=3)": "call-arg",
    "torpor.AsyncEngine(3)": "arg-type",
    "store.save_agent_cache(3, cache)": "arg-type",
    "result.text = ''": "misc|assignment",
}


def checked(installed, where, *files):
    """What mypy says of these files."""
    # It would read all of transformers; matplotlib is an example's own wish, and may be missing.
    (where / "mypy.ini").write_text("[mypy-mlx_lm.*]\nfollow_imports = skip\n"
                                    "[mypy-matplotlib.*]\nfollow_imports = skip\nignore_missing_imports = True\n")
    command = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", where / "cache"]
    return subprocess.run([*command, "--python-executable", installed.python, *files], capture_output=True, text=True,
                          cwd=where)


def test_the_examples_that_import_torpor_pass_mypy_strict(installed, tmp_path):
    examples = [path for path in sorted((ROOT / "examples").glob("*.py")) if "import torpor" in path.read_text()]
    ended = checked(installed, tmp_path, *examples)
    assert ended.returncode == 0 and f"in {len(examples)} source files" in ended.stdout, ended.stdout


def test_the_stubs_of_both_extensions_pass_mypy_strict(installed, tmp_path):
    for name in ("_core.pyi", "_store.pyi"):
        shutil.copy(installed.package / name, tmp_path)
    ended = checked(installed, tmp_path, "_core.pyi", "_store.pyi")
    assert ended.returncode == 0 and "in 2 source files" in ended.stdout, ended.stdout


def test_a_program_of_a_users_is_checked_against_its_types(installed, tmp_path):
    (tmp_path / "user.py").write_text(USER + "".join(line + "\n" for line in MISTAKES))
    ended = checked(installed, tmp_path, "user.py")
    first = USER.count("\n") + 1
    found = {int(line): code for line, code in re.findall(r"^user.py:(\d+): error: .*\[([\w-]+)\]$", ended.stdout, re.M)}
    assert found.keys() == set(range(first, first + len(MISTAKES))), ended.stdout
    for (line, code), allowed in zip(sorted(found.items()), MISTAKES.values()):
        assert code in allowed.split("|"), ended.stdout


def test_pyright_finds_the_same_in_a_users_program_and_nothing_in_the_examples_on_the_engine(installed, tmp_path):
    pytest.importorskip("basedpyright")  # pyright, with the Node.js that it needs
    (tmp_path / "user.py").write_text(USER + "".join(line + "\n" for line in MISTAKES))
    names = ["user.py", "_core.pyi", "_store.pyi", "team.py", "ten_agents.py"]
    stubs = [installed.package / name for name in names[1:3]]
    for source in (*stubs, *(ROOT / "examples" / name for name in names[3:])):
        shutil.copy(source, tmp_path)
    (tmp_path / "pyrightconfig.json").write_text(json.dumps({"typeCheckingMode": "standard", "include": names}))
    said = json.loads(subprocess.run([sys.executable, "-m", "basedpyright", "--outputjson", "--pythonpath",
                                      installed.python, "--project", tmp_path],
                                     capture_output=True, text=True, cwd=tmp_path).stdout)
    first = USER.count("\n")
    errors = {(Path(one["file"]).name, one["range"]["start"]["line"]) for one in said["generalDiagnostics"]
              if one["severity"] == "error"}
    assert said["summary"]["filesAnalyzed"] == len(names)
    assert errors == {("user.py", line) for line in range(first, first + len(MISTAKES))}, said


WITHOUT = {
    "nlohmann-json3-dev": ["-DCMAKE_DISABLE_FIND_PACKAGE_nlohmann_json=ON"],
    "pkg-config": ["-DCMAKE_DISABLE_FIND_PACKAGE_PkgConfig=ON"],
    "libxxhash-dev": [],
    "libhwy-dev": ["-DCMAKE_DISABLE_FIND_PACKAGE_HWY=ON"],
    "cargo": ["-DTORPOR_CARGO="],
    "python3-dev": ["-DCMAKE_DISABLE_FIND_PACKAGE_Python=ON"],
    "nanobind": ["-DCMAKE_DISABLE_FIND_PACKAGE_nanobind=ON"],
    "MLX": ["-DCMAKE_DISABLE_FIND_PACKAGE_MLX=ON"],
}


@pytest.mark.skipif(shutil.which("cmake") is None, reason="needs cmake")
@pytest.mark.parametrize("missing", WITHOUT)
def test_a_missing_package_is_named(missing, tmp_path):
    # A pkg-config that knows all packages, or all but one.
    known = tmp_path / "known"
    known.mkdir()
    for name in {"libxxhash-dev": ["libhwy"], "libhwy-dev": ["libxxhash"]}.get(missing, ["libhwy", "libxxhash"]):
        (known / f"{name}.pc").write_text(f"Name: {name}\nDescription: none\nVersion: 1\n")
    ended = subprocess.run(["cmake", "-S", ROOT, "-B", tmp_path / "build", "-DTORPOR_PYTHON_MODULE=ON", *WITHOUT[missing]],
                           capture_output=True, text=True, env={**os.environ, "PKG_CONFIG_LIBDIR": str(known)})
    assert ended.returncode != 0
    said = " ".join(ended.stderr.split())
    assert re.search(rf"Torpor('s Python module)? needs .*\b{missing}\b.*\.", said), said
