"""mlx-lm's speed on one model, as JSON: bench/peers/mlx_lm_bench.py MODEL PREFILL DECODE

Computes in f32 (MLX's x86 CPU build has no fast half types), which is the best that mlx-lm does on such a machine. A call
each: MLX may compile while the first one runs, so a short prefill comes before.
"""

import json
import resource
import sys
import time

import mlx.core as mx
from mlx.utils import tree_map
from mlx_lm import load
from mlx_lm.models.cache import make_prompt_cache


def main():
    path, prefill, decode = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    mx.set_default_device(mx.cpu)
    model, _ = load(path)
    model.update(tree_map(lambda a: a.astype(mx.float32) if mx.issubdtype(a.dtype, mx.floating) else a, model.parameters()))
    mx.eval(model.parameters())

    ids = mx.random.randint(0, 49152, (1, prefill), key=mx.random.key(42))
    mx.eval(model(ids[:, :2], cache=make_prompt_cache(model)))

    cache = make_prompt_cache(model)
    start = time.perf_counter()
    logits = model(ids, cache=cache)[:, -1]
    mx.eval(logits)
    prefill_s = time.perf_counter() - start

    start = time.perf_counter()
    for _ in range(decode):
        logits = model(mx.argmax(logits, axis=-1)[:, None], cache=cache)[:, -1]
        mx.eval(logits)
    decode_s = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(json.dumps({"prefill": prefill / prefill_s, "decode": decode / decode_s, "peak_bytes": peak}))


main()
