"""The OpenAPI document: whole, true of its server's routes and models, readable with nothing from elsewhere."""

from __future__ import annotations

import base64
import hashlib
import re
from html.parser import HTMLParser

import jsonschema
import pytest
import schemathesis
from asking import Client
from hand import HandGuard, HandSuspicion

from deployments.config import Limits
from deployments.engine.catalogue import Catalogue
from deployments.http.ingress import build_http_app
from deployments.http.openapi import document
from deployments.http.pages import page, policy
from deployments.http.schemas import Offer
from deployments.keys import Keys, parse_variable
from deployments.protocol.bodies import Model
from guard.types import InputSpec

KEY = "ask-0123456789abcdef"
OF_ANOTHER_APP = {("GET", "/metrics")}
SMALL = Offer(Model("hand", "1", InputSpec(3, 4, 4), ("ant", "bee", "cat")), Limits(images=3))
GREY = Offer(Model("digits", "2", InputSpec(1, 28, 28), ("0", "1")), Limits())


def operations(told: dict) -> dict[tuple[str, str], dict]:
    return {(method.upper(), path): one for path, item in told["paths"].items() for method, one in item.items()}


def validator(told: dict, name: str) -> jsonschema.Draft202012Validator:
    """Of one schema of the document. Its patterns are of ECMA 262, which Python's are not quite."""
    schema = {"$ref": f"#/components/schemas/{name}", "components": told["components"]}
    return jsonschema.validators.extend(jsonschema.Draft202012Validator, {"pattern": None})(schema)


@pytest.fixture
def app(make_classifier):
    return build_http_app(Catalogue([make_classifier()]), "9.9")


def test_every_route_is_in_the_document_and_no_other(app) -> None:
    with Client(app) as client:
        told = client.get("/openapi.json").json()
    routes = {(method, route.path) for route in app.routes for method in route.methods - {"HEAD"}}
    assert set(operations(told)) == routes | OF_ANOTHER_APP
    names = [one["operationId"] for one in operations(told).values()]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("secured", [True, False])
@pytest.mark.parametrize("offers", [[], [SMALL], [SMALL, GREY], [SMALL._replace(upstream=True)]])
def test_the_document_is_openapi(offers, secured: bool) -> None:
    """It fits OpenAPI's own schema, all its references lead somewhere, and all that it defines is used."""
    told = document(offers, "9.9", secured=secured)
    schemathesis.openapi.from_dict(told).validate()
    text = str(told)
    for kind in ("schemas", "responses"):
        used = set(re.findall(rf"#/components/{kind}/([\w.-]+)", text))
        assert used <= set(told["components"][kind])
        if offers and kind == "schemas":
            assert used == set(told["components"][kind])


@pytest.mark.parametrize("offers", [[SMALL], [SMALL, GREY]])
def test_the_document_tells_of_the_models(offers) -> None:
    """Names as choices, and the input shape of each."""
    told = document(offers, "9.9", secured=False)
    (name, *_) = operations(told)["POST", "/v2/models/{name}/infer"]["parameters"]
    assert name["schema"]["enum"] == [offer.model.name for offer in offers]
    for offer in offers:
        channels, height, width = offer.model.spec.shape
        tensor = {"name": "images", "shape": [1, channels, height, width], "datatype": "UINT8"}
        right = {"inputs": [tensor | {"data": [7] * (channels * height * width)}]}
        check = validator(told, "InferRequest")
        assert check.is_valid(right)
        assert not check.is_valid({"inputs": [tensor | {"shape": [1, channels, height, width + 1]}]})
    (model,) = operations(told)["POST", "/classify"]["parameters"]
    assert model["required"] == (len(offers) > 1)


def test_keys_are_told_where_they_are_required() -> None:
    """By role, on all routes but health and the page, which holds nothing; 401 and 403 are answers only where they can
    be."""
    told = operations(document([SMALL], "9.9", secured=True))
    for (_, path), one in told.items():
        free = re.search("/(live|ready|guard/?)$", path)
        role = None if free else "administration" if path == "/metrics" else "inference"
        assert one["security"] == ([{"bearer": [role]}, {"header": [role]}] if role else []), path
        assert ("401" in one["responses"], "403" in one["responses"]) == (bool(role), role == "administration"), path
    text = str(document([SMALL], "9.9", secured=False))
    assert "'401'" not in text
    assert "securitySchemes" not in text


