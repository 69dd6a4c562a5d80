"""Generation by mlx-lm that takes a cache and gives it back."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from . import _mlx_lm  # noqa: F401  # first: it says what is missing
from mlx_lm.generate import stream_generate
from mlx_lm.models.cache import make_prompt_cache


@dataclass
class Generation:
    """A stream of text. Iterate over it; `cache`, `tokens` and `prefilled` are final at its end."""

    cache: list[Any]
    _responses: Iterable[Any] = field(repr=False)
    tokens: list[int] = field(default_factory=list)  #: prompt and answer of this call; their rows are all in the cache
    prefilled: int = 0  #: prompt tokens computed, as mlx-lm counted them
    text: str = ""

    def __iter__(self) -> Iterator[str]:
        for response in self._responses:
            self.prefilled = response.prompt_tokens
            # The last response repeats the token before it when the answer ended by length.
            if response.generation_tokens > self._seen:
                self.tokens.append(int(response.token))
                self._seen = response.generation_tokens
            self.text += response.text
            yield response.text

    _seen: int = 0


class MLXCacheExtractor:
    """Takes the cache out of mlx-lm's generation.

        extractor = MLXCacheExtractor(model, tokenizer)
        text, cache = extractor.generate("Once upon a time")
        more, cache = extractor.generate(" and then", cache)
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model = model
        self.tokenizer = tokenizer

    def stream(self, prompt: str | Iterable[int], cache: list[Any] | None = None, **options: Any) -> Generation:
        """A Generation that continues `cache` (None: from nothing) by `prompt`, a text or token ids. A text gets the
        tokenizer's BOS where the cache is empty and the text does not begin with it. `options` go to
        mlx_lm.stream_generate (max_tokens, sampler, ...)."""
        cache = make_prompt_cache(self.model) if cache is None else cache
        if isinstance(prompt, str):
            bos = self.tokenizer.bos_token
            begins = all(layer.empty() for layer in cache) and not (bos and prompt.startswith(bos))
            prompt = self.tokenizer.encode(prompt, add_special_tokens=begins)
        prompt = [int(token) for token in prompt]
        responses = stream_generate(self.model, self.tokenizer, prompt, prompt_cache=cache, **options)
        return Generation(cache, responses, list(prompt))

    def generate(self, prompt: str | Iterable[int], cache: list[Any] | None = None, **options: Any) -> tuple[str, list[Any]]:
        """(text, cache): as `stream`, all at once. `cache` is continued in place."""
        generation = self.stream(prompt, cache, **options)
        for _ in generation:
            pass
        return generation.text, generation.cache
