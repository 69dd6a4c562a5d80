"""The packages that `make packages` makes, each unpacked into a clean place. $TORPOR_PACKAGES is where they are."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest

from conftest import BIN, MODEL, ROOT, Torpor, held_ids
from serving import Server
from test_howto import blocks
from test_python_package import CACHES

PACKAGES = os.environ.get("TORPOR_PACKAGES")
pytestmark = pytest.mark.skipif(not PACKAGES, reason="scripts/make-packages runs these")
VERSION = re.search(r'#define TORPOR_VERSION "([\d.]+)"', (ROOT / "include/torpor/version.h").read_text())[1]
# What every system of the kind has; all else is inside.
SYSTEM = r"lib(c|m|gcc_s|stdc\+\+|dl|rt|pthread)\.so|ld-linux|linux-vdso"


def package(pattern):
    [found] = Path(PACKAGES).glob(pattern)
    return found


def follow(words, root):
    """Runs the block of docs/install.md that begins so, as a user whose home is in `root` would."""
    [block] = [block for block in blocks("sh", (ROOT / "docs" / "install.md").read_text()) if block.startswith(words)]
    (root / "build").mkdir(parents=True, exist_ok=True)
    (root / "build" / "packages").symlink_to(PACKAGES)
    path = [root / "venv" / "bin", root / "home" / ".local" / "bin", Path(sys.base_prefix) / "bin", "/usr/bin", "/bin",
            Path(PACKAGES) / "tools" / "bin"]
    own = ("PYTHON", "PIPX", "VIRTUAL", "XDG")
    env = {name: value for name, value in os.environ.items() if not name.startswith(own)}
    cached = subprocess.run([sys.executable, "-m", "pip", "cache", "dir"], capture_output=True, text=True).stdout
    env |= {"HOME": str(root / "home"), "PATH": ":".join(map(str, path)), "PIP_CACHE_DIR": cached.strip()}
    done = subprocess.run(["bash", "-euc", block], cwd=root, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def environment(root):
    subprocess.run([sys.executable, "-m", "venv", root / "venv"], check=True)
    return root / "venv" / "bin"


@pytest.fixture(scope="module", params=["tarball", "debian", "wheel", "pipx", "user"])
def program(request, tmp_path_factory):
    is_python = request.param in ("wheel", "pipx", "user")
    root = tmp_path_factory.mktemp(request.param) / ("where" if is_python else "some where")
    root.mkdir()
    if request.param == "debian":
        subprocess.run(["dpkg-deb", "-x", package("torpor_*.deb"), root], check=True)
        return root / "usr" / "bin" / "torpor"
    if request.param == "wheel":
        programs = environment(root)
        follow("pip install build/packages/torpor*.whl", root)
        return programs / "torpor"
    follow({"tarball": "mkdir", "pipx": "pipx install", "user": "python3 -m pip install --user"}[request.param], root)
    return root / "home" / ".local" / "bin" / "torpor"


def run(program, *args, home):
    """In an environment that knows nothing of this machine. (With PYTHONUSERBASE a user's own packages are found.)"""
    env = {"HOME": str(home), "PATH": "/usr/bin:/bin", "PYTHONUSERBASE": str(program.resolve().parent.parent)}
    return subprocess.run([program, *args], capture_output=True, text=True, cwd="/", timeout=120, env=env)


def test_it_starts_and_says_its_version(program, tmp_path):
    said = run(program, "--version", home=tmp_path)
    assert said.returncode == 0 and said.stdout.startswith(f"torpor {VERSION}\nMLX "), said.stderr
    link = tmp_path / "linked"
    link.symlink_to(program)
    assert run(link, "--version", home=tmp_path).stdout == said.stdout


def test_two_turns_of_two_processes(program, tiny_model, tmp_path):
    for cached in (False, True):
        said = run(program, "run", "--model", tiny_model, "--agent", "ada", "--prompt", "Hello", "--max-tokens", "4",
                   "--json", home=tmp_path)
        assert said.returncode == 0, said.stderr
        assert ('"cached":0,' in said.stdout) != cached
    assert run(program, "doctor", home=tmp_path).returncode == 0
    assert run(program, "pull", "--help", home=tmp_path).returncode == 0
    assert run(program, "serve", "--help", home=tmp_path).returncode == 0


def test_its_libraries_are_its_own_and_none_is_of_the_machine_that_built_it(program):
    binary, top = program, program.resolve().parent.parent
    if not program.read_bytes().startswith(b"\x7fELF"):
        [binary] = top.glob("lib/python*/site-packages/torpor/bin/torpor")
    needed = subprocess.run(["ldd", binary.resolve()], capture_output=True, text=True, check=True).stdout
    foreign = [line for line in needed.splitlines() if not re.search(SYSTEM, line) and str(top.resolve()) not in line]
    assert foreign == [] and "libmlx" in needed
    paths = subprocess.run(["readelf", "-d", binary], capture_output=True, text=True, check=True).stdout
    [path] = re.findall(r"R(?:UN)?PATH.*\[(.*)\]", paths)
    assert all(part.startswith("$ORIGIN/") for part in path.split(":")), path


MLX = re.search(r"^mlx.*==([\d.]+)", (ROOT / "requirements.txt").read_text(), re.M)[1]


@pytest.fixture(scope="module")
def store_alone(tmp_path_factory):
    root = tmp_path_factory.mktemp("store")
    programs = environment(root)
    follow('pip install "$(echo', root)
    return programs / "python"


@pytest.mark.parametrize("which, versions", [
    ("the oldest that it takes", "==0.32.0"), ("the previous one", f"<{MLX}"), ("the newest there is", f">={MLX}")])
def test_the_stores_half_works_with_mlx(store_alone, tmp_path, which, versions):
    subprocess.run([store_alone, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--upgrade", "--pre",
                    f"mlx[cpu]{versions}"], check=True)
    said = subprocess.run([store_alone, "-c", CACHES], capture_output=True, text=True, cwd="/", timeout=300,
                          env={"HOME": str(tmp_path)})
    assert said.returncode == 0, said.stderr
    found, engine = said.stdout.split()
    print(f"{which}: mlx {found}")
    assert engine == "False" and (found != MLX or "newest" in which)


# What an agent is, as the Python module says it: its tokens, and the bits of what comes next.
EVE = """
import hashlib, sys, mlx.core as mx, torpor
with torpor.Engine(*sys.argv[1:3]) as engine:
    eve = engine.agent("eve")
    for prompt in sys.argv[3:]:
        eve.turn(prompt, max_tokens=4)
    print(eve.tokens, hashlib.sha256(bytes(memoryview(eve.next_logits().astype(mx.float32)))).hexdigest())
"""


ARM64 = ROOT / ".sdks" / "arm64"
for_arm64 = pytest.mark.skipif(not list(Path(PACKAGES or ".").glob("arm64/*.whl")),
                               reason="no wheel for arm64 was made")


def arm64(site, *wheels):
    """Unpacks wheels for arm64 beside MLX; what a command says there, under an emulator."""
    for pattern in wheels:
        shutil.unpack_archive(package(f"arm64/{pattern}_aarch64.whl"), site, "zip")
    for path in (ARM64 / "mlx").iterdir():
        (site / path.name).symlink_to(path)
    env = {"PYTHONPATH": str(site), "HOME": str(site.parent)}

    def said(program, *args):
        done = subprocess.run(["qemu-aarch64", "-L", ARM64 / "python", program, *args], capture_output=True, text=True,
                              cwd="/", timeout=600, env=env)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return said


@for_arm64
def test_the_stores_half_for_arm64_works_under_an_emulator(tmp_path):
    said = arm64(tmp_path / "site", "torpor_store-*")
    # Of mlx-lm the cache classes; all of it takes transformers, and a minute.
    (tmp_path / "site" / "mlx_lm").mkdir()
    (tmp_path / "site" / "mlx_lm" / "__init__.py").touch()
    [theirs] = find_spec("mlx_lm").submodule_search_locations
    (tmp_path / "site" / "mlx_lm" / "models").symlink_to(Path(theirs) / "models")
    script = "import platform; print(platform.machine())\n" + CACHES
    assert said(ARM64 / "python/usr/bin/python3", "-c", script) == f"aarch64\n{MLX} False\n"


@for_arm64
def test_the_engines_wheel_for_arm64_says_under_an_emulator_what_this_machines_does(tiny_model, tmp_path):
    said = arm64(tmp_path / "site", "torpor_store-*", "torpor-*")
    program = tmp_path / "site" / "torpor" / "bin" / "torpor"
    program.chmod(0o755)
    assert said(program, "--version").startswith(f"torpor {VERSION}\nMLX {MLX}\nbackend kernels\nCPU target NEON")
    turn = ["run", "--model", tiny_model, "--agent", "ada", "--prompt", "Hello", "--raw", "--max-tokens", "16"]
    said(program, *turn, "--store", tmp_path / "arm64")
    subprocess.run([BIN, *turn, "--store", tmp_path / "here"], check=True, capture_output=True)
    assert held_ids(tmp_path / "arm64", "ada") == held_ids(tmp_path / "here", "ada")
    module = [ARM64 / "python/usr/bin/python3", "-c", EVE, tiny_model, tmp_path / "store"]
    assert said(*module, "Hello") == said(*module)


@pytest.mark.parametrize("version", ["3.12", "3.13", "3.14"])
def test_the_stores_half_works_with_python(version, tmp_path):
    python = other_python(version)
    if not python:
        pytest.skip(f"there is no Python {version} here")
    subprocess.run([python, "-m", "venv", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    # Bytecode of all that mlx-lm needs would take twice as long as the rest.
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile",
                    f"mlx[cpu]=={MLX}", f"{package('torpor_store-*.whl')}[mlx-lm]"], check=True)
    said = subprocess.run([python, "-c", CACHES], capture_output=True, text=True, cwd="/", timeout=300,
                          env={"HOME": str(tmp_path)})
    assert said.stdout == f"{MLX} False\n", said.stderr


def other_python(version):
    """One that pyenv has, whose links on PATH may lead nowhere, or else one on PATH."""
    found = sorted((Path.home() / ".pyenv" / "versions").glob(f"{version}.*/bin/python"))
    return found[-1] if found else shutil.which(f"python{version}")


class DebianRoot(Torpor):
    """The command line in a root of its own, which has Debian's Python and what that needs. The directory `shared` has
    the same path on both sides."""

    ENTER = """root=$1; shift
        mount -t proc proc "$root/proc" && mount --rbind /dev "$root/dev" &&
        exec chroot "$root" env -i HOME=/root PATH=/venv/bin:/usr/bin "$@" """

    def __init__(self, root, shared):
        fetched = subprocess.run([ROOT / "scripts" / "fetch-debian"], capture_output=True, text=True)
        assert fetched.returncode == 0, fetched.stderr
        shutil.copytree(ROOT / ".sdks" / "debian", root, symlinks=True)
        (root / shared.relative_to("/")).mkdir(parents=True)
        shared.symlink_to(root / shared.relative_to("/"))
        self.root, self.shared = root, shared
        super().__init__(shared / "store", "/demo/.models/smollm2-135m")

    def inside(self, *command):
        return ["unshare", "--mount", "sh", "-c", self.ENTER, "sh", self.root, *map(str, command)]

    def command(self, *args):
        return self.inside("torpor", *args, "--store", self.store)

    def said(self, *command):
        done = subprocess.run(self.inside(*command), capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return done.stdout


@pytest.mark.skipif(not shutil.which("apt-get") or not shutil.which("unshare")
                    or subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode != 0,
                    reason="needs apt, which makes a root directory, and root, who may enter it")
def test_the_wheel_in_a_root_with_python_only(tmp_path, capsys):
    debian = DebianRoot(tmp_path / "root", tmp_path / "shared")
    has = {path.name for path in (debian.root / "usr" / "bin").iterdir()}
    assert "python3" in has and has.isdisjoint({"cc", "c++", "gcc", "clang", "cmake", "cargo", "apt", "apt-get"})
    wheels = [package("torpor_store-*.whl"), package("torpor-*.whl")]
    subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--dest",
                    debian.root / "wheels", *wheels], check=True)
    for name in ("scripts/demo.py", "examples/lighthouse-log.txt"):
        (debian.root / "demo" / name).parent.mkdir(parents=True)
        shutil.copy(ROOT / name, debian.root / "demo" / name)
    shutil.copytree(MODEL, f"{debian.root}/{debian.model}")
    took, began = {}, time.monotonic()

    def note(what):
        took[what] = time.monotonic() - began - sum(took.values())

    debian.said("python3", "-m", "venv", "/venv")
    debian.said("pip", "install", "--quiet", "--no-index", "--find-links", "/wheels",
                *(f"/wheels/{wheel.name}" for wheel in wheels))
    note("pip install")
    assert debian.said("torpor", "--version").startswith(f"torpor {VERSION}\nMLX {MLX}\n")
    demo = debian.said("env", "--chdir=/demo", "python3", "scripts/demo.py", "/venv/bin/torpor")
    assert "The woken answer equals" in demo
    note("the demo")
    with Server(debian, debian.shared) as server:
        assert server.ask("GET", "/health").status == 200
        assert server.chat("Hello", agent="ada", model=debian.model.name).json()["choices"][0]["message"]["content"]
        assert server.stop() == 0
    note("a server's answer")
    before = debian.said("python", "-c", EVE, debian.model, debian.store, "Hello")
    again = debian.said("python", "-c", EVE, debian.model, debian.store)
    note("two processes of the module")
    assert before == again and len(held_ids(debian.store, "eve")) == before.count(",") + 1
    with capsys.disabled():
        print("\nin a root with Python only:", ", ".join(f"{what} {seconds:.1f} s" for what, seconds in took.items()))


