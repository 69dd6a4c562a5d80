"""What the Python module takes and gives: values as Python programs have them."""

import copy
import os
import pickle

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import ArraysCache, KVCache

import torpor


@pytest.fixture
def engine(tiny_model, tmp_path):
    with torpor.Engine(tiny_model, tmp_path / "store") as engine:
        yield engine


def kv_cache(n=5):
    cache = KVCache()
    cache.update_and_fetch(mx.ones((1, 1, n, 8)), mx.zeros((1, 1, n, 8)))
    return cache


def test_results_print_compare_and_can_be_pickled(engine):
    result = engine.agent("ada").turn("hello", raw=True, max_tokens=2)
    saved = engine.agent("ada").save()
    usage = engine.memory_usage()
    for value in (result, result.tokens, saved, usage, usage.agents[0], engine.work()):
        assert pickle.loads(pickle.dumps(value)) == copy.deepcopy(value) == value
        assert " object at 0x" not in repr(value)
    assert repr(result.text) in repr(result) and "prompt=1" in repr(result.tokens)
    assert isinstance(result, torpor.TurnResult) and isinstance(saved, torpor.SaveResult)
    assert result.notices == []


def test_a_divergence_is_a_plain_value(engine):
    for content in ("one", "two"):
        result = engine.agent("ada").turn([{"role": "user", "content": content}], max_tokens=2)
    assert isinstance(result.divergence, torpor.MessageDivergence)
    assert result.divergence.message == 0 and '"one"' in result.divergence.held and '"two"' in result.divergence.given
    assert pickle.loads(pickle.dumps(result)) == result


def test_an_answer_that_was_not_saved_can_be_pickled_and_copied(tiny_model, tmp_path):
    with torpor.Engine(tiny_model, tmp_path / "store", min_free=1 << 60) as engine:
        result = engine.agent("ada").turn("hello", raw=True, max_tokens=2, logprobs=1)
    for again in (pickle.loads(pickle.dumps(result)), copy.deepcopy(result), copy.copy(result)):
        assert type(again.save_error) is torpor.ResourceExhaustedError and again.logprobs == result.logprobs
        assert str(again.save_error) == str(result.save_error) and vars(again.save_error) == vars(result.save_error)


def test_errors_are_pythons_own_kinds_and_keep_their_sentence(engine, tmp_path):
    """`except KeyError` finds them; a KeyError of Python's own would put its text into quotation marks."""
    (tmp_path / "file").write_text("")
    with pytest.raises(KeyError) as missing:
        engine.agent("nobody").save()
    with pytest.raises(ValueError) as invalid:
        engine.agent("ada").turn("x", max_tokens=0)
    with pytest.raises(OSError) as refused:
        torpor.CachePersistence(tmp_path / "file" / "store").save_agent_cache("ada", [kv_cache()])
    for raised, kind in ((missing, torpor.NotFoundError), (invalid, torpor.InvalidArgumentError),
                         (refused, torpor.IoError)):
        error = raised.value
        assert type(error) is kind and isinstance(error, torpor.Error)
        assert str(error) == error.args[0] and str(error)[-1] == "."
        for again in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
            assert type(again) is kind and str(again) == str(error) and vars(again) == vars(error)
    assert str(tmp_path / "file") in refused.value.path


def test_an_old_prompt_cache_that_can_not_be_read_is_no_damage(tmp_path):
    """It is told apart, though an InvalidArgumentError is a ValueError as well."""
    state = {"0.0": mx.ones((1, 1, 4, 8)), "0.1": mx.ones((1, 1, 4, 8))}
    mx.save_safetensors(str(tmp_path / "old.safetensors"), state,
                        {"0.0": "4", "0.1": "4", "1.model": "m", "2.0": "SomeOtherCache"})
    with pytest.raises(torpor.InvalidArgumentError, match="SomeOtherCache"):
        torpor.load_prompt_cache(tmp_path / "old.safetensors")


