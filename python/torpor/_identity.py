"""What must match before a cache may be used again."""

import hashlib
import json
from functools import lru_cache
from pathlib import Path

from .errors import InvalidArgumentError, NotFoundError

FIELDS = ("architecture", "config", "weights", "tokenizer", "chat_template", "rope", "kv")


@lru_cache(maxsize=64)
def _digest(path, size, mtime_ns):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest_of(paths):
    digests = []
    for path in paths:
        stat = path.stat()
        digests.append(f"{path.name} {_digest(path, stat.st_size, stat.st_mtime_ns)}")
    return hashlib.sha256("\n".join(digests).encode()).hexdigest() if digests else ""


def identity_of(model):
    """The identity of `model` as (field, value) pairs: of a model directory, by digests of its files; of a dict, its own
    fields. Rows that mlx-lm computed are never taken for those of Torpor's engine: `kv` says whose they are."""
    if isinstance(model, dict):
        if unknown := sorted(set(model) - set(FIELDS)):
            raise InvalidArgumentError(f"The identity has no field '{unknown[0]}'; it has {', '.join(FIELDS)}.")
        return [(field, str(model.get(field, ""))) for field in FIELDS]
    directory = Path(model).expanduser()
    if not (directory / "config.json").is_file():
        raise NotFoundError(f"'{directory}' is no model directory (it has no config.json); "
                            "give a directory, or the identity as a dict.")
    return [
        ("architecture", json.loads((directory / "config.json").read_text()).get("model_type", "")),
        ("config", _digest_of([directory / "config.json"])),
        ("weights", _digest_of(sorted(directory.glob("*.safetensors")))),
        ("tokenizer", _digest_of([p for p in [directory / "tokenizer.json"] if p.exists()])),
        ("chat_template", _digest_of([p for p in [directory / "chat_template.jinja", directory / "tokenizer_config.json"]
                                      if p.exists()])),
        ("rope", ""),
        ("kv", "mlx-lm"),
    ]
