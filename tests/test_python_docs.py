"""The Python of docs/python.md runs, block after block, in one program: twice, as agents are there the second time."""

import os
import re
import subprocess
import sys
import textwrap

import s3
from conftest import BUILD, ROOT


def blocks(text):
    return [textwrap.dedent(block) for block in re.findall(r"^ *```python\n(.*?)^ *```$", text, re.M | re.S)]


def test_every_block_of_the_page_runs_on_a_new_store_and_again(tiny_model, tmp_path):
    page = blocks((ROOT / "docs" / "python.md").read_text())
    assert len(page) >= 6
    # `path` and `bucket` are the reader's; what is imported is what the page speaks of.
    program = "import sys, mlx_lm, transformers, torpor\n_, path, bucket = sys.argv\n" + "\n".join(page)
    with s3.gofakes3() as server:
        for _ in range(2):
            ended = subprocess.run([sys.executable, "-c", program, tiny_model, f"s3://{s3.BUCKET}/page"],
                                   capture_output=True, text=True, timeout=300,
                                   env={**os.environ, **server.env(), "PYTHONPATH": str(BUILD / "python"),
                                        "TORPOR_STORE": str(tmp_path), "HOME": str(tmp_path)})
            assert ended.returncode == 0, ended.stderr
