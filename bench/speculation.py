#!/usr/bin/env python3
"""What speculation gains: turns that edit a text of 1,000 tokens, and turns that write prose, with guesses and without.

    bench/speculation.py --model .models/qwen2.5-coder-0.5b --runs 5

Each line: the medians of the time from a turn's start to its last token, their ratio, and what was guessed. Answers must be
equal; another one ends the program. Tokens are the likeliest ones, or with --temperature T those of seeds 1, 2 and so on.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

import machine

ROOT = Path(__file__).resolve().parent.parent
EDIT = ("Rename the variable `options` to `settings` in this program. Say the whole program again, unchanged but for that."
        "\n\n```python\n{}```")
PROSE = ("Tell a long story about a lighthouse keeper who finds a letter in a bottle.",
         "Explain to a student why the sky is blue, and why sunsets are red.",
         "Describe a walk through an old town in the rain, with all that is heard and smelt there.")


def turn(torpor, model, prompt, tokens, temperature, seed, more):
    command = [torpor, "run", "--model", model, "--prompt", prompt, "--max-tokens", str(tokens), "--no-save", "--json",
               "--temperature", str(temperature), "--seed", str(seed), *more]
    said = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return said, said["timing_ms"]["ttft"] + said["timing_ms"]["decode"]


def measure(arguments, name, prompts, tokens):
    with_guesses, without, counts = [], [], {"generated": 0, "proposed": 0, "accepted": 0}
    for run in range(arguments.runs):
        prompt = prompts[run % len(prompts)]
        said, times = [], []
        for more in ([], ["--no-speculate"]) if run % 2 == 0 else (["--no-speculate"], []):
            answer, ms = turn(arguments.torpor, arguments.model, prompt, tokens, arguments.temperature, run + 1, more)
            said.append(answer)
            (without if more else with_guesses).append(ms)
            if not more:
                for key in counts:
                    counts[key] += answer["tokens"][key]
        if said[0]["text"] != said[1]["text"]:
            sys.exit(f"{name}: the answers differ")
    ratio = statistics.median(b / a for a, b in zip(with_guesses, without))
    rejected = counts["proposed"] - counts["accepted"]
    print(f"{name}: {statistics.median(with_guesses):.0f} ms with guesses, {statistics.median(without):.0f} ms without: "
          f"{ratio:.3f}x; {counts['generated']} tokens, {counts['accepted']} guessed rightly ({counts['accepted'] / counts['generated']:.1%}), "
          f"{rejected} wrongly ({rejected / counts['generated']:.1%})", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--torpor", default=str(ROOT / "build/torpor"))
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--temperature", type=float, default=0)
    parser.add_argument("--tokens", type=int, default=1100, help="longest answer of an edit; prose has a fourth of it")
    parser.add_argument("--task", choices=["edit", "prose", "both"], default="both")
    arguments = parser.parse_args()
    print(f"{machine.cpu_name()}; {arguments.model}, temperature {arguments.temperature}", flush=True)
    if arguments.task != "prose":
        measure(arguments, "edit", [EDIT.format((ROOT / "examples/plot_first_token.py").read_text())], arguments.tokens)
    if arguments.task != "edit":
        measure(arguments, "prose", PROSE, arguments.tokens // 4)


if __name__ == "__main__":
    main()
