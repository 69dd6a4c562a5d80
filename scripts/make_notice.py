"""scripts/make_notice.py OUT [SBOM]: what the packages contain of others, with licences, from the sources that were
linked. SBOM: the same list, without texts and with versions, as CycloneDX has it.

Rust crates are those of rust/Cargo.lock for this platform, with the licence files of their sources. Of C++ libraries
the text is the one that their Debian or Python package carries; without it the line in the table has to do.
"""

import json
import re
import subprocess
import sys
from importlib.metadata import distribution, version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FEATURES = "http,grammar,line,remote,hub"

# Name, licence, where it comes from, the packages that carry its text.
LIBRARIES = [
    ("MLX", "MIT", "https://github.com/ml-explore/mlx", ["mlx"]),
    ("nanobind (Python module)", "BSD-3-Clause", "https://github.com/wjakob/nanobind", ["nanobind"]),
    ("Highway", "Apache-2.0 or BSD-3-Clause", "https://github.com/google/highway", ["libhwy1", "libhwy-dev"]),
    ("xxHash", "BSD-2-Clause", "https://github.com/Cyan4973/xxHash", ["libxxhash0"]),
    ("nlohmann/json", "MIT", "https://github.com/nlohmann/json", ["nlohmann-json3-dev"]),
    ("CLI11", "BSD-3-Clause", "https://github.com/CLIUtils/CLI11", ["libcli11-dev"]),
    ("toml++", "MIT", "https://github.com/marzer/tomlplusplus", ["libtomlplusplus3", "libtomlplusplus-dev"]),
    ("BLAS and LAPACK (beside libmlx)", "BSD-3-Clause", "https://github.com/Reference-LAPACK/lapack", []),
    ("libgfortran (beside libmlx)", "GPL-3.0 with GCC's runtime library exception", "https://gcc.gnu.org",
     ["gcc-12-base"]),
    ("libquadmath (beside libmlx)", "LGPL-2.1-or-later", "https://gcc.gnu.org", []),
]


def crates():
    """(name, version, licence, texts) of each crate that is linked."""
    host = next(line.split()[1] for line in subprocess.check_output(["rustc", "-vV"], text=True).splitlines()
                if line.startswith("host:"))
    metadata = json.loads(subprocess.check_output(
        ["cargo", "metadata", "--locked", "--format-version", "1", "--features", FEATURES, "--filter-platform", host,
         "--manifest-path", ROOT / "rust" / "Cargo.toml"]))
    nodes = {node["id"]: node for node in metadata["resolve"]["nodes"]}
    packages = {package["id"]: package for package in metadata["packages"]}
    linked, ahead = set(), [metadata["resolve"]["root"]]
    while ahead:  # what only builds or tests is not linked
        node = nodes[ahead.pop()]
        for dependency in node["deps"]:
            if any(kind["kind"] is None for kind in dependency["dep_kinds"]) and dependency["pkg"] not in linked:
                linked.add(dependency["pkg"])
                ahead.append(dependency["pkg"])
    for package in sorted((packages[key] for key in linked), key=lambda package: (package["name"], package["version"])):
        folder = Path(package["manifest_path"]).parent
        files = sorted(path for path in folder.iterdir() if path.is_file()
                       and path.name.upper().startswith(("LICENSE", "LICENCE", "COPYING", "NOTICE", "UNLICENSE")))
        yield package["name"], package["version"], package["license"], files


def texts_of(package):
    debian = Path("/usr/share/doc") / package / "copyright"
    if debian.exists():
        return [debian]
    try:
        files = distribution(package).files or []
    except ModuleNotFoundError:
        return []
    return [Path(file.locate()) for file in files if file.name.upper().startswith("LICENSE")]


def version_of(package):
    try:
        return version(package)
    except ModuleNotFoundError:
        asked = subprocess.run(["dpkg-query", "-W", "-f", "${Version}", package], capture_output=True, text=True)
        return asked.stdout if asked.returncode == 0 else ""


def bill(components):
    """CycloneDX's JSON. It tells no time, so the same sources give the same bytes."""
    torpor = re.search(r'#define TORPOR_VERSION "([\d.]+)"', (ROOT / "include/torpor/version.h").read_text())[1]
    return json.dumps({"bomFormat": "CycloneDX", "specVersion": "1.6", "version": 1, "metadata": {"component": {
        "type": "application", "name": "torpor", "version": torpor, "licenses": [{"license": {"id": "Apache-2.0"}}],
    }}, "components": components}, indent=1) + "\n"


def main():
    table, texts, components = [], {}, []  # text: names

    def add(name, licence, files):
        table.append(f"{name}: {licence}")
        for file in files:
            texts.setdefault(file.read_text(errors="replace").strip(), []).append(name)

    for name, licence, address, packages in LIBRARIES:
        found = next((files for files in map(texts_of, packages) if files), [])
        add(f"{name}, {address}", licence, found)
        components.append({"type": "library", "name": name, "licenses": [{"license": {"name": licence}}],
                           "externalReferences": [{"type": "website", "url": address}]})
        if known := next(filter(None, map(version_of, packages)), None):
            components[-1]["version"] = known
    for name, number, licence, files in crates():
        add(f"{name} {number}", licence or "see its text", files)
        components.append({"type": "library", "name": name, "version": number, "purl": f"pkg:cargo/{name}@{number}"})
        if licence:
            components[-1]["licenses"] = [{"license": {"name": licence}}]
    out = "Torpor's packages contain these works of others.\n\n" + "\n".join(table) + "\n"
    for text, names in texts.items():
        out += "\n" + "=" * 80 + "\n" + ", ".join(dict.fromkeys(names)) + "\n" + "=" * 80 + "\n\n" + text + "\n"
    Path(sys.argv[1]).parent.mkdir(parents=True, exist_ok=True)
    Path(sys.argv[1]).write_text(out)
    if len(sys.argv) > 2:
        Path(sys.argv[2]).write_text(bill(components))


main()
