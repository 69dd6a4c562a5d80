"""mlx-lm with a memory: run it again with another prompt, and only that is prefilled. Torpor's five lines are marked.

    python examples/mlx_lm_agent.py MODEL "My name is Ada."
    python examples/mlx_lm_agent.py MODEL "What is my name?"
"""

import sys

import mlx_lm
from mlx_lm.models.cache import make_prompt_cache

import torpor  # 1

model, tokenizer = mlx_lm.load(sys.argv[1])
store = torpor.CachePersistence(model=sys.argv[1])  # 2
known = any(agent["agent_id"] == "ada" for agent in store.list_cached_agents())  # 3
cache = store.load_agent_cache("ada")[0] if known else make_prompt_cache(model)  # 4
for response in mlx_lm.stream_generate(model, tokenizer, sys.argv[2], prompt_cache=cache, max_tokens=64):
    print(response.text, end="", flush=True)
print()
store.save_agent_cache("ada", cache)  # 5
