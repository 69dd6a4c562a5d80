"""mlx-lm with a memory: run it again with another message, and only that is read. Torpor's five lines are marked.

    python examples/mlx_lm_agent.py MODEL "My name is Ada."
    python examples/mlx_lm_agent.py MODEL "What is my name?"

MODEL is a model directory. The agent is kept in $TORPOR_STORE, else ~/.agent_caches. A third argument is the longest answer in
tokens (64).
"""

import sys

import mlx_lm
from mlx_lm.models.cache import make_prompt_cache

import torpor  # 1

model, tokenizer = mlx_lm.load(sys.argv[1])
store = torpor.CachePersistence(model=sys.argv[1])  # 2
known = any(agent["agent_id"] == "ada" for agent in store.list_cached_agents())  # 3
cache = store.load_agent_cache("ada")[0] if known else make_prompt_cache(model)  # 4
held = torpor.get_cache_size(cache)
prompt = tokenizer.apply_chat_template([{"role": "user", "content": sys.argv[2]}], add_generation_prompt=True)
max_tokens = int(sys.argv[3]) if len(sys.argv) > 3 else 64
for response in mlx_lm.stream_generate(model, tokenizer, prompt, prompt_cache=cache, max_tokens=max_tokens):
    print(response.text, end="", flush=True)
print(f"\n[{held} tokens held before, {response.prompt_tokens} read]", file=sys.stderr)
store.save_agent_cache("ada", cache)  # 5
