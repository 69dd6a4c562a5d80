"""Two turns through the command line with models of other families, whose templates and caches differ from Llama's."""

import pytest

from conftest import ROOT, Torpor

FAMILIES = {
    "gemma3-270m": "<end_of_turn>\n<start_of_turn>user\n{}<end_of_turn>\n<start_of_turn>model\n",
    "qwen2.5-coder-0.5b": "<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n",
}


@pytest.fixture(params=FAMILIES)
def family(request, tmp_path):
    return Torpor(tmp_path / "store", ROOT / ".models" / request.param), FAMILIES[request.param]


def test_the_second_turn_prefills_the_new_message_and_its_scaffold(family):
    from tokenizers import Tokenizer

    torpor, scaffold = family
    tokenizer = Tokenizer.from_file(str(torpor.model / "tokenizer.json"))
    document = " ".join((ROOT / "examples" / "lighthouse-log.txt").read_text().split())[:2500]
    question = "What does she write in the log?"
    first = torpor.run("ada", document, max_tokens=4).ok().json
    second = torpor.run("ada", question, max_tokens=4).ok().json
    assert second["tokens"]["cached"] == first["tokens"]["context"] > 500
    assert second["tokens"]["prefilled"] <= len(tokenizer.encode(scaffold.format(question), add_special_tokens=False).ids)
    assert second["bytes"]["read"] > 0

    # As in one process.
    awake = torpor.chat("awake", [document, question], max_tokens=4)
    assert [turn["text"] for turn in awake] == [first["text"], second["text"]]


@pytest.mark.parametrize("bits", ["8", "8,4", "4"])
def test_quantized_rows_leave_the_answer(tmp_path, bits):
    torpor = Torpor(tmp_path / "store", ROOT / ".models" / "qwen2.5-coder-0.5b")
    answer = torpor.run("ada", "What is the capital of France?", "--kv-bits", bits, max_tokens=12).ok().json
    assert "Paris" in answer["text"]


def test_a_chat_may_follow_raw_text(family):
    torpor, _ = family
    torpor.run("ada", "The keeper of the lamp", "--raw", max_tokens=2).ok()
    turn = torpor.run("ada", "Go on.", max_tokens=2).ok().json
    assert turn["tokens"]["cached"] > 0


def test_gemma_folds_the_system_message_into_the_first_turn(tmp_path):
    gemma = Torpor(tmp_path / "store", ROOT / ".models" / "gemma3-270m")
    plain = gemma.run("a", "Hi", max_tokens=1).ok().json["tokens"]["prompt"]
    system = gemma.run("b", "Hi", "--system", "Be brief.", max_tokens=1).ok().json["tokens"]["prompt"]
    assert system > plain