def test_errors_of_an_upstream_are_told_where_there_is_one() -> None:
    for upstream in (True, False):
        told = operations(document([SMALL._replace(upstream=upstream)], "9.9", secured=False))
        answers = told["POST", "/classify"]["responses"]
        assert ({"401", "403", "502", "504"} <= set(answers)) == upstream


@pytest.mark.parametrize("guard", [HandGuard(), HandSuspicion()])
@pytest.mark.parametrize("mode", ["observe", "flag", "reject", "correct"])
def test_the_examples_are_right_and_so_are_their_answers(make_classifier, guard, mode: str) -> None:
    """Every example of a request fits its schema and is answered, as its route's schema says."""
    with Client(build_http_app(Catalogue([make_classifier(guard, mode=mode, expose_scores=True)]), "9.9")) as client:
        told = client.get("/openapi.json").json()
        asked = 0
        for (method, path), one in operations(told).items():
            for media, body in one.get("requestBody", {}).get("content", {}).items():
                if "example" not in body:
                    continue
                assert not [*validator(told, body["schema"]["$ref"].rpartition("/")[2]).iter_errors(body["example"])]
                answer = client.request(method, path.format(name="hand", version="1"), json=body["example"])
                assert answer.status_code == 200, answer.text
                schema = one["responses"]["200"]["content"][media]["schema"]["$ref"].rpartition("/")[2]
                assert not [*validator(told, schema).iter_errors(answer.json())], path
                asked += 1
    assert asked == 4


def test_a_large_image_is_no_example() -> None:
    """Hundreds of numbers would bury the document; an image file of one pixel does instead."""
    told = operations(document([GREY], "9.9", secured=False))
    assert "example" not in told["POST", "/v2/models/{name}/infer"]["requestBody"]["content"]["application/json"]
    assert "example" in told["POST", "/v1/models/{name}:predict"]["requestBody"]["content"]["application/json"]


class Page(HTMLParser):
    """What a browser would load or run, and the style sheet."""

    def __init__(self) -> None:
        super().__init__()
        self.wanted: list[str] = []
        self.styles: list[str] = []
        self._in_style = False

    def handle_starttag(self, tag, attributes) -> None:
        self._in_style = tag == "style"
        for name, value in attributes:
            if name in ("src", "style", "srcset", "action", "data") or name.startswith("on"):
                self.wanted.append(f"{tag} {name}")
            if name == "href" and not value.startswith(("#", "/")):
                self.wanted.append(f"{tag} {value}")
        if tag in ("script", "link", "img", "iframe", "object", "form", "base"):
            self.wanted.append(tag)

    def handle_endtag(self, _tag) -> None:
        self._in_style = False

    def handle_data(self, data) -> None:
        if self._in_style:
            self.styles.append(data)


def test_the_page_works_under_its_policy(app) -> None:
    """It shows every route, loads and runs nothing, and its style sheet is the one that the policy allows."""
    with Client(app) as client:
        answer = client.get("/v2/docs")
        told = client.get("/openapi.json").json()
    assert answer.headers["content-type"].startswith("text/html")
    assert answer.headers.get_list("content-security-policy") == [policy()]
    assert (answer.headers["x-frame-options"], answer.headers["x-content-type-options"]) == ("DENY", "nosniff")
    for _, path in operations(told):
        assert f"<code>{path}</code>" in answer.text, path
    seen = Page()
    seen.feed(answer.text)
    (style,) = seen.styles
    assert f"'sha256-{base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()}'" in policy()
    assert not seen.wanted
    for name in re.findall(r'href="#([^"]+)"', answer.text):
        assert f'id="{name}"' in answer.text


def test_a_name_cannot_break_the_page() -> None:
    """Names of models are checked where they are set; the page does not rely on it."""
    told = document([SMALL._replace(model=SMALL.model._replace(name="<script>x</script>"))], "9.9", secured=True)
    assert "<script" not in page(told)


def test_the_document_takes_a_key_where_there_are_keys(make_classifier) -> None:
    """It tells names and shapes of models."""
    app = build_http_app(Catalogue([make_classifier()]), "9.9", Keys(parse_variable(f"inference:{KEY}")))
    with Client(app) as client:
        for path in ("/openapi.json", "/v2/docs"):
            assert client.get(path).status_code == 401
            assert client.get(path, headers={"x-api-key": KEY}).status_code == 200
