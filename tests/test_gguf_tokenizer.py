"""scripts/gguf_tokenizer.py: a tokenizer that went through GGUF gives the same ids as the one it came from."""

import json
import sys
from pathlib import Path

import gguf
import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
from gguf_tokenizer import write_tokenizer

FIXTURE = ROOT / "tests/goldens/text/tokenizers/byte-level/tokenizer.json"


def as_gguf(path, pre="qwen2", model="gpt2", add_bos=False):
    file = json.loads(FIXTURE.read_text(encoding="utf-8"))
    added = {token["id"]: token for token in file["added_tokens"]}
    vocab = {**file["model"]["vocab"], **{token["content"]: i for i, token in added.items()}}
    tokens = sorted(vocab, key=vocab.get)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(2048)
    writer.add_tokenizer_model(model)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    normal, control, user = gguf.TokenType.NORMAL, gguf.TokenType.CONTROL, gguf.TokenType.USER_DEFINED
    writer.add_token_types([(control if added[i]["special"] else user) if i in added else normal for i in range(len(tokens))])
    writer.add_token_merges([" ".join(merge) for merge in file["model"]["merges"]])
    writer.add_bos_token_id(vocab["<|im_start|>"])
    writer.add_eos_token_id(vocab["<|im_end|>"])
    writer.add_add_bos_token(add_bos)
    writer.add_chat_template("{{ bos_token }}{{ messages[0].content }}")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return gguf.GGUFReader(path)


def test_same_ids(tmp_path):
    write_tokenizer(as_gguf(tmp_path / "a.gguf"), tmp_path)
    expected = Tokenizer.from_file(str(FIXTURE))
    expected.no_truncation()
    expected.no_padding()
    converted = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    goldens = json.loads((ROOT / "tests/goldens/text/tokenizers.json").read_text(encoding="utf-8"))
    for case in goldens[0]["cases"]:
        ids = expected.encode(case["input"]).ids
        assert converted.encode(case["input"]).ids == ids
        for skip in (False, True):
            assert converted.decode(ids, skip_special_tokens=skip) == expected.decode(ids, skip_special_tokens=skip)
    assert converted.get_vocab() == expected.get_vocab()


def test_transformers_reads_the_files(tmp_path):
    write_tokenizer(as_gguf(tmp_path / "a.gguf", add_bos=True), tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert tokenizer.model_max_length == 2048
    assert tokenizer.encode("a")[0] == tokenizer.bos_token_id
    message = [{"role": "user", "content": "hi"}]
    assert tokenizer.apply_chat_template(message, tokenize=False) == "<|im_start|>hi"


@pytest.mark.parametrize("unknown", [{"pre": "command-r"}, {"model": "bert"}])
def test_others_are_refused(tmp_path, unknown):
    with pytest.raises(ValueError, match="can be converted"):
        write_tokenizer(as_gguf(tmp_path / "a.gguf", **unknown), tmp_path)
    assert not (tmp_path / "tokenizer.json").exists()