@pytest.mark.skipif(not shutil.which("qemu-x86_64"), reason="needs qemu-user")
def test_the_wheel_gives_the_same_tokens_on_a_cpu_without_avx(tiny_model, tmp_path):
    """Nehalem lacks AES, which Highway's SSE4 takes for granted."""
    site = tmp_path / "site"
    for pattern in ("torpor_store-*.whl", "torpor-*.whl"):
        shutil.unpack_archive(package(pattern), site, "zip")
    for name in ("mlx", "nanobind_backend"):
        [theirs] = find_spec(name).submodule_search_locations
        (site / name).symlink_to(theirs)
    program = site / "torpor" / "bin" / "torpor"
    program.chmod(0o755)

    def said(cpu, target, *command):
        env = {"HOME": str(tmp_path), "PYTHONPATH": str(site)} | ({"TORPOR_CPU_TARGET": target} if target else {})
        emulator = ["qemu-x86_64", "-cpu", cpu] if cpu else []
        done = subprocess.run([*emulator, *command], capture_output=True, text=True, env=env, timeout=300, cwd="/")
        assert done.returncode == 0, done.stderr
        return done.stdout

    turn = ["run", "--model", tiny_model, "--agent", "ada", "--prompt", "Hello", "--raw", "--max-tokens", "16"]
    said("", "", program, *turn, "--store", tmp_path / "here")
    here = held_ids(tmp_path / "here", "ada")
    assert len(here) > 16
    for cpu, target, used in (("Westmere", "", "SSE4"), ("Westmere", "portable", "SCALAR"), ("Nehalem", "", "SCALAR")):
        assert f"CPU target {used}\n" in said(cpu, target, program, "--version")
        store = tmp_path / f"{cpu}-{target}"
        said(cpu, target, program, *turn, "--store", store)
        assert held_ids(store, "ada") == here, (cpu, target)
    module = [sys.executable, "-c", EVE, tiny_model, tmp_path / "module"]
    assert said("Westmere", "", *module, "Hello") == said("Westmere", "", *module)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may change the root")
