"""`torpor remote`: what is asked of a store of objects, and how one that can't keep agents is refused."""

import os
import subprocess

import pytest

import s3
from conftest import BIN, Result

URL = f"s3://{s3.BUCKET}/some/prefix"


def remote(command, url, *args, env, timeout=120, patience=0.3):
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "GOOGLE_", "AZURE_"))}
    line = [BIN, "remote", command, url, "--timeout", str(patience), *map(str, args)]
    return Result(subprocess.run(line, capture_output=True, timeout=timeout, env={**kept, **env}))


def failing(result):
    return {check["name"] for check in result.json["checks"] if not check["holds"]}


@pytest.fixture(scope="module")
def server():
    with s3.gofakes3() as server:
        yield server


@pytest.fixture
def proxy(server):
    with s3.Proxy(server.port) as proxy:
        yield proxy


def test_a_store_whose_conditional_writes_hold_passes_every_check_and_keeps_nothing(server):
    report = remote("check", URL, "--json", env=server.env()).ok().json
    assert report["url"] == URL and report["holds"]
    assert [check["name"] for check in report["checks"]] == [
        "create", "create-again", "update", "update-stale", "update-absent", "read-after-write", "list-after-write",
        "ranges", "empty", "large", "remove"]
    assert all(check["holds"] and check["found"] == "" for check in report["checks"])
    text = remote("check", URL, env=server.env()).ok()
    assert text.out.count("holds   ") == 11 and text.err == ""
    assert remote("ls", URL, "--json", env=server.env()).ok().json == {"url": URL, "objects": []}


def test_objects_are_listed_below_the_prefix_alone(server, proxy):
    for key in ("some/prefix/b", "some/prefix/a/1", "some/prefix-2/c", "elsewhere"):
        assert proxy.ask("PUT", f"/{s3.BUCKET}/{key}", body=b"12345")[0] == 200
    try:
        objects = remote("ls", URL, "--json", env=server.env()).ok().json["objects"]
        assert [(one["key"], one["bytes"]) for one in objects] == [("a/1", 5), ("b", 5)]
        assert all(one["tag"] and one["modified_ms"] > 1_600_000_000_000 for one in objects)
        assert remote("ls", f"s3://{s3.BUCKET}", env=server.env()).ok().out.count("\n") == 5
    finally:
        for key in ("some/prefix/b", "some/prefix/a/1", "some/prefix-2/c", "elsewhere"):
            proxy.ask("DELETE", f"/{s3.BUCKET}/{key}")


def test_many_writers_at_a_time_have_one_winner_each(server):
    report = remote("check", URL, "--race", 16, "--rounds", 20, "--json", env=server.env()).ok().json
    assert report["holds"] and report["race"] == {
        "writers": 16, "rounds": 20, "without_winner": 0, "with_several_winners": 0, "of_another": 0,
        "lost": 0}


def test_a_store_that_ignores_conditions_is_refused(server, proxy):
    proxy.fault = s3.without_conditions
    result = remote("check", URL, "--json", env=server.env(proxy.port))
    result.fails("invalid", "can't keep agents", answered=True)
    assert not result.json["holds"] and {"create-again", "update-stale", "update-absent"} <= failing(result)
    text = remote("check", URL, env=server.env(proxy.port)).fails("invalid", answered=True)
    assert "FAILS   an object that is there is not created again: here it was replaced" in text.out


def test_a_store_that_knows_no_conditions_is_refused(server, proxy):
    def fault(method, path, headers):
        if {"if-match", "if-none-match"} & {name.lower() for name in headers}:
            return 501, b"<Error><Code>NotImplemented</Code><Message>no conditions here.</Message></Error>"
        return None

    proxy.fault = fault
    remote("check", URL, "--json", env=server.env(proxy.port)).fails("io", "501 NotImplemented: no conditions here")


def test_a_store_that_checks_and_writes_later_is_caught_by_the_race(server, proxy):
    proxy.fault = s3.CheckThenPut()
    proxy.fault.proxy = proxy
    env = server.env(proxy.port)
    assert remote("check", URL, "--json", env=env).ok().json["holds"]  # one writer alone can't tell
    result = remote("check", URL, "--race", 16, "--rounds", 5, "--json", env=env).fails("invalid", answered=True)
    assert result.json["race"]["with_several_winners"] > 0


def test_an_answer_that_is_lost_is_no_winner_too_many(server, proxy):
    """The client sends such a put again, and gets 412 for what it did itself."""
    puts = []
    proxy.lose = lambda method, path: method == "PUT" and (puts.append(path) or len(puts) % 7 == 0)
    report = remote("check", URL, "--race", 8, "--rounds", 10, "--json", env=server.env(proxy.port))
    assert report.json["race"]["with_several_winners"] == 0 and report.json["race"]["of_another"] == 0


SECRETS = {"AWS_ACCESS_KEY_ID": "AKIDHIDDEN0001", "AWS_SECRET_ACCESS_KEY": "hiddenSecretHiddenSecret0002",
           "AWS_SESSION_TOKEN": "hiddenToken0003"}


