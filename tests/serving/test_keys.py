"""API keys: who may ask what, keys that change while the server runs, and that no key is ever told."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
from contextlib import ExitStack
from pathlib import Path

import pytest
from asking import Client

from deployments.engine.catalogue import Catalogue
from deployments.errors import Forbidden, Unauthorized
from deployments.http.exposition import build_metrics_app
from deployments.http.headers import STRICT, SafeHeaders, page_policy
from deployments.http.ingress import build_http_app
from deployments.keys import Keys, KeySettings, parse_file, parse_variable
from deployments.watch.watch import Watch
from guard.errors import BadSetting

ASK, SCORES, ADMIN = "ask-0123456789abcdef", "scores-0123456789abcdef", "admin-0123456789abcdef"
FILE = f"""# who asks
inference {ASK}

scores sha256:{hashlib.sha256(SCORES.encode()).hexdigest()}
   administration\t{ADMIN}
"""
INFER = "/v2/models/hand/infer"
BODY = {"inputs": [{"name": "images", "shape": [1, 3, 4, 4], "datatype": "FP32", "data": [0.5] * 48}]}


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def keys() -> Keys:
    return Keys(parse_file(FILE, "keys"))


def write(path: Path, text: str, mode: int = 0o600) -> Path:
    path.write_text(text)
    path.chmod(mode)
    return path


def test_a_role_has_what_it_implies() -> None:
    """Inference is the least, administration everything; a hashed key is as good as a plain one."""
    given = keys()
    assert given.roles(f"Bearer {ASK}", None) == {"inference"}
    assert given.roles(None, SCORES) == {"inference", "scores"}
    assert given.roles(f"bearer  {ADMIN} ", None) == {"inference", "scores", "administration"}
    with pytest.raises(Forbidden, match="administration"):
        given.require("administration", None, SCORES)


def test_without_keys_the_server_is_open_and_the_setting_decides_on_scores() -> None:
    assert Keys().require("administration", None, None) == {"inference", "administration"}
    assert not Keys().required


@pytest.mark.parametrize(
    ("authorization", "api_key"),
    [
        (None, None),
        ("", ""),
        ("Bearer", None),
        (f"Basic {ASK}", None),
        (ASK, None),
        (f"Bearer {ASK}x", None),
        (f"Bearer {hashlib.sha256(ASK.encode()).hexdigest()}", None),
        ("Bearer é\u20ac", None),
        (f"Bearer {ASK}", "another-0123456789"),
    ],
)
def test_no_key_or_an_unknown_one_is_refused(authorization, api_key) -> None:
    """A digest is no key, and X-API-Key counts where both are given."""
    with pytest.raises(Unauthorized) as refused:
        keys().roles(authorization, api_key)
    assert ASK not in str(refused.value)


def test_x_api_key_counts_beside_another_authorization() -> None:
    """A gateway in front may have an Authorization of its own."""
    assert "inference" in keys().roles("Bearer token-of-a-gateway", ASK)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "no key"),
        ("# nothing", "no key"),
        ("root secret-0123456789abcdef", "line 1: expected a role"),
        ("secret-0123456789abcdef inference", "line 1: expected a role"),
        (f"inference {ASK}\nscores", "line 2: expected a key"),
        ("inference secret", "line 1: expected a key of 16"),
        ("inference secret 0123456789abcdef", "line 1"),
        ("inference sécret-0123456789abcdef", "line 1"),
        ("inference sha256:secret", "64 hexadecimal"),
    ],
)
def test_a_bad_line_is_named_and_not_repeated(text: str, named: str) -> None:
    with pytest.raises(BadSetting, match=named) as refused:
        parse_file(text, "keys.txt")
    assert "secret" not in str(refused.value)
    assert "sécret" not in str(refused.value)


def test_the_environment_holds_keys_too() -> None:
    """Plain and hashed; set and empty is a mistake, not an open server; off means not looked at."""
    digest = hashlib.sha256(SCORES.encode()).hexdigest()
    text = f"inference:{ASK}, scores:sha256:{digest},"
    assert Keys(parse_variable(text)).roles(None, SCORES) == {"inference", "scores"}
    assert Keys.from_settings(KeySettings(), {"GUARD_API_KEYS": text}).required
    assert not Keys.from_settings(KeySettings(), {}).required
    assert not Keys.from_settings(KeySettings(environment=False), {"GUARD_API_KEYS": text}).required
    with pytest.raises(BadSetting, match="GUARD_API_KEYS"):
        Keys.from_settings(KeySettings(), {"GUARD_API_KEYS": " "})


def test_a_changed_file_counts_within_a_second(tmp_path, caplog) -> None:
    """In place or by a rename; the old key is out, the fixed one stays."""
    caplog.set_level(logging.INFO)
    clock, path = Clock(), write(tmp_path / "keys", f"inference {ASK}")
    given = Keys(parse_variable(f"administration:{ADMIN}"), path, clock=clock)
    os.replace(write(tmp_path / "new", f"scores {SCORES}"), path)
    assert given.roles(None, ASK)
    clock.now = 1.0
    assert given.roles(None, SCORES)
    assert given.roles(None, ADMIN)
    with pytest.raises(Unauthorized):
        given.roles(None, ASK)
    assert SCORES not in caplog.text
    assert "1 keys" in caplog.text


@pytest.mark.parametrize("broken", [b"", b"inference secret", b"\xff\xfe secret", None])
def test_a_broken_new_file_leaves_the_old_keys(tmp_path, caplog, broken) -> None:
    """It is logged once, without its content; the next good one counts."""
    clock, path = Clock(), write(tmp_path / "keys", f"inference {ASK}")
    given = Keys((), path, clock=clock)
    path.write_bytes(broken) if broken is not None else path.unlink()
    for clock.now in (1.0, 2.0, 3.0):
        assert given.roles(None, ASK) == {"inference"}
    errors = [one for one in caplog.records if one.levelno == logging.ERROR]
    assert len(errors) == 1
    assert "secret" not in caplog.text
    write(path, f"scores {SCORES}")
    clock.now = 4.0
    assert given.roles(None, SCORES)


def test_a_file_that_is_not_there_at_start_is_refused(tmp_path) -> None:
    with pytest.raises(BadSetting, match="nothing"):
        Keys.from_settings(KeySettings(file=tmp_path / "nothing"), {})


@pytest.mark.parametrize(("mode", "warned"), [(0o600, False), (0o640, True), (0o604, True)])
def test_a_file_that_others_may_read_is_warned_of(tmp_path, caplog, mode: int, warned: bool) -> None:
    Keys((), write(tmp_path / "keys", FILE, mode))
    assert ("chmod 600" in caplog.text) == warned


def test_nothing_shows_a_key(tmp_path) -> None:
    """Neither plain nor as digest, in no repr."""
    given = Keys.from_settings(KeySettings(file=write(tmp_path / "keys", FILE)), {"GUARD_API_KEYS": f"scores:{SCORES}"})
    shown = repr(given) + repr(given._current()) + repr(vars(given)) + repr(KeySettings(file=tmp_path / "keys"))
    for key in (ASK, SCORES, ADMIN):
        digest = hashlib.sha256(key.encode())
        assert key not in shown
        assert digest.hexdigest() not in shown
        assert repr(digest.digest()) not in shown


@pytest.fixture
def server(make_classifier):
    """Asks a server with keys; keywords are settings of its model."""
    with ExitStack() as opened:

        def make(**settings) -> Client:
            app = build_http_app(Catalogue([make_classifier(**settings)]), "9.9", keys())
            return opened.enter_context(Client(app))

        yield make


def test_every_route_but_health_takes_a_key(server) -> None:
    """Refused at once, as JSON, with WWW-Authenticate; the body is not looked at, and probes go without."""
    client = server()
    for method, path in (("GET", "/v2"), ("GET", "/v2/models/hand"), ("POST", INFER), ("POST", "/classify")):
        for headers in ({}, {"authorization": "Bearer nobody"}):
            answer = client.request(method, path, headers=headers, content=b"{" if method == "POST" else None)
            assert answer.status_code == 401, path
            assert answer.headers["www-authenticate"] == "Bearer"
            assert answer.json()["field"] == "authorization"
    for path in ("/v2/health/live", "/v2/health/ready", "/v2/models/hand/ready", "/v2/models/hand/versions/1/ready"):
        assert client.get(path).status_code == 200, path


def test_readiness_does_not_tell_models_to_strangers(server) -> None:
    answer = server().get("/v2/models/x/ready")
    assert answer.status_code == 404
    assert "hand" not in answer.text


def test_a_refused_request_is_none_of_the_guard(server, count) -> None:
    assert server().post(INFER, json=BODY).status_code == 401
    assert count("guard_requests_total", mode="flag", verdict="error") in (None, 0)


def test_the_body_of_a_stranger_is_not_read(make_classifier) -> None:
    """The answer comes although no byte of the body ever does."""
    app = build_http_app(Catalogue([make_classifier()]), "9.9", keys())
    sent = []

    async def receive():
        raise AssertionError("the body was read")

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": INFER, "raw_path": INFER.encode(), "query_string": b""}
    asyncio.run(app({**scope, "headers": [(b"content-length", b"999")], "http_version": "1.1"}, receive, send))
    assert sent[0]["status"] == 401


@pytest.mark.parametrize(
    ("mode", "key", "carries"),
    [
        ("flag", ASK, False),
        ("flag", SCORES, True),
        ("flag", ADMIN, True),
        ("correct", SCORES, True),
        ("observe", SCORES, False),
    ],
)
def test_scores_go_to_the_key_of_the_role(server, mode: str, key: str, carries: bool) -> None:
    """For this request alone, whatever expose_scores says, and never in observe."""
    client = server(mode=mode)

    def outputs(key: str) -> set[str]:
        answer = client.post(INFER, json=BODY, headers={"x-api-key": key})
        return {one["name"] for one in answer.json()["outputs"]}

    assert ({"score", "p_value"} <= outputs(key)) == carries
    assert "score" not in outputs(ASK)


def test_the_facts_of_the_artifact_are_for_administration(server, make_classifier) -> None:
    """The mode is told to all who may ask: answers say it anyway. Without keys all facts are told, as ever."""
    client = server()

    def facts(key: str) -> set[str]:
        return set(client.get("/v2/models/hand", headers={"x-api-key": key}).json()["parameters"])

    assert facts(ASK) == facts(SCORES) == {"guard_classes", "guard_mode"}
    assert {"guard_threshold", "guard_fingerprint", "guard_method"} <= facts(ADMIN)


def test_metrics_are_for_administration(tmp_path) -> None:
    """401 without a key, 403 with a lesser one; open without keys."""
    with Client(build_metrics_app(Watch(tmp_path), keys())) as client:
        assert client.get("/metrics").status_code == 401
        assert client.get("/metrics", headers={"x-api-key": SCORES}).status_code == 403
        assert client.get("/metrics", headers={"authorization": f"Bearer {ADMIN}"}).status_code == 200
    with Client(build_metrics_app(Watch(tmp_path))) as client:
        assert client.get("/metrics").status_code == 200


def test_metrics_have_two_paths(tmp_path) -> None:
    """The text format and the page's JSON; nothing else is there, and nothing is posted."""
    with Client(build_metrics_app(Watch(tmp_path))) as client:
        assert client.get("/metrics").headers["content-type"].startswith("text/plain")
        assert client.get("/metrics/state").json()["models"] == []
        assert client.get("/metrics/other").status_code == 404
        assert client.post("/metrics").status_code == 405


def test_every_answer_is_safe_to_hold(server) -> None:
    """Errors of ours and of the router included."""
    client = server()
    for path in ("/v2", "/v2/health/live", "/nowhere", INFER):
        headers = client.get(path, headers={"x-api-key": ASK}).headers
        assert (headers["x-content-type-options"], headers["cache-control"]) == ("nosniff", "no-store"), path
        assert "content-security-policy" not in headers


@pytest.mark.parametrize("own", [None, page_policy("abc=")])
def test_a_page_may_load_and_run_nothing(own: str | None) -> None:
    """A page that says nothing itself gets the strictest policy; one with a style sheet names its digest."""

    async def page(_scope, _receive, send) -> None:
        headers = [(b"content-type", b"text/html; charset=utf-8")]
        if own:
            headers.append((b"content-security-policy", own.encode()))
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"<p>"})

    with Client(SafeHeaders(page)) as client:
        headers = client.get("/").headers
    assert headers.get_list("content-security-policy") == [own or STRICT]
    assert STRICT in headers["content-security-policy"]
    assert (headers["referrer-policy"], headers["x-frame-options"]) == ("no-referrer", "DENY")
