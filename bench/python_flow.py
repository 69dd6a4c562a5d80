"""An mlx-lm conversation that outlives its process: generate, save, load in a new process, generate again.

    PYTHONPATH=build/python .venv/bin/python bench/python_flow.py [MODEL] [--document-tokens N] [--max-tokens N] [--json]

Three processes: the first reads a document, answers, and saves the cache; the second loads it and answers a question, for which
mlx-lm's own counter (`prompt_tokens` of its responses) has only the question's tokens; the third answers the same from nothing.
The last two must answer with the same tokens. A table of times is printed. The model computes in f32, whatever its weights' dtype:
that is what MLX's x86 CPU backend is fastest at.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
QUESTION = "\nThe keeper said:"
STEPS = ("first", "woken", "cold")


def document(tokenizer, n):
    text = " ".join((ROOT / "examples" / "lighthouse-log.txt").read_text().split())
    return tokenizer.encode(text)[:n]


def step(name, model_path, store_path, document_tokens, max_tokens):
    """One process's work; its figures."""
    import mlx.core as mx
    import mlx_lm

    import torpor
    times = {}

    def timed(what, work):
        start = time.perf_counter()
        result = work()
        times[what] = (time.perf_counter() - start) * 1e3
        return result

    model, tokenizer = mlx_lm.load(model_path)
    model.set_dtype(mx.float32)
    extractor = torpor.MLXCacheExtractor(model, tokenizer)
    store = timed("open", lambda: torpor.CachePersistence(store_path, model=model_path, durability="rename"))
    start = time.perf_counter()
    if name == "first":
        generation = extractor.stream(document(tokenizer, document_tokens), max_tokens=max_tokens)
    else:
        held = store.agent_tokens("ada")
        question = tokenizer.encode(QUESTION, add_special_tokens=False)
        if name == "woken":
            cache, _ = timed("load", lambda: store.load_agent_cache("ada"))
            generation = extractor.stream(question, cache, max_tokens=max_tokens)
        else:
            generation = extractor.stream(held + question, max_tokens=max_tokens)
    for _ in generation:
        times.setdefault("first token", (time.perf_counter() - start) * 1e3)
    result = {"step": name, "prefilled": generation.prefilled, "held": generation.cache[0].offset, "tokens": generation.tokens,
              "text": generation.text}
    if name == "first":
        timed("save", lambda: store.save_agent_cache("ada", generation.cache, tokens=generation.tokens))
    return {**result, "ms": times}


def flow(model, document_tokens, max_tokens):
    with tempfile.TemporaryDirectory(prefix="torpor-flow-") as store:
        results = []
        for name in STEPS:
            ended = subprocess.run([sys.executable, __file__, str(model), "--step", name, "--store", store, "--document-tokens",
                                    str(document_tokens), "--max-tokens", str(max_tokens)], capture_output=True, text=True)
            if ended.returncode != 0:
                sys.exit(f"the {name} process failed:\n{ended.stderr}")
            results.append(json.loads(ended.stdout.splitlines()[-1]))
    return results


def table(results):
    rows = [("process", "prefilled", "tokens held", "open", "load", "first token", "save")]
    for result in results:
        ms = [f"{result['ms'][what]:,.1f} ms" if what in result["ms"] else "" for what in ("open", "load", "first token", "save")]
        rows.append((result["step"], str(result["prefilled"]), str(result["held"]), *ms))
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default=ROOT / ".models" / "smollm2-135m", type=Path)
    parser.add_argument("--document-tokens", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, default=4)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    parser.add_argument("--store", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.step:
        print(json.dumps(step(arguments.step, str(arguments.model), arguments.store, arguments.document_tokens, arguments.max_tokens)))
        return
    results = flow(arguments.model, arguments.document_tokens, arguments.max_tokens)
    _, woken, cold = results
    if woken["tokens"][-arguments.max_tokens:] != cold["tokens"][-arguments.max_tokens:]:
        sys.exit("the woken cache answered otherwise than a cold prompt")
    print(json.dumps(results) if arguments.json else table(results))


if __name__ == "__main__":
    main()
