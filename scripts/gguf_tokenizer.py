#!/usr/bin/env python3
"""Writes the tokenizer kept in a GGUF file as the Hugging Face files Torpor reads.

    write_tokenizer(gguf.GGUFReader(path), out_dir)
    scripts/gguf_tokenizer.py model.gguf out_dir

makes tokenizer.json, tokenizer_config.json and special_tokens_map.json, of byte-level BPE ("gpt2" in GGUF) and of
SentencePiece BPE with byte fallback ("llama").
"""

import json
import sys
from pathlib import Path

# gguf.TokenType
CONTROL, USER_DEFINED, UNUSED = 3, 4, 5

BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}

QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_PATTERN = QWEN2_PATTERN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")


def split(pattern):
    return [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
        {**BYTE_LEVEL, "use_regex": False},
    ]


# What `tokenizer.ggml.pre` stands for: (normalizer, pre-tokenizers), as in the tokenizer.json the GGUF was made from.
PRE_TOKENIZERS = {
    "smollm": (None, [{"type": "Digits", "individual_digits": True}, BYTE_LEVEL]),
    "qwen2": ({"type": "NFC"}, split(QWEN2_PATTERN)),
    "llama-bpe": (None, split(LLAMA3_PATTERN)),
}


def fields(gguf_reader):
    """A function that gives the metadata under a key of `gguf_reader` (a gguf.GGUFReader), or a default."""

    def get(key, default=None):
        field = gguf_reader.get_field(key)
        return default if field is None else field.contents()

    return get


def bpe(vocab, merges, **options):
    return {
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
    } | options


def byte_level(get, vocab):
    """tokenizer.json's normalizer, pre_tokenizer, decoder and model."""
    pre = get("tokenizer.ggml.pre")
    if pre not in PRE_TOKENIZERS:
        raise ValueError(f"tokenizer.ggml.pre is {pre!r}; only {', '.join(PRE_TOKENIZERS)} can be converted")
    normalizer, pre_tokenizers = PRE_TOKENIZERS[pre]
    return {
        "normalizer": normalizer,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": pre_tokenizers},
        "decoder": {**BYTE_LEVEL, "add_prefix_space": True},  # as a decoder only the type matters
        "model": bpe(vocab, [merge.split(" ") for merge in get("tokenizer.ggml.merges")], ignore_merges=pre == "llama-bpe"),
    }


def sentence_piece(get, vocab, scores, unk_token):
    """The same. SentencePiece keeps scores instead of merges: what joins to the piece of the highest score goes first."""
    merges = []
    for piece, score in scores.items():
        cuts = ((piece[:i], piece[i:]) for i in range(1, len(piece)))
        pairs = [pair for pair in cuts if pair[0] in scores and pair[1] in scores]
        pairs.sort(key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
        merges += [(score, len(left), len(right), left, right) for left, right in pairs]
    merges.sort(key=lambda merge: merge[:3], reverse=True)
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    decoders = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    prefix = get("tokenizer.ggml.add_space_prefix", True)
    return {
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, space]} if prefix else space,
        "pre_tokenizer": None,
        "decoder": {
            "type": "Sequence",
            "decoders": decoders + ([{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []),
        },
        "model": bpe(vocab, [merge[3:] for merge in merges], unk_token=unk_token, fuse_unk=True, byte_fallback=True),
    }


def write_tokenizer(gguf_reader, out_dir):
    """Writes the three tokenizer files of `gguf_reader` to `out_dir`; ValueError when it can't."""
    get = fields(gguf_reader)

    model = get("tokenizer.ggml.model")
    if model not in ("gpt2", "llama"):
        raise ValueError(f"tokenizer.ggml.model is {model!r}; only byte-level ('gpt2') and SentencePiece ('llama') BPE "
                         "can be converted")
    tokens = get("tokenizer.ggml.tokens")
    types = get("tokenizer.ggml.token_type", [1] * len(tokens))
    if model == "llama":
        # GGUF writes the runs of spaces that are pieces of their own as spaces.
        tokens = [token.replace(" ", "▁") if kind == USER_DEFINED else token for token, kind in zip(tokens, types)]
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
        # Runs of spaces are found by merging: a text is cut at added tokens before its spaces become "▁".
        if kind == CONTROL or kind == USER_DEFINED and token.strip("▁")
    ]
    # Some vocabularies keep whole tokens apart from the BPE, others inside it; inside gives the same ids.
    vocab = {token: i for i, (token, kind) in enumerate(zip(tokens, types)) if kind != UNUSED}

    def special(name):
        i = get(f"tokenizer.ggml.{name}_token_id")
        return None if i is None else tokens[i]

    named = {
        "bos_token": special("bos"),
        "eos_token": special("eos"),
        "unk_token": special("unknown"),
        "pad_token": special("padding"),
    }
    if model == "gpt2":
        parts = byte_level(get, vocab)
    else:
        # A piece that the user defined is found first: as one of the highest score.
        scores = {token: 0.0 if kind == USER_DEFINED else score
                  for token, kind, score in zip(tokens, types, get("tokenizer.ggml.scores")) if kind in (1, USER_DEFINED)}
        parts = sentence_piece(get, vocab, scores, named["unk_token"])

    add_bos = bool(get("tokenizer.ggml.add_bos_token", model == "llama"))
    bos = named["bos_token"]
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
        "normalizer": parts["normalizer"],
        "pre_tokenizer": parts["pre_tokenizer"],
        "post_processor": post_processor,
        "decoder": parts["decoder"],
        "model": parts["model"],
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
