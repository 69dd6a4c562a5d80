"""What must match before a cache may be used again."""

import hashlib
import json
from functools import lru_cache
from pathlib import Path

from . import _store
from .errors import InvalidArgumentError, NotFoundError

FIELDS = ("architecture", "config", "weights", "tokenizer", "chat_template", "rope", "kv")


def _digest_of(*paths):
    digests = [f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()}" for path in paths if path.exists()]
    return hashlib.sha256("\n".join(digests).encode()).hexdigest() if digests else ""


@lru_cache(maxsize=64)
def _weights_digest(directory, files):
    """`files`: their names, sizes and times; other ones are read anew."""
    return _store.weights_digest(directory)


def identity_of(model):
    """The identity of `model` as (field, value) pairs: of a model directory, by digests of its files; of a dict, its own
    fields. Rows that mlx-lm computed are never taken for those of Torpor's engine: `kv` says whose they are."""
    if isinstance(model, dict):
        if unknown := sorted(set(model) - set(FIELDS)):
            raise InvalidArgumentError(f"The identity has no field '{unknown[0]}'; it has {', '.join(FIELDS)}.")
        return [(field, str(model.get(field, ""))) for field in FIELDS]
    directory = Path(model).expanduser().resolve()
    if not (directory / "config.json").is_file():
        raise NotFoundError(f"'{directory}' is no model directory (it has no config.json); "
                            "give a directory, or the identity as a dict.")
    weights = sorted((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in directory.glob("*.safetensors*"))
    return [
        ("architecture", json.loads((directory / "config.json").read_text()).get("model_type", "")),
        ("config", _digest_of(directory / "config.json")),
        ("weights", _weights_digest(directory, tuple(weights))),
        ("tokenizer", _digest_of(directory / "tokenizer.json")),
        ("chat_template", _digest_of(directory / "chat_template.jinja", directory / "tokenizer_config.json")),
        ("rope", ""),
        ("kv", "mlx-lm"),
    ]
