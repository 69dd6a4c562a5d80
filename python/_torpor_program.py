"""Starts the command line that a wheel brings. No part of the package: importing that takes MLX along."""

import os
import sys
from pathlib import Path


def main():
    program = Path(__file__).parent / "torpor" / "bin" / "torpor"
    os.execv(program, ["torpor", *sys.argv[1:]])
