"""The demo (scripts/demo). Every turn is a process of its own; the uninterrupted reference is one process for both turns."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

MODEL = ".models/smollm2-135m"
DOCUMENT = Path("examples/lighthouse-log.txt")
FIRST = "Read this log. Who is the principal keeper?\n\n"
SECOND = "And who is the assistant keeper?"
MAX_TOKENS = 24


def torpor(program, store, *args, stdin=None):
    done = subprocess.run([program, *args, "--store", str(store)], input=stdin, stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        sys.exit(f"demo: torpor {args[0]} ended with exit code {done.returncode}")
    return done.stdout


def run(program, store, agent, prompt):
    """One turn in a process of its own."""
    return json.loads(torpor(program, store, "run", "--model", MODEL, "--agent", agent, "--prompt-file", "-",
                             "--max-tokens", str(MAX_TOKENS), "--json", stdin=prompt))


def chat(program, store, agent, prompts):
    """All turns in one process, the agent awake between them. One line is one message."""
    output = torpor(program, store, "chat", "--model", MODEL, "--agent", agent, "--max-tokens", str(MAX_TOKENS), "--json",
                    stdin="".join(prompt + "\n" for prompt in prompts))
    return [json.loads(line) for line in output.split("\n") if line]


def size(files):
    return f"{sum(path.stat().st_size for path in files) / 1e6:.2f} MB"


def table(rows):
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for i, row in enumerate(rows):
        print("  " + row[0].ljust(widths[0]) + "".join("  " + cell.rjust(width) for cell, width in zip(row[1:], widths[1:])))
        if i == 0:
            print("  " + "-" * (sum(widths) + 2 * (len(widths) - 1)))


def main():
    program = str(Path(sys.argv[1]).resolve())
    # One line, because a line is a message to `torpor chat`; both sides get the same text.
    document = FIRST.strip() + " " + " ".join(DOCUMENT.read_text().split())

    with tempfile.TemporaryDirectory(prefix="torpor-demo-") as directory:
        store = Path(directory) / "store"
        print(f"Process 1: {MODEL} reads {DOCUMENT} and answers; its agent goes to sleep on disk.", flush=True)
        cold = run(program, store, "keeper", document)
        print("Process 2: the agent wakes and answers the next question.", flush=True)
        warm = run(program, store, "keeper", SECOND)
        segments = sorted((store / "segments").glob("*/*.safetensors"))
        agent_file = store / "keeper.safetensors"
        parts = sorted((store / "parts").glob("*.safetensors"))
        table_of_files = [("file", "count", "size"), ("agent file", "1", size([agent_file])),
                          ("parts (the first turn)", str(len(parts)), size(parts)),
                          ("sealed segments", str(len(segments)), size(segments)),
                          ("sidecar", "1", size([store / "keeper.json"]))]
        print("Process 3: the same two turns without interruption, for comparison.", flush=True)
        reference = chat(program, Path(directory) / "reference", "keeper", [document, SECOND])

    print(f"\n  > {FIRST.strip()} [the log]\n  {cold['text'].strip()}\n  > {SECOND}\n  {warm['text'].strip()}\n")
    tokens = [turn["tokens"] for turn in (cold, warm)]
    table([
        ("", "cold", "warm (woken)"),
        ("time to first token", *(f"{turn['timing_ms']['ttft'] / 1000:.2f} s" for turn in (cold, warm))),
        ("  of it, waking", *(f"{turn['timing_ms']['wake']:.1f} ms" for turn in (cold, warm))),
        ("prompt tokens", *(str(turn["prompt"]) for turn in tokens)),
        ("  reused", *(str(turn["cached"]) for turn in tokens)),
        ("  computed", *(str(turn["prefilled"]) for turn in tokens)),
        ("bytes read", *(f"{turn['bytes']['read'] / 1e6:.2f} MB" for turn in (cold, warm))),
        ("bytes written by the save", *(f"{turn['bytes']['written'] / 1e6:.2f} MB" for turn in (cold, warm))),
        ("time to save", *(f"{turn['timing_ms']['save']:.0f} ms" for turn in (cold, warm)))])
    print()
    table(table_of_files)
    print()

    problems = []
    if tokens[0]["prompt"] < 2000:
        problems.append(f"the document has only {tokens[0]['prompt']} tokens")
    if tokens[1]["cached"] != tokens[0]["context"]:
        problems.append(f"{tokens[1]['cached']} of {tokens[0]['context']} tokens were reused")
    for name, ours, theirs in zip(("first", "second"), (cold, warm), reference, strict=True):
        if (ours["text"], ours["tokens"]["generated"]) != (theirs["text"], theirs["tokens"]["generated"]):
            problems.append(f"the {name} answer is not the uninterrupted one: {theirs['text']!r}")
    if problems:
        sys.exit("FAILED: " + "; ".join(problems))
    print("The woken answer equals the uninterrupted one.  "
          f"First token {cold['timing_ms']['ttft'] / warm['timing_ms']['ttft']:.0f} times sooner.")


if __name__ == "__main__":
    main()