def hides(result):
    for secret in SECRETS.values():
        assert secret not in result.out + result.err
    return result


def test_credentials_are_in_no_error(server, proxy, tmp_path):
    """Not even where the store repeats them in its answer."""
    told = " and ".join(SECRETS.values())
    for status, word in ((403, "403"), (400, "400"), (503, "503"), (301, "elsewhere")):
        proxy.fault = lambda method, path, headers: (
            status, f"<Error><Code>SomeCode</Code><Message>You sent {told}.</Message></Error>".encode())
        env = {**s3.environment(proxy.port), **SECRETS}
        for command in ("check", "ls"):
            hides(remote(command, URL, "--verbose", env=env).fails("io", word))
    user = f"me:{SECRETS['AWS_SECRET_ACCESS_KEY']}@"
    endpoint = {"AWS_ENDPOINT_URL": f"http://{user}127.0.0.1:1"}
    hides(remote("ls", URL, env={**SECRETS, **endpoint}).fails("invalid", "endpoint"))
    hides(remote("ls", f"s3://{user}{s3.BUCKET}/x", env=server.env()).fails("invalid"))
    closed = s3.free_port()
    hides(remote("ls", URL, "--verbose", env={**s3.environment(closed), **SECRETS}).fails("io", "can't be reached"))


def test_credentials_are_read_from_the_aws_files(server, proxy, tmp_path):
    seen = []
    proxy.fault = lambda method, path, headers: seen.append({k.lower(): v for k, v in headers.items()}["authorization"])
    (tmp_path / "credentials").write_text("[default]\naws_access_key_id = DEFAULTKEY\naws_secret_access_key=x\n"
                                          "[ work ]\naws_access_key_id = WORKKEY\naws_secret_access_key = y\n")
    endpoint = f"http://127.0.0.1:{proxy.port}"
    (tmp_path / "config").write_text(f"[profile work]\nregion = eu-test-3\nendpoint_url = {endpoint}\n"
                                     "[profile sso]\nsso_account_id = 1\n")
    env = {"AWS_CONFIG_FILE": str(tmp_path / "config"), "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "credentials")}
    remote("ls", URL, env={**env, "AWS_PROFILE": "work"}).ok()
    assert "Credential=WORKKEY/" in seen[-1] and "/eu-test-3/" in seen[-1]
    remote("ls", URL, env={**env, "AWS_ENDPOINT_URL": endpoint}).ok()
    assert "Credential=DEFAULTKEY/" in seen[-1]
    remote("ls", URL, env={**env, "AWS_PROFILE": "play"}).fails("invalid", "'play'")
    remote("ls", URL, env={**env, "AWS_PROFILE": "sso"}).fails("invalid", "sso_account_id")


def test_plain_http_is_spoken_only_where_the_endpoint_says_so(server):
    env = server.env()
    env["AWS_ENDPOINT_URL"] = env["AWS_ENDPOINT_URL"].replace("http://", "https://")
    remote("ls", URL, env={**env, "AWS_ALLOW_HTTP": "true"}).fails("io", "can't be reached")


def test_a_url_that_is_none_is_refused(server):
    for url in ("agents", "http://host/agents", "file:///tmp", "s3://", "s3:///x", "s3://agents/x?y", "s3://a b/x",
                "s3://agents/../x", "memory:///"):
        remote("ls", url, env=server.env()).fails("invalid", "s3://BUCKET/PREFIX")
    remote("ls", "s3://absent/x", env=server.env()).fails("not_found", "no such bucket", "NoSuchBucket")


def test_the_command_line_is_checked(server):
    for args in ([], ["check"], ["check", URL, "--rounds", "3"], ["check", URL, "--race", "1"], ["push", URL],
                 ["send", URL]):
        done = subprocess.run([BIN, "remote", *args], capture_output=True, text=True,
                              env={**os.environ, **server.env()})
        assert done.returncode == 2 and done.stderr.count("\n") == 1, args


@pytest.mark.skipif(not s3.is_here("versitygw"), reason="scripts/fetch-sdks versitygw builds it")
def test_versitygw_keeps_agents_and_has_one_winner_of_many_writers(tmp_path):
    with s3.versitygw(tmp_path) as store:
        report = remote("check", URL, "--race", 16, "--rounds", 10, "--json", env=store.env(), patience=10).ok().json
        assert remote("ls", URL, "--json", env=store.env()).ok().json["objects"] == []
    assert len(report["checks"]) == 11 and report["holds"] and report["race"]["rounds"] == 10


@pytest.mark.skipif(not os.environ.get("TORPOR_FLEET"), reason="`make fleet` runs it")
@pytest.mark.parametrize("kind", ["gofakes3", "versitygw"])
def test_64_writers_have_one_winner_in_each_of_1000_rounds(kind, tmp_path):
    with s3.gofakes3() if kind == "gofakes3" else s3.versitygw(tmp_path) as store:
        report = remote("check", URL, "--race", 64, "--rounds", 1000, "--json", env=store.env(), timeout=1200,
                        patience=30).ok().json
    assert report["holds"] and report["race"]["rounds"] == 1000
