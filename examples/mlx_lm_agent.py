"""mlx-lm with a memory: run it again with another message, and only that is read. Torpor's five lines are marked.

    python examples/mlx_lm_agent.py MODEL "My name is Ada."
    python examples/mlx_lm_agent.py MODEL "What is my name?"

MODEL is a model directory. The agent is kept in $TORPOR_STORE, else ~/.agent_caches. A third argument is the longest answer in
tokens (64).
"""

import json
import sys

import mlx_lm
from mlx_lm.models.cache import make_prompt_cache

import torpor  # 1

model, tokenizer = mlx_lm.load(sys.argv[1])
store = torpor.CachePersistence(model=sys.argv[1])  # 2
known = any(agent["agent_id"] == "ada" for agent in store.list_cached_agents())  # 3
cache, kept = store.load_agent_cache("ada") if known else (make_prompt_cache(model), {})  # 4
held = torpor.get_cache_size(cache)
messages = [*json.loads(kept.get("messages", "[]")), {"role": "user", "content": sys.argv[2]}]
prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
if len(messages) > 1:  # the cache holds all up to the last answer: what follows it is new
    prompt = prompt[prompt.rindex(messages[-2]["content"]) + len(messages[-2]["content"]):]
ids = tokenizer.encode(prompt, add_special_tokens=False)
max_tokens = int(sys.argv[3]) if len(sys.argv) > 3 else 64
answer = ""
for response in mlx_lm.stream_generate(model, tokenizer, ids, prompt_cache=cache, max_tokens=max_tokens):
    print(response.text, end="", flush=True)
    answer += response.text
print(f"\n[{held} tokens held before, {response.prompt_tokens} read]", file=sys.stderr)
messages.append({"role": "assistant", "content": answer.strip()})  # as most templates write an answer
store.save_agent_cache("ada", cache, {"messages": json.dumps(messages)})  # 5