def test_the_tarball_runs_in_a_root_that_has_the_c_and_cpp_libraries_and_nothing_else(tiny_model, tmp_path):
    root = tmp_path / "root"
    shutil.unpack_archive(package("torpor-*-*.tar.gz"), root / "opt")
    shutil.copytree(tiny_model, root / "model")
    [top] = (root / "opt").iterdir()
    needed = subprocess.run(["ldd", top / "bin" / "torpor"], capture_output=True, text=True, check=True).stdout
    for path in re.findall(r"(/\S+) \(0x", needed):
        if not path.startswith(str(tmp_path)):
            Path(f"{root}{path}").parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, f"{root}{path}")
    # The loader asks here where the program is.
    (root / "proc" / "self").mkdir(parents=True)
    (root / "proc" / "self" / "exe").symlink_to(f"/opt/{top.name}/bin/torpor")
    turn = ["run", "--model", "/model", "--agent", "ada", "--prompt", "Hello", "--max-tokens", "4", "--json"]
    said = subprocess.run([f"/opt/{top.name}/bin/torpor", *turn, "--store", "/store"], capture_output=True, text=True,
                          env={"HOME": "/"}, timeout=120, preexec_fn=lambda: (os.chroot(root), os.chdir("/")))
    assert said.returncode == 0, said.stderr
    assert '"generated":' in said.stdout and (root / "store" / "ada.safetensors").exists()


