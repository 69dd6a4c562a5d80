"""Which CPU targets compute the same bits: rows, states and tokens of one turn, target by target.

    .venv/bin/python bench/numerics.py [--torpor build/torpor]... [--model .models/smollm2-135m]... [--tokens 64]

Each target of this CPU answers the same prompt greedily, with f32 and 16-bit activations and each KV format. Targets
whose exported rows and answers are equal to the bit stand in one group. What `torpor show` calls the numerics stands
beside each: targets of one name must be in one group, else the script ends with 1. Several programs, such as one for
another architecture under an emulator, are compared with each other.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TARGETS = ("portable", "sse4", "avx2", "avx512", "amx", "neon")
FORMATS = {"f16": [], "8": ["--kv-bits", "8"], "8,4": ["--kv-bits", "8,4"], "4": ["--kv-bits", "4"]}
PROMPT = " ".join((ROOT / "examples" / "lighthouse-log.txt").read_text().split()[:450])


def computed(torpor, model, target, activations, options, tokens, where):
    """(numerics, digest of rows and tokens, the answer); None: this CPU or build has no such target."""
    def run(*command):
        return subprocess.run([torpor, *command], capture_output=True, text=True, cwd=where,
                              env={**os.environ, "TORPOR_STORE": str(where / "store"), "TORPOR_CPU_TARGET": target})

    ended = run("run", "--model", model, "--agent", "a", "--raw", "--prompt", PROMPT, "--max-tokens", str(tokens),
                "--temperature", "0", "--activations", activations, *options, "--json")
    if ended.returncode != 0:
        if "target" in ended.stderr:
            return None
        sys.exit(ended.stderr)
    answer = json.loads(ended.stdout)["text"]
    numerics = json.loads(run("show", "a", "--json").stdout)["numerics"]
    exported = run("export", "a", "a.safetensors", "--force")
    if exported.returncode != 0:
        sys.exit(exported.stderr)
    file = (where / "a.safetensors").read_bytes()
    header = json.loads(file[8:8 + int.from_bytes(file[:8], "little")])
    data = file[8 + int.from_bytes(file[:8], "little"):]
    digest = hashlib.sha256()
    for name in sorted(header):
        if name == "__metadata__":
            continue
        begin, end = header[name]["data_offsets"]
        digest.update(name.encode() + data[begin:end])
    return numerics, digest.hexdigest()[:12], answer


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--torpor", type=Path, action="append")
    parser.add_argument("--model", type=Path, action="append")
    parser.add_argument("--tokens", type=int, default=64)
    options = parser.parse_args()
    torpors, wrong = [path.resolve() for path in options.torpor or [ROOT / "build" / "torpor"]], False
    print("| model | activations | KV | targets of equal bits (their numerics) | answers |\n|---|---|---|---|---|")
    for model in options.model or [ROOT / ".models" / "smollm2-135m"]:
        for activations in ("f32", "int16"):
            for name, chosen in FORMATS.items():
                groups, names, answers = {}, {}, set()
                for torpor, target in ((torpor, target) for torpor in torpors for target in TARGETS):
                    with tempfile.TemporaryDirectory() as where:
                        found = computed(torpor, model.resolve(), target, activations, chosen, options.tokens,
                                         Path(where))
                    if found is None:
                        continue
                    numerics, digest, answer = found
                    label = target if torpor == torpors[0] else f"{target} of {torpor.name}"
                    groups.setdefault(digest, []).append((label, numerics))
                    names.setdefault(numerics, set()).add(digest)
                    answers.add(answer)
                wrong |= any(len(digests) > 1 for digests in names.values())
                told = "; ".join(f"{', '.join(target for target, _ in group)} ({', '.join({n for _, n in group})})"
                                 for group in groups.values())
                said = "equal" if len(answers) == 1 else len(answers)
                print(f"| {model.name} | {activations} | {name} | {told} | {said} |", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