def test_engines_agents_and_stores_print_what_they_are(engine, tiny_model, tmp_path):
    stream = engine.agent("ada").stream("x", raw=True, max_tokens=2, seed=7)
    assert repr(engine) == f"<torpor.Engine {str(tiny_model)!r}>" and repr(stream) == "<torpor.TextStream, seed 7>"
    assert repr(engine.agent("ada")) == "<torpor.Agent 'ada'>"
    assert repr(torpor.CachePersistence(tmp_path / "s")) == f"<torpor.CachePersistence {str(tmp_path / 's')!r}>"


def test_a_store_of_caches_can_be_pickled(tmp_path):
    store = torpor.CachePersistence(tmp_path / "store", model={"weights": "v1"}, durability="rename")
    store.save_agent_cache("ada", [kv_cache()])
    other = pickle.loads(pickle.dumps(store))
    assert (other.root, other.list_cached_agents()) == (store.root, store.list_cached_agents())
    other.save_agent_cache("eve", [kv_cache()])
    with pytest.raises(torpor.IncompatibleError):
        torpor.CachePersistence(store.root, model={"weights": "v2"}).load_agent_cache("eve")


@pytest.mark.parametrize("call", [
    lambda engine, store: engine.agent("a").turn("x\ud83d"),
    lambda engine, store: engine.agent("a", "\udc80").turn("x"),
    lambda engine, store: engine.agent("a").turn("x", stop="\udc80"),
    lambda engine, store: engine.agent("a").turn("x", stop=["a", "\udc80"]),
    lambda engine, store: engine.agent("a").turn([{"role": "user", "content": "\udc80"}]),
    lambda engine, store: engine.prompt_tokens("\udc80"),
    lambda engine, store: store.save_agent_cache("a", [kv_cache()], {"k": "\ud800"}),
    lambda engine, store: store.save_agent_cache("a", [kv_cache()], {"\ud800": "k"})],
    ids=["prompt", "system", "stop", "stops", "messages", "counted", "metadata", "key"])
def test_half_of_a_surrogate_pair_is_an_error_of_torpors(engine, tmp_path, call):
    with pytest.raises(torpor.InvalidArgumentError, match="surrogate"):
        call(engine, torpor.CachePersistence(tmp_path / "caches"))


def test_a_model_whose_name_is_not_text_is_an_error_of_torpors(tmp_path):
    with pytest.raises(torpor.InvalidArgumentError, match="surrogate"):
        torpor.Engine(os.fsdecode(b"/nowhere/caf\xe9"), tmp_path / "store")


def test_none_is_as_good_as_left_out(engine):
    plain = engine.agent("ada").turn("x", raw=True)
    none = engine.agent("eve").turn("x", raw=True, special=None, on_divergence=None, tools=None, template_args=None,
                                    save=None, max_tokens=None, temperature=None, top_p=None, seed=None, stop=None)
    assert (plain.text, plain.tokens.generated) == (none.text, none.tokens.generated)


def test_numbers_of_numpy_are_numbers(engine):
    result = engine.agent("ada").turn("x", raw=np.bool_(True), max_tokens=np.int64(2), temperature=np.float32(0.5),
                                      seed=np.uint32(7))
    assert result.tokens.generated == 2 and result.seed == 7


@pytest.mark.parametrize("options", [
    {"max_tokens": 2.0}, {"max_tokens": "2"}, {"max_tokens": 2**40}, {"seed": -1}, {"seed": 2**64}, {"seed": 1.5},
    {"temperature": "0.5"}, {"stop": [None]}], ids=str)
def test_what_is_no_such_number_or_text_is_an_error_of_torpors(engine, options):
    [name] = options
    with pytest.raises(torpor.InvalidArgumentError, match="stop string" if name == "stop" else name):
        engine.agent("ada").turn("x", raw=True, **options)


@pytest.mark.parametrize("name,call", [
    ("id", lambda engine: engine.agent(3)),
    ("id", lambda engine: engine.agent("ada").fork(None)),
    ("at_token", lambda engine: engine.agent("ada").fork("eve", "3")),
    ("n_tokens", lambda engine: engine.agent("ada").rewind(1.5)),
    ("id", lambda engine: engine.agent("ada").rename(b"eve"))])