def test_the_debian_package_names_what_it_needs_and_its_licences():
    deb = package("torpor_*.deb")
    fields = subprocess.run(["dpkg-deb", "-f", deb], capture_output=True, text=True, check=True).stdout
    assert f"Version: {VERSION}\n" in fields and "Depends: libc6" in fields and "Description: LLM agents" in fields
    listed = subprocess.run(["dpkg-deb", "-c", deb], capture_output=True, text=True, check=True).stdout
    for name in ("share/doc/torpor/copyright", "share/doc/torpor/NOTICE", "share/man/man1/torpor.1.gz", "bin/torpor"):
        assert f"./usr/{name}\n" in listed
    names = [line.split()[5] for line in listed.splitlines() if not line.startswith("d")]
    ours = r"\./usr/(bin/torpor|lib/torpor/|lib/systemd/user/|share/(doc/torpor|man/man1)/)"
    assert all(re.match(ours, name) for name in names)


VALIDATED = """
import sys
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
sys.exit(JsonStrictValidator(SchemaVersion.V1_6).validate_str(open(sys.argv[1]).read()))
"""


def test_the_bill_of_materials_is_cyclonedx_and_lists_what_the_notice_does():
    bill = package("torpor-*.cdx.json")
    python = Path(PACKAGES) / "tools" / "bin" / "python"
    said = subprocess.run([python, "-c", VALIDATED, bill], capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    notice = (Path(PACKAGES) / "NOTICE").read_text().split("\n\n")[1].splitlines()
    components = json.loads(bill.read_text())["components"]
    assert len(components) == len(notice) > 100
    locked = tomllib.loads((ROOT / "rust" / "Cargo.lock").read_text())["package"]
    crates = {f"pkg:cargo/{crate['name']}@{crate['version']}" for crate in locked}
    for line, component in zip(notice, components):
        name, version = component["name"], component.get("version")
        assert component["licenses"][0]["license"]["name"] in line
        if component.get("externalReferences"):
            assert line.startswith(f"{name}, {component['externalReferences'][0]['url']}: ")
        else:
            assert line.startswith(f"{name} {version}: ")
            assert component["purl"] == f"pkg:cargo/{name}@{version}" and component["purl"] in crates
    assert (components[0]["name"], components[0]["version"]) == ("MLX", MLX)


@pytest.mark.skipif(not shutil.which("lintian"), reason="needs lintian")
def test_lintian_finds_no_fault_in_the_debian_package():
    said = subprocess.run(["lintian", package("torpor_*.deb")], capture_output=True, text=True)
    assert said.returncode == 0 and said.stdout == "", said.stdout + said.stderr
