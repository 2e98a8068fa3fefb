"""HTTP and gRPC: every route and method, from the OpenAPI document of a server of one model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from deployments.config import Limits
from deployments.grpc.messages import MESSAGES, SERVICE
from deployments.grpc.service import CODES
from deployments.http.openapi import ERRORS, document
from deployments.http.schemas import Offer
from deployments.protocol.bodies import Model
from guard.types import InputSpec
from making.markdown import anchor, code, kind_of, link, sections, sentence, table


def page() -> str:
    """Every route and method, from the OpenAPI document of a server of one model."""
    model = Model("{name}", "1", InputSpec(3, 224, 224), ("cat", "dog"))
    bare, keyed, upstream = (
        document([Offer(model, Limits(), upstream=away)], "0", secured=secured)
        for away, secured in ((False, False), (False, True), (True, False))
    )
    told = [(f"{method.upper()} {path}", method, path) for path, item in bare["paths"].items() for method in item]
    rows = []
    seen: list[str] = []
    for title, method, path in told:
        plain, *others = (doc["paths"][path][method] for doc in (bare, keyed, upstream))
        more = [sorted(one["responses"].keys() - plain["responses"].keys()) for one in others]
        roles = [role for scheme in others[0]["security"] for role in scheme.get("bearer", ())]
        statuses = (sorted(plain["responses"]), *more)
        again = f"-{seen.count(anchor(title))}" if anchor(title) in seen else ""  # as GitHub counts
        seen.append(anchor(title))
        rows.append(
            [
                f"[`{title}`](#{anchor(title)}{again})",
                plain["summary"],
                *(roles[:1] or [""]),
                *map(", ".join, statuses),
            ]
        )
    schemas = bare["components"]["schemas"]
    return sections(
        "# HTTP and gRPC",
        "The routes of a server, from its own OpenAPI document (`GET /openapi.json`, to be read at `/v2/docs`). "
        "What they mean: [the endpoint](../endpoint.md).",
        "## Routes",
        table(("route", "what", "role of the key", "statuses", "with keys also", "with an upstream also"), rows),
        "*Role*: where the server has [keys](../endpoint.md#api-keys); empty: none is needed.",
        *(_operation(title, bare["paths"][path][method]) for title, method, path in told),
        "## Errors",
        "Each is JSON: `error`, a sentence, and `field`, what is meant, or null. gRPC has the same sentences.",
        table(
            ("status", "gRPC", "what", "for example"),
            (
                [str(status), CODES[status].name, text, code(error)]
                for status, (_, text, error, _field) in ERRORS.items()
            ),
        ),
        "## Bodies",
        "Those with sizes are of a model that takes images of 3×224×224; `{name}` stands for its name.",
        *(_schema(name, schema) for name, schema in schemas.items()),
        "## gRPC",
        f"`{SERVICE}`, where the settings have [`grpc`](configuration.md#serveconfig). All methods are unary.",
        table(("method", "request", "response"), _methods()),
        "```proto\n" + "\n".join(_message(name, fields) for name, fields in MESSAGES.items()) + "\n```",
    )


def _operation(title: str, one: Mapping[str, Any]) -> str:
    parameters = [
        [code(each["name"]), each["in"], "yes" if each["required"] else "", each["description"]]
        for each in one.get("parameters", ())
    ]
    bodies = [
        f"{code(media)} {_linked(content['schema'])}".strip()
        for media, content in one.get("requestBody", {}).get("content", {}).items()
    ]
    answers = []
    for status, answer in one["responses"].items():
        content = answer.get("content", {})
        if content:
            media = ", ".join(f"{code(name)} {_linked(each['schema'])}".strip() for name, each in content.items())
            answers.append([status, media, answer["description"]])
    return sections(
        f"### {title}",
        f"{sentence(one['summary'])} {one.get('description', '')}".strip(),
        table(("parameter", "in", "required", "what"), parameters) if parameters else "",
        f"Body: {'; '.join(bodies)}." if bodies else "",
        table(("status", "body", "what"), answers) if answers else "",
    )


def _linked(schema: Mapping[str, Any]) -> str:
    """A schema in words, names of others as links."""
    if "$ref" in schema:
        return link(schema["$ref"].rpartition("/")[2])
    for choice in ("anyOf", "oneOf"):
        if choice in schema:
            return " or ".join(dict.fromkeys(_linked(one) for one in schema[choice]))
    if schema.get("type") == "array" and isinstance(schema.get("items"), dict):
        return f"list of {_linked(schema['items'])}"
    if isinstance(schema.get("type"), list):
        return " or ".join({"null": "null"}.get(one, kind_of({"type": one})) for one in schema["type"])
    if schema.get("type") == "object" and schema.get("properties"):
        return f"object ({', '.join(map(code, schema['properties']))})"
    return kind_of(schema) if schema else ""


def _schema(name: str, schema: Mapping[str, Any]) -> str:
    title, about = f"### {name}", schema.get("description", "")
    if schema.get("type") == "array" and "properties" in schema["items"]:
        schema, about = schema["items"], "A list of these."
    if "properties" not in schema:
        return sections(title, sentence(_linked(schema)), about)
    rows = [
        [code(key), _linked(one), "yes" if key in schema.get("required", ()) else "", one.get("description", "")]
        for key, one in schema["properties"].items()
    ]
    return sections(title, about, table(("key", "kind", "required", "what"), rows))


def _methods() -> Iterator[list[str]]:
    for name in MESSAGES:
        if name.endswith("Request"):
            answer = name.removesuffix("Request") + "Response"
            yield [code(name.removesuffix("Request")), code(name), code(answer)]


def _message(name: str, fields: Sequence[str]) -> str:
    return f"message {name} {{" + "".join(f"\n  {field};" for field in fields) + "\n" * bool(fields) + "}"
