"""mlx-lm's generate_step with a memory: run it again, and it goes on where it was. Torpor's five lines are marked.

    python examples/mlx_lm_steps.py MODEL "Once upon a time"
    python examples/mlx_lm_steps.py MODEL " and then"

MODEL is a model directory. The cache is kept in $TORPOR_STORE, else ~/.agent_caches. A third argument is the number of
tokens (32).
"""

import sys

import mlx.core as mx
import mlx_lm
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache

import torpor  # 1

model, tokenizer = mlx_lm.load(sys.argv[1])
max_tokens = int(sys.argv[3]) if len(sys.argv) > 3 else 32
store = torpor.CachePersistence(model=sys.argv[1])  # 2
try:
    cache, _ = store.load_agent_cache("steps")  # 3
except KeyError:  # 4
    cache = make_prompt_cache(model)
held = torpor.get_cache_size(cache)
ids = tokenizer.encode(sys.argv[2], add_special_tokens=held == 0)
steps = generate_step(mx.array(ids), model, prompt_cache=cache, max_tokens=max_tokens)
answer = [token for token, _ in steps]
store.save_agent_cache("steps", cache)  # 5
print(tokenizer.decode(answer))
print(f"[{held} tokens held before, {len(ids)} read, {torpor.get_cache_size(cache)} held]", file=sys.stderr)
