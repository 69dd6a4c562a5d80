"""The documentation as a site: two builders find no fault, and what the program says of itself is not stale."""

import re
import shutil
import subprocess
import sys

import pytest

from conftest import BIN, ROOT

TOOLS = ROOT / ".sdks" / "docs" / "bin"

# Blocks of a page as a renderer has them: Python's Markdown (mkdocs, Zensical), and CommonMark (GitHub).
COUNTS = """
import re, sys
from pathlib import Path
import markdown, markdown_it
commonmark = markdown_it.MarkdownIt("commonmark").enable("table")
for path in sys.argv[1:]:
    text = Path(path).read_text()
    pages = markdown.markdown(text, extensions=["tables", "fenced_code"]), commonmark.render(text)
    tags = "h1 h2 h3 ul ol li pre code table td strong a img".split()
    counts = [{tag: len(re.findall(f"<{tag}[ >]", page)) for tag in tags} for page in pages]
    for tag in counts[0]:
        if counts[0][tag] != counts[1][tag]:
            print(path, tag, counts[0][tag], counts[1][tag])
"""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """What the builders read and write, apart from the working tree."""
    assert (TOOLS.parent / "ready").exists(), "run scripts/fetch-sdks docs first"
    directory = tmp_path_factory.mktemp("site")
    shutil.copy(ROOT / "mkdocs.yml", directory)
    shutil.copytree(ROOT / "docs", directory / "docs")
    return directory


@pytest.mark.parametrize("builder", ["mkdocs", "zensical"])
def test_the_site_builds_without_a_warning(checkout, builder):
    built = subprocess.run([TOOLS / builder, "build", "--strict"], cwd=checkout, capture_output=True, text=True)
    assert built.returncode == 0 and "warning" not in (built.stdout + built.stderr).lower(), built.stdout + built.stderr
    site = checkout / "build" / "site"
    for page in (ROOT / "docs").rglob("*.md"):
        assert (site / page.relative_to(ROOT / "docs")).with_suffix(".html").exists(), page
    shutil.rmtree(site)


def test_links_to_nowhere_do_not_build(tmp_path):
    (tmp_path / "docs").mkdir()
    config = (ROOT / "mkdocs.yml").read_text().partition("\nnav:")[0]
    (tmp_path / "mkdocs.yml").write_text(config)
    (tmp_path / "docs" / "index.md").write_text("# A\n\n[one](absent.md) [another](#absent) [file](../absent.cc)\n")
    built = subprocess.run([TOOLS / "mkdocs", "build", "--strict"], cwd=tmp_path, capture_output=True, text=True)
    assert built.returncode != 0 and built.stderr.count("WARNING") == 3, built.stderr


def test_pages_look_the_same_on_the_site_and_on_github():
    pages = [str(path) for path in sorted((ROOT / "docs").rglob("*.md"))]
    said = subprocess.run([TOOLS / "python", "-c", COUNTS, *pages], capture_output=True, text=True, check=True)
    assert said.stdout == ""


def test_the_reference_is_what_the_program_says():
    checked = subprocess.run([sys.executable, ROOT / "scripts" / "make_reference.py", "--check", BIN],
                             capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr


def test_headings_are_one_to_a_name():
    for path in (ROOT / "docs").rglob("*.md"):
        text = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
        assert len(re.findall(r"^# ", text, re.M)) == 1, f"{path.name} has not one title"
