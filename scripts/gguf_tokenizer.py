#!/usr/bin/env python3
"""Writes the tokenizer kept in a GGUF file as the Hugging Face files Torpor reads.

    write_tokenizer(gguf.GGUFReader(path), out_dir)
    scripts/gguf_tokenizer.py model.gguf out_dir

makes tokenizer.json, tokenizer_config.json and special_tokens_map.json. Byte-level BPE only.
"""

import json
import sys
from pathlib import Path

# gguf.TokenType values that are whole tokens, never the result of merging.
CONTROL, USER_DEFINED = 3, 4

BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}

QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# What `tokenizer.ggml.pre` stands for: (normalizer, pre-tokenizers), as in the tokenizer.json the GGUF was made from.
PRE_TOKENIZERS = {
    "smollm": (None, [{"type": "Digits", "individual_digits": True}, BYTE_LEVEL]),
    "qwen2": (
        {"type": "NFC"},
        [
            {"type": "Split", "pattern": {"Regex": QWEN2_PATTERN}, "behavior": "Isolated", "invert": False},
            {**BYTE_LEVEL, "use_regex": False},
        ],
    ),
}


def fields(gguf_reader):
    """A function that gives the metadata under a key of `gguf_reader` (a gguf.GGUFReader), or a default."""

    def get(key, default=None):
        field = gguf_reader.get_field(key)
        return default if field is None else field.contents()

    return get


def write_tokenizer(gguf_reader, out_dir):
    """Writes the three tokenizer files of `gguf_reader` to `out_dir`; ValueError when it can't."""
    get = fields(gguf_reader)

    model = get("tokenizer.ggml.model")
    if model != "gpt2":
        raise ValueError(f"tokenizer.ggml.model is {model!r}; only byte-level BPE ('gpt2') can be converted")
    pre = get("tokenizer.ggml.pre")
    if pre not in PRE_TOKENIZERS:
        raise ValueError(f"tokenizer.ggml.pre is {pre!r}; only {', '.join(PRE_TOKENIZERS)} can be converted")
    normalizer, pre_tokenizers = PRE_TOKENIZERS[pre]

    tokens = get("tokenizer.ggml.tokens")
    types = get("tokenizer.ggml.token_type", [1] * len(tokens))
    merges = [merge.split(" ") for merge in get("tokenizer.ggml.merges")]
    added = [
        {
            "id": i,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": kind == CONTROL,
        }
        for i, (token, kind) in enumerate(zip(tokens, types))
        if kind in (CONTROL, USER_DEFINED)
    ]
    # Some vocabularies keep whole tokens apart from the BPE, others inside it; inside gives the same ids.
    vocab = {token: i for i, token in enumerate(tokens)}

    def special(name):
        i = get(f"tokenizer.ggml.{name}_token_id")
        return None if i is None else tokens[i]

    named = {
        "bos_token": special("bos"),
        "eos_token": special("eos"),
        "unk_token": special("unknown"),
        "pad_token": special("padding"),
    }
    add_bos = bool(get("tokenizer.ggml.add_bos_token", False))
    bos = named["bos_token"]

    byte_level = {**BYTE_LEVEL, "add_prefix_space": True}  # as a decoder only the type matters
    post_processor = None
    if add_bos and bos is not None:
        post_processor = {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {bos: {"id": bos, "ids": [vocab[bos]], "tokens": [bos]}},
        }

    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": normalizer,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": pre_tokenizers},
        "post_processor": post_processor,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": merges,
        },
    }

    architecture = get("general.architecture")
    config = {
        "add_bos_token": add_bos,
        "add_prefix_space": False,
        "added_tokens_decoder": {str(t["id"]): {k: v for k, v in t.items() if k != "id"} for t in added},
        **named,
        "clean_up_tokenization_spaces": False,
        "model_max_length": get(f"{architecture}.context_length", 1 << 30),
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    chat_template = get("tokenizer.chat_template")
    if chat_template is not None:
        config["chat_template"] = chat_template

    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    for name, value in (
        ("tokenizer.json", tokenizer),
        ("tokenizer_config.json", config),
        ("special_tokens_map.json", {k: v for k, v in named.items() if v is not None}),
    ):
        text = json.dumps(value, ensure_ascii=False, indent=2)
        (out_dir / name).write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    import gguf

    if len(sys.argv) != 3:
        sys.exit(__doc__)
    write_tokenizer(gguf.GGUFReader(sys.argv[1]), sys.argv[2])
