"""The perplexity of a text: Torpor beside mlx-lm on the same directory, and what quantizing the cache costs.

    .venv/bin/python bench/perplexity.py [BUILD] [--model M]... [--file F] [--tokens N] [--no-mlx-lm]

For each model mlx-lm (f32 activations and cache, MLX on the CPU; slow) gives the reference, unless it is left out. Then
Torpor measures with every kind of cache. The text is the demo's document unless told otherwise, which no model has been
trained on.
"""

import argparse
import json
import os
import subprocess
from pathlib import Path

import mlx.core as mx
import numpy as np
from machine import cpu_name
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model
from tokenizers import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
MODELS = ["smollm2-135m", "qwen2.5-coder-0.5b", "gemma3-270m"]
KINDS = {"f32": ["--kv-dtype", "f32"], "f16": ["--kv-dtype", "f16"], "bf16": ["--kv-dtype", "bf16"],
         "8 bits, group 64": ["--kv-bits", "8"], "8,4 bits, group 64": ["--kv-bits", "8,4"],
         "4 bits, group 64": ["--kv-bits", "4"],
         "4 bits, group 32": ["--kv-bits", "4", "--kv-group", "32"]}
CHUNK = 64


def mlx_lm_perplexity(directory, text, limit):
    """Token by token probabilities with a cache, in chunks as Torpor does it."""
    model, _ = load_model(directory)
    model.set_dtype(mx.float32)
    ids = Tokenizer.from_file(str(directory / "tokenizer.json")).encode(text).ids[:limit]
    cache, total = make_prompt_cache(model), 0.0
    for first in range(0, len(ids) - 1, CHUNK):
        chunk = ids[first:min(first + CHUNK, len(ids) - 1)]
        logits = np.array(model(mx.array([chunk]), cache=cache)[0].astype(mx.float32), dtype=np.float64)
        top = logits.max(axis=-1)
        norm = top + np.log(np.exp(logits - top[:, None]).sum(axis=-1))
        total += (logits[np.arange(len(chunk)), ids[first + 1:first + 1 + len(chunk)]] - norm).sum()
    return float(np.exp(-total / (len(ids) - 1)))


def torpor_perplexity(torpor, directory, args, kind, activations="f32"):
    command = [torpor, "perplexity", "--model", directory, "--file", args.file, "--chunk", str(CHUNK), "--json", *kind]
    if args.tokens:
        command += ["--tokens", str(args.tokens)]
    out = subprocess.run(command, check=True, capture_output=True, env={**os.environ, "TORPOR_ACTIVATIONS": activations})
    return json.loads(out.stdout)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("build", nargs="?", default=ROOT / "build")
    parser.add_argument("--model", action="append", help=f"a directory in .models (default: {', '.join(MODELS)})")
    parser.add_argument("--file", default=ROOT / "examples" / "lighthouse-log.txt")
    parser.add_argument("--tokens", type=int, help="only the first so many")
    parser.add_argument("--no-mlx-lm", action="store_true", help="without the reference, which is slow")
    args = parser.parse_args()
    torpor, text = Path(args.build) / "torpor", Path(args.file).read_text()
    print(cpu_name())
    print("| model | tokens | cache | format | bytes per token | perplexity | against mlx-lm | against the f32 cache |")
    print("|---|---|---|---|---|---|---|---|")
    for name in args.model or MODELS:
        directory = ROOT / ".models" / name
        reference = None if args.no_mlx_lm else mlx_lm_perplexity(directory, text, args.tokens)
        exact = None
        rows = [(kind, "f32", options) for kind, options in KINDS.items()] + [("f32", "int16", KINDS["f32"])]
        for kind, activations, options in rows:
            try:
                report = torpor_perplexity(torpor, directory, args, options, activations)
            except subprocess.CalledProcessError as error:
                print(f"| {name} | | {kind} | | | {error.stderr.decode().strip()} | | |")
                continue
            exact = exact or report["perplexity"]
            label = kind if activations == "f32" else f"{kind}, int16 activations"
            beside = f"{report['perplexity'] / reference - 1:+.4%}" if reference else ""
            print(f"| {name} | {report['tokens']} | {label} | `{report['kv']}` | {report['kv_bytes_per_token']} | "
                  f"{report['perplexity']:.4f} | {beside} | {report['perplexity'] / exact - 1:+.3%} |", flush=True)


if __name__ == "__main__":
    main()
