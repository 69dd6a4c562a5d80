"""The packages that `make packages` makes, each unpacked into a clean place. $TORPOR_PACKAGES is where they are."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from conftest import ROOT

PACKAGES = os.environ.get("TORPOR_PACKAGES")
pytestmark = pytest.mark.skipif(not PACKAGES, reason="scripts/make-packages runs these")
VERSION = re.search(r'#define TORPOR_VERSION "([\d.]+)"', (ROOT / "include/torpor/version.h").read_text())[1]
# What every system of the kind has; all else is inside.
SYSTEM = r"lib(c|m|gcc_s|stdc\+\+|dl|rt|pthread)\.so|ld-linux|linux-vdso"


def package(pattern):
    [found] = Path(PACKAGES).glob(pattern)
    return found


@pytest.fixture(scope="module", params=["tarball", "debian", "wheel"])
def program(request, tmp_path_factory):
    root = tmp_path_factory.mktemp(request.param) / "some where"
    root.mkdir()
    if request.param == "tarball":
        shutil.unpack_archive(package("torpor-*-*.tar.gz"), root)
        [top] = root.iterdir()
        return top / "bin" / "torpor"
    if request.param == "debian":
        subprocess.run(["dpkg-deb", "-x", package("torpor_*.deb"), root], check=True)
        return root / "usr" / "bin" / "torpor"
    return Path(os.environ["TORPOR_WHEEL_PYTHON"]).parent / "torpor"


def run(program, *args, home):
    """In an environment that knows nothing of this machine."""
    return subprocess.run([program, *args], capture_output=True, text=True, cwd="/", timeout=120,
                          env={"HOME": str(home), "PATH": "/usr/bin:/bin"})


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
    binary, top = program, program.parent.parent
    if not program.read_bytes().startswith(b"\x7fELF"):
        [binary] = top.glob("lib/python*/site-packages/torpor/bin/torpor")
    needed = subprocess.run(["ldd", binary.resolve()], capture_output=True, text=True, check=True).stdout
    foreign = [line for line in needed.splitlines() if not re.search(SYSTEM, line) and str(top.resolve()) not in line]
    assert foreign == [] and "libmlx" in needed
    paths = subprocess.run(["readelf", "-d", binary], capture_output=True, text=True, check=True).stdout
    [path] = re.findall(r"R(?:UN)?PATH.*\[(.*)\]", paths)
    assert all(part.startswith("$ORIGIN/") for part in path.split(":")), path


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
    assert "./usr/share/doc/torpor/copyright" in listed and "./usr/bin/torpor" in listed
    names = [line.split()[5] for line in listed.splitlines() if not line.startswith("d")]
    assert all(re.match(r"\./usr/(bin/torpor|lib/torpor/|lib/systemd/user/|share/doc/torpor/)", name) for name in names)
