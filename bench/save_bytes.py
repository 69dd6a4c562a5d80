"""Bytes that a conversation writes, over the bytes of the agent that it leaves; of one Torpor or several.

    .venv/bin/python bench/save_bytes.py [TORPOR ...] [--model .models/smollm2-135m] [--quick] [--json]

TORPOR is a `torpor` program (build/torpor). Each talks in one `torpor chat --raw` process, every turn saved
before the next begins: 400 turns of 20 tokens and 50 of 164 to 8,192 tokens at most, and 1,000 turns of two (one said,
one answered) to 2,000. What was written is the store's own counter (`torpor du`); what it is compared with is the
agent's size (`torpor ls`). Beside that, for the turns that seal no segment, how many tokens' rows a turn wrote beyond
its own: bytes of the turn over bytes of a row, so headers count too.
--quick takes an eighth of the turns.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SEGMENT = 256
CONTEXT = 8192
LOADS = ((400, 20, 2.7), (50, 164, 1.7), (1000, 2, 10.0))  # turns, tokens of a turn, the most that the ratio should be


def row_bytes(model):
    """Bytes of one token's keys and values in f16."""
    config = json.loads((model / "config.json").read_text())
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    heads = config.get("num_key_value_heads", config["num_attention_heads"])
    return 2 * 2 * config["num_hidden_layers"] * heads * head


def ask(torpor, store, *arguments):
    command = [torpor, *arguments, "--store", store, "--json"]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def converse(torpor, model, store, turns, size):
    """What `torpor chat --json` says of each turn."""
    answer = max(1, size * 3 // 8)
    chat = subprocess.Popen(
        [torpor, "chat", "--model", model, "--store", store, "--agent", "a", "--raw", "--json", "--kv-dtype", "f16",
         "--durability", "rename", "--max-tokens", str(answer)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    said, context = [], 0
    for turn in range(turns):
        # An answer may end early; the next turn makes up for it.
        words = min(size * (turn + 1), CONTEXT) - context - answer
        if words < 1:
            break
        chat.stdin.write(" the" * words + "\n")
        chat.stdin.flush()
        line = chat.stdout.readline()
        if not line:
            break
        said.append(json.loads(line))
        context = said[-1]["tokens"]["context"]
    chat.stdin.close()
    if chat.wait() != 0:
        sys.exit(f"{torpor} chat ended with {chat.returncode} after {len(said)} turns")
    return said


def measure(torpor, model, turns, size):
    with tempfile.TemporaryDirectory(prefix="torpor-bytes-") as store:
        said = converse(torpor, model, store, turns, size)
        written = ask(torpor, store, "du")["bytes_written"]
        agent = ask(torpor, store, "ls")[0]["bytes"]
    row, before, extra = row_bytes(model), 0, []
    for turn in said:
        context = turn["tokens"]["context"]
        if context // SEGMENT == before // SEGMENT:
            extra.append(turn["bytes"]["written"] / row - (context - before))
        before = context
    return {"turns": len(said), "tokens": before, "written": written, "agent": agent, "ratio": written / agent,
            "extra_rows_mean": sum(extra) / len(extra) if extra else None, "extra_rows_most": max(extra, default=None)}


def rows(number):
    return "" if number is None else f"{number:.1f}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("torpor", type=Path, nargs="*", default=[ROOT / "build" / "torpor"])
    parser.add_argument("--model", type=Path, default=ROOT / ".models" / "smollm2-135m")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    results = []
    if not arguments.json:
        print("| torpor | turns | of | tokens | written | the agent | ratio | at most "
              "| rows beyond its own of a turn that seals nothing: mean | most |")
        print("|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|")
    for turns, size, most in LOADS:
        for torpor in arguments.torpor:
            quick = turns // 8 if arguments.quick else turns
            one = measure(torpor.resolve(), arguments.model.resolve(), quick, size)
            results.append({"torpor": str(torpor), "turn": size, "at_most": most, **one})
            if not arguments.json:
                print(f"| {torpor} | {one['turns']} | {size} | {one['tokens']:,} | {one['written'] / 1e6:.1f} MB "
                      f"| {one['agent'] / 1e6:.1f} MB | {one['ratio']:.2f} | {most:g} | {rows(one['extra_rows_mean'])} "
                      f"| {rows(one['extra_rows_most'])} |", flush=True)
    if arguments.json:
        print(json.dumps(results))


if __name__ == "__main__":
    main()
