"""Turns by messages: the whole conversation is given, and what the agent holds of it is not computed again."""

import json

import numpy as np
import pytest

from conftest import ROOT, Torpor, held_ids, make_tiny_model

import torpor

WEATHER = {"type": "function", "function": {"name": "weather", "description": "Says how it is outside.", "parameters": {
    "type": "object", "properties": {"place": {"type": "string"}, "days": {"type": "integer"}}, "required": ["place"]}}}
CALL = {"role": "assistant", "content": "", "tool_calls": [
    {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": {"place": "Skye", "days": 2}}}]}
RESULT = {"role": "tool", "tool_call_id": "call_1", "name": "weather", "content": "rain"}


def user(text):
    return {"role": "user", "content": text}


def said(text):
    return {"role": "assistant", "content": text}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny model with a published template that knows tools, Qwen 2.5's."""
    directory = make_tiny_model(tmp_path_factory.mktemp("models") / "tools")
    config = json.loads((ROOT / ".models" / "qwen2.5-coder-0.5b" / "tokenizer_config.json").read_text())
    (directory / "chat_template.jinja").write_text(config["chat_template"])
    return directory


@pytest.fixture(scope="module")
def oracle(model):
    """The ids that transformers makes of a conversation."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)

    def ids(messages, **variables):
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False, **variables)

    return ids


@pytest.fixture
def engine(model, tmp_path):
    with torpor.Engine(model, tmp_path / "store") as engine:
        yield engine


def held(tmp_path, agent):
    return held_ids(tmp_path / "store", agent)


def test_a_conversation_with_tools_has_the_ids_that_transformers_gives_it(engine, oracle, tmp_path):
    messages = [{"role": "system", "content": "Be brief."}, user("How is Skye?"), CALL, RESULT]
    result = engine.agent("ada").turn(messages, tools=[WEATHER], max_tokens=3)
    theirs = oracle(messages, tools=[WEATHER])
    assert result.tokens.prompt == len(theirs) and result.divergence is None
    assert held(tmp_path, "ada")[:len(theirs)] == theirs


def test_what_an_agent_holds_of_a_longer_history_is_not_computed_again(engine, oracle, tmp_path):
    ada = engine.agent("ada")
    history = [{"role": "system", "content": "Be brief."}, user("Name a colour.")]
    first = ada.turn(history, max_tokens=6)
    history += [said(first.text), user("Name another.")]
    second = ada.turn(history, max_tokens=6)
    assert second.tokens.cached == first.tokens.context and second.divergence is None
    # What was generated stays as it was generated, whatever ids its text would have; the rest is the template's.
    before = oracle(history[:2])
    ids = held(tmp_path, "ada")
    assert ids[:len(before)] == before
    tail = oracle([*history[:2], said("x"), history[3]])[len(oracle(history[:2])) + 1:]
    assert ids[first.tokens.context:second.tokens.prompt] == tail


def test_a_client_may_drop_thinking_and_ids_and_write_arguments_otherwise(engine):
    ada = engine.agent("ada")
    call = json.loads(json.dumps(CALL))
    first = ada.turn([user("How is Skye?"), call, RESULT], tools=[WEATHER], max_tokens=4)
    call["tool_calls"][0]["id"] = "other"
    call["tool_calls"][0]["function"]["arguments"] = '{"days": 2.0,  "place": "Skye"}'
    again = [user("How is Skye?"), call, {**RESULT, "tool_call_id": "other"}, said(f"\n{first.text} "), user("And Mull?")]
    second = ada.turn(again, tools=[WEATHER], max_tokens=4)
    assert second.divergence is None and second.tokens.cached == first.tokens.context


def test_where_messages_differ_the_agent_is_rewound_to_there(engine, oracle, tmp_path):
    ada = engine.agent("ada")
    history = [user("Name a colour.")]
    answers = []
    for question in ("Name another.", "And one more.", "The last."):
        answers.append(ada.turn(history, max_tokens=4))
        history += [said(answers[-1].text), user(question)]
    changed = [*history[:4], user("Name a sea instead.")]
    result = ada.turn(changed, max_tokens=4)
    parted = result.divergence
    assert parted.message == 4 and not parted.beginning
    assert json.loads(parted.held) == user("And one more.") and json.loads(parted.given) == changed[4]
    # To the token: the new question begins as the old one does.
    assert answers[1].tokens.context < result.tokens.cached < answers[2].tokens.prompt
    assert [message["content"] for message in json.loads(Torpor(tmp_path / "store", "").__call__(
        "show", "ada", "--json").ok().out)["messages"]] == [message["content"] for message in changed] + [result.text]


def test_an_answer_asked_for_again_is_computed_again_and_says_what_it_takes_the_place_of(engine):
    ada = engine.agent("ada")
    first = ada.turn([user("Name a colour.")], max_tokens=4)
    second = ada.turn([user("Name a colour.")], max_tokens=4)
    assert second.text == first.text and second.tokens.cached == first.tokens.prompt - 1
    assert second.divergence.message == 1 and second.divergence.given == ""
    assert json.loads(second.divergence.held) == said(first.text)


def test_a_branch_never_shortens_the_longer_conversation(engine, oracle, tmp_path):
    ada = engine.agent("ada")
    opening = [{"role": "system", "content": "Be brief."}, user("Name a colour.")]
    first = ada.turn(opening, max_tokens=4, on_divergence="branch")
    longer = [*opening, said(first.text), user("Name another.")]
    second = ada.turn(longer, max_tokens=4, on_divergence="branch")
    assert (first.agent, second.agent) == ("ada", "ada")
    tokens = held(tmp_path, "ada")
    title = ada.turn([*opening, said(first.text), user("Give it a title.")], max_tokens=4, on_divergence="branch")
    assert title.agent == "ada.2" and title.divergence.message == 3
    assert title.tokens.cached > first.tokens.context  # its rows are ada's
    assert held(tmp_path, "ada.2")[:first.tokens.context] == tokens[:first.tokens.context]
    third = ada.turn([*longer, said(second.text), user("More.")], max_tokens=4, on_divergence="branch")
    more = ada.turn([*opening, said(first.text), user("Give it a title."), said(title.text), user("A shorter one.")],
                    max_tokens=4, on_divergence="branch")
    assert (third.agent, more.agent) == ("ada", "ada.2")
    assert third.divergence is None and third.tokens.cached == second.tokens.context
    assert more.divergence is None and more.tokens.cached == title.tokens.context
    other = ada.turn([user("Who are you?")], max_tokens=4, on_divergence="branch")
    assert other.agent == "ada.3" and other.divergence.message == 0
    engine.agent("ada").sleep()
    again = ada.turn([*opening, said(first.text), user("Again.")], max_tokens=4, on_divergence="branch")
    assert again.agent == "ada.4" and held(tmp_path, "ada")[:len(tokens)] == tokens


def test_tools_belong_to_the_beginning(engine, model, tmp_path):
    ada = engine.agent("ada")
    history = [user("How is Skye?")]
    first = ada.turn(history, tools=[WEATHER], max_tokens=4)
    history += [said(first.text), user("And Mull?")]
    kept = ada.turn(history, tools=[json.loads(json.dumps(WEATHER))], max_tokens=4)
    assert kept.divergence is None and kept.tokens.cached == first.tokens.context
    # A prompt alone goes on with what the agent has, in another process too; other tools are refused.
    ada.sleep()
    cli = Torpor(tmp_path / "store", model)
    assert cli.run("ada", "And Rum?", max_tokens=2).ok().json["tokens"]["cached"] == kept.tokens.context
    (tmp_path / "tools.json").write_text(json.dumps([{**WEATHER, "type": "other"}]))
    cli.run("ada", "And Eigg?", "--tools", tmp_path / "tools.json").fails("invalid", "tools")
    bob = engine.agent("bob")
    bob.turn(history[:1], tools=[WEATHER], max_tokens=4)
    result = bob.turn(history, max_tokens=4)
    assert result.divergence.beginning and result.divergence.message == 0 and "weather" in result.divergence.held
    assert result.tokens.cached < first.tokens.prompt
    assert bob.turn([*history, said(result.text), user("And Muck?")], max_tokens=1).tokens.cached == result.tokens.context


def test_arguments_that_change_nothing_before_an_answer_are_taken(engine, model, tmp_path):
    template = (model / "chat_template.jinja").read_text()
    changed = make_tiny_model(tmp_path / "thinking")
    (changed / "chat_template.jinja").write_text(template + "{%- if enable_thinking is defined %}{{- '<think>' }}{%- endif %}")
    with torpor.Engine(changed, tmp_path / "thoughts") as engine:
        ada = engine.agent("ada")
        history = [user("Name a colour.")]
        first = ada.turn(history, max_tokens=4)
        history += [said(first.text), user("Name another.")]
        plain, thinking = (engine.turn(history, template_args=args, max_tokens=1).tokens.prompt for args in ({}, {"enable_thinking": True}))
        assert thinking > plain
        second = ada.turn(history, template_args={"enable_thinking": True}, max_tokens=4)
        assert second.divergence is None and second.tokens.cached == first.tokens.context
        assert second.tokens.prefilled == thinking - plain + ada_prefilled(history, first, engine)


def ada_prefilled(history, first, engine):
    """What the same turn without arguments would compute."""
    bob = engine.agent("bob")
    assert bob.turn(history[:1], max_tokens=4).text == first.text
    return bob.turn(history, max_tokens=1).tokens.prefilled


def test_the_command_line_takes_messages_tools_and_arguments(model, oracle, tmp_path):
    cli = Torpor(tmp_path / "store", model)
    messages = [user("How is Skye?"), CALL, RESULT]
    (tmp_path / "messages.json").write_text(json.dumps(messages))
    (tmp_path / "tools.json").write_text(json.dumps([WEATHER]))
    run = ["run", "--model", model, "--json", "--max-tokens", 3, "--agent", "ada", "--messages", tmp_path / "messages.json"]
    turn = cli(*run, "--tools", tmp_path / "tools.json", "--template-args", '{"unused": 1}').ok().json
    assert turn["tokens"]["prompt"] == len(oracle(messages, tools=[WEATHER]))
    why = cli("why", "ada", "--messages", "--prompt-file", tmp_path / "messages.json", "--tools", tmp_path / "tools.json",
              "--json").ok().json
    assert why["common_tokens"] == turn["tokens"]["prompt"] and why["diverges_at"] is None
    (tmp_path / "messages.json").write_text(json.dumps([*messages, said(turn["text"]), user("Thanks.")]))
    assert cli(*run, "--tools", tmp_path / "tools.json").ok().json["tokens"]["cached"] == turn["tokens"]["context"]
    (tmp_path / "messages.json").write_text(json.dumps([user("Bye.")]))
    branch = cli(*run, "--branch").ok().json
    assert branch["agent"] == "ada.2" and branch["divergence"]["message"] == 0
    for bad, word in (("[", "JSON"), ("{}", "array"), ('[{"role": "user"}]', "content"), ("[]", "message"),
                      ('[{"role": "assistant", "content": "hi"}]', "assistant")):
        (tmp_path / "messages.json").write_text(bad)
        cli(*run).fails("invalid", word)
    cli("run", "--model", model, "--agent", "x", "--prompt", "hi", "--template-args", "[]").fails("invalid", "object")
    cli("run", "--model", model, "--agent", "x", "--prompt", "hi", "--template-args", "{").fails("invalid", "object")


def test_without_a_name_the_longest_prefix_is_found(model, tmp_path, words):
    system = {"role": "system", "content": words(600)}
    with torpor.Engine(model, tmp_path / "store") as engine:
        first = engine.turn([system, user("Name a colour.")], max_tokens=2)
        second = engine.turn([system, user("Name a sea.")], max_tokens=2)
    # In memory there is all that both begin with, on disk the first 512 of it.
    assert first.tokens.cached == 0 and second.tokens.cached == 610 and second.divergence is None
    with torpor.Engine(model, tmp_path / "store") as engine:
        assert engine.turn([system, user("Name a tree.")], max_tokens=2).tokens.cached == 512


def test_what_is_no_message_is_refused(engine):
    deep = "[" * 500 + "]" * 500
    for bad in ([{"role": "user", "content": 1}], [{"content": "hi"}], [["hi"]],
                [{"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": "no"}}]}, user("x")],
                [{"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": f'{{"a": {deep}}}'}}]},
                 user("x")], [{"role": "user", "content": np.float32(1)}]):
        with pytest.raises(torpor.InvalidArgumentError):
            engine.turn(bad)
    with pytest.raises(torpor.InvalidArgumentError):
        engine.turn([])