def test_arguments_of_another_kind_are_an_error_of_torpors(engine, name, call):
    with pytest.raises(torpor.InvalidArgumentError, match=name):
        call(engine)


@pytest.mark.parametrize("settings", [
    {"write_queue": "64MB"}, {"text_queue": -1}, {"max_stall": 2.5}, {"threads": "2"}, {"kv_format": 8},
    {"durability": None}, {"backend": 1}, {"activations": 16}, {"cpu_target": 512}], ids=str)
def test_settings_of_another_kind_are_an_error_of_torpors(tiny_model, tmp_path, settings):
    [name] = settings
    with pytest.raises(torpor.InvalidArgumentError, match=name):
        torpor.Engine(tiny_model, tmp_path / "store", **settings)


def test_token_ids_are_one_flat_list(tmp_path):
    store = torpor.CachePersistence(tmp_path / "store")
    for tokens in (np.array([[1, 2]]), ["a"], [None]):
        with pytest.raises(torpor.InvalidArgumentError, match="flat list"):
            store.save_agent_cache("ada", [kv_cache()], tokens=tokens)


def test_answers_differ_unless_a_seed_is_given(engine):
    chance = {"raw": True, "temperature": 5.0, "max_tokens": 16}  # so hot that no two are alike
    turns = [engine.turn("x", **chance) for _ in range(2)]
    assert turns[0].text != turns[1].text and turns[0].seed != turns[1].seed
    again = engine.turn("x", **chance, seed=turns[0].seed)
    assert again.text == turns[0].text


@pytest.mark.parametrize("given,read", [
    ("64MB", 64_000_000), ("64 MiB", 64 << 20), ("1.5g", 1_500_000_000), (1 << 20, 1 << 20)])
def test_sizes_are_read_as_people_write_them(tiny_model, tmp_path, given, read):
    with torpor.Engine(tiny_model, tmp_path / "store", memory_budget=given) as engine:
        assert engine.memory_usage().budget == read


@pytest.mark.parametrize("given", ["64 parsecs", "", "-1MB", "MB", 1.5, None])
def test_what_is_no_size_is_an_error_of_torpors(tiny_model, tmp_path, given):
    with pytest.raises(torpor.InvalidArgumentError, match="memory_budget"):
        torpor.Engine(tiny_model, tmp_path / "store", memory_budget=given)


@pytest.mark.parametrize("name", ["pc.cache", "blob", "pc.safetensors"])
def test_a_prompt_cache_has_the_name_that_it_is_given(tmp_path, name):
    torpor.save_prompt_cache(tmp_path / name, [kv_cache()], {"model": "m"})
    assert [path.name for path in tmp_path.iterdir()] == [name]
    [cache], metadata = torpor.load_prompt_cache(tmp_path / name)
    assert cache.offset == 5 and metadata == {"model": "m"}


def test_the_size_of_a_hybrid_cache_is_that_of_the_layers_that_count(tmp_path):
    assert torpor.get_cache_size([ArraysCache(2), kv_cache(5)]) == 5
    assert torpor.get_cache_size([kv_cache(3)]) == 3
    assert torpor.get_cache_size([ArraysCache(2)]) == torpor.get_cache_size([]) == 0


def test_an_agent_tells_its_tokens_and_messages_saved_or_not(tiny_model, tmp_path):
    with torpor.Engine(tiny_model, tmp_path / "store") as engine:
        ada = engine.agent("ada", system="Be brief.")
        result = ada.turn("hello", max_tokens=2, save="no")
        said = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"},
                {"role": "assistant", "content": result.text}]
        assert ada.messages == said and len(ada.tokens) == result.tokens.context
        assert ada.tokens[:result.tokens.prompt] == engine.prompt_tokens(said[:2])
        before = ada.tokens
        ada.sleep()
        assert (ada.messages, ada.tokens) == (said, before)  # asleep, from its file
        with pytest.raises(torpor.NotFoundError, match="eve"):
            engine.agent("eve").tokens
    assert torpor.CachePersistence(tmp_path / "store").agent_tokens("ada") == before
