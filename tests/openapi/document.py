"""Generate the OpenAPI 3.1 document from what the routes declare and from their types."""

from __future__ import annotations

import ast
import inspect
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from importlib.metadata import version
from typing import Any, Final, TypeAlias, get_args, get_origin, get_type_hints

import msgspec
from starlette.responses import Response

from receiver.http.body import schema_of
from receiver.http.declare import Endpoint, Reply, endpoints, parameters_of
from receiver.http.problems import PREFIX, PROBLEMS, ProblemDetails
from receiver.model.answers import Page
from receiver.model.recipes import METADATA

Json: TypeAlias = dict[str, Any]
Groups: TypeAlias = Mapping[str, Sequence["Row"]]

_REF: Final = "#/components/{}/{}"
_EVERYWHERE: Final = ("internal-error",)
_GUARDED: Final = ("unauthorized", "invalid-request", "rate-limited", "unavailable")
_ACTING: Final = ("read-only",)
USUAL: Final = (*_GUARDED[:1], *_ACTING, *_GUARDED[1:], *_EVERYWHERE)
"""The problems that every route with a key may answer, by status."""
_ABOUT: Final = """\
Submit image and video predictions to Oxen.ai, Eachlabs, fal.ai and others; every outcome is
recorded exactly once and given to your handlers. Errors are problem details (RFC 9457) with a
stable `type`; a path with another method is a 405 of that kind, and one that is not here a 404.
Times are RFC 3339 in UTC.
"""
_HEADERS: Final[dict[str, tuple[str, bool, Json]]] = {
    "Location": (
        "The address of what was made, relative to that of the request.",
        True,
        {"type": "string"},
    ),
    "Preference-Applied": ("The `wait` that was granted.", False, {"type": "string"}),
    "Retry-After": ("Seconds.", True, {"type": "string", "pattern": "^[0-9]+$"}),
    "WWW-Authenticate": ("What proof is wanted.", True, {"type": "string"}),
    "Last-Event-ID": ("The place at which the stream begins.", True, {"type": "string"}),
    "ETag": ("Give it as If-None-Match.", True, {"type": "string"}),
}
"""Response headers: description, whether always present, and schema."""
_ELSEWHERE: Final = {"request", "query", "metadata", "headers", "body"}
"""Parameters of methods that are not part of the path."""
_FREE: Final = (
    "`metadata.NAME=VALUE` wants predictions whose metadata has this; JSON as it is written."
)
NOT_MODIFIED: Final = 304
_TAGS: Final = {
    "Predictions": "Submit, read, cancel and erase predictions, and see what runs for them.",
    "Recipes": "What people, chats and programs order by name, and how.",
    "Deliveries": "One event for one handler each: what is pending, what is done, what is dead.",
    "Events": "The end of every prediction, as a list and live.",
    "Handlers": "The functions that run on events: their state, and how to hold them back.",
    "Replays": "Run handlers again for many events: count first, then start.",
    "Discarded": "What came and reached no handler: duplicates, rejected callbacks and the like.",
    "Costs": "What was spent: by day, provider, model, recipe, API key and metadata.",
    "Callbacks": "Where providers call. Each URL holds a token that is made with its prediction.",
    "Plugins": "Ways in of their own: for chat platforms, triggers and the like.",
    "Health": "For load balancers and Prometheus; no key is needed.",
    "About": "This description, for programs and for people.",
}
"""The purpose of each group of routes."""
_STATUS_HEADERS: Final = {401: "WWW-Authenticate", 429: "Retry-After", 503: "Retry-After"}


class Content(msgspec.Struct, frozen=True):
    """A body: its type, and an example."""

    type: Any
    example: Any = None
    media_type: str = "application/json"
    also: Mapping[str, Any] = {}
    """JSON Schema that it must satisfy in addition to its type."""


class Answer(msgspec.Struct, frozen=True):
    """A successful response of a route; the errors are in `problems`."""

    status: int
    meaning: str
    content: Content | None = None
    headers: Sequence[str] = ()
    """Names that this module describes."""
    has_csv: bool = False
    """Whether it is also available as CSV."""
    leads_to: Sequence[str] = ()
    """Operations that take the `id` of this response, or of the first item of its list."""


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """A method of a path, with its parameters and its responses."""

    method: str
    path: str
    summary: str
    answers: Sequence[Answer]
    problems: Sequence[str] = ()
    detail: str = ""
    names: Mapping[str, Any] = {}
    """The types of the path parameters."""
    query: type[msgspec.Struct] | None = None
    free: str = ""
    """The prefix of further query parameters, which may have any name after it."""
    headers: type[msgspec.Struct] | None = None
    body: tuple[Content, ...] = ()
    """If more than one: any of these forms is accepted."""
    is_open: bool = False
    """Whether it needs no key."""
    is_acting: bool = False
    """Whether it needs a key that may do more than read."""


def rows_of(
    group: Iterable[type], examples: Mapping[Any, Any], also: Mapping[Any, Json]
) -> list[Row]:
    """Return the rows for the routes that these classes declare."""
    declared = [each for kind in group for each in endpoints(kind)]
    by_id = {
        path: _name(given.method, path)
        for given, _ in declared
        if (path := _bare(given.path)).count("{") == 1 and "/{id}" in path
    }
    return [_row(*each, examples, also, by_id) for each in declared]


def _row(
    given: Endpoint,
    method: Callable[..., Any],
    examples: Mapping[Any, Any],
    also: Mapping[Any, Json],
    by_id: Mapping[str, str],
) -> Row:
    kinds = parameters_of(method)
    body = kinds.get("body")
    summary, _, detail = inspect.cleandoc(method.__doc__ or "").partition("\n")
    details = [" ".join(detail.split()), _FREE if "metadata" in kinds else ""]
    return Row(
        method=given.method,
        path=_bare(given.path),
        summary=summary.removesuffix("."),
        answers=[
            _declared(given, status, meaning, get_type_hints(method)["return"], examples, by_id)
            for status, meaning in given.answers.items()
        ],
        problems=given.problems,
        detail=" ".join(filter(None, details)),
        names={name: kind for name, kind in kinds.items() if name not in _ELSEWHERE},
        query=kinds.get("query"),
        free=METADATA if "metadata" in kinds else "",
        headers=kinds.get("headers"),
        body=() if body is None else (Content(body, examples[body], also=also.get(body, {})),),
        is_open=given.is_open,
        is_acting=not given.is_open and (given.method != "GET" or given.is_for_cron),
    )


def _declared(
    given: Endpoint,
    status: int,
    meaning: str,
    kind: Any,
    examples: Mapping[Any, Any],
    by_id: Mapping[str, str],
) -> Answer:
    if status == NOT_MODIFIED:
        return Answer(status, meaning, headers=given.sends)
    if get_origin(kind) is Reply:
        [kind] = get_args(kind)
    if kind is Response:
        kind = Json if given.media_type == "application/json" else str
    item = get_args(kind)[0] if get_origin(kind) is Page else kind
    example = examples.get((item, status), examples.get(item, examples.get(given.media_type)))
    if item is not kind and example is not None:
        example = Page(data=[example], next_cursor=None)
    has_id = "id" in getattr(item, "__struct_fields__", ())
    return Answer(
        status,
        meaning,
        Content(kind, example, given.media_type),
        given.sends,
        has_csv=given.csv is not None,
        leads_to=[name for name in by_id.values() if has_id],
    )


def _bare(path: str) -> str:
    return path.replace(":path", "")


def document(groups: Groups, webhooks: Sequence[Row]) -> Json:
    """Return the document of every route of every group, and of the outgoing webhooks."""
    rows = [row for group in groups.values() for row in group]
    types = _Types([*rows, *webhooks])
    paths: defaultdict[str, Json] = defaultdict(dict)
    for tag, group in groups.items():
        for row in group:
            paths[row.path][row.method.lower()] = {"tags": [tag], **_operation(row, types)}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "prediction receiver",
            "version": version("prediction-receiver"),
            "description": _ABOUT,
            "license": {"name": "MIT", "identifier": "MIT"},
        },
        "servers": [{"url": "."}],  # relative to the URL of this document
        "security": [{"key": []}],
        "tags": [{"name": tag, "description": _TAGS[tag]} for tag in groups],
        "paths": dict(paths),
        "webhooks": {row.path: {"post": _webhook(row, types)} for row in webhooks},
        "components": {
            "schemas": types.schemas,
            "responses": {_joined(kinds): _refusal(kinds) for kinds in _refusals(rows)},
            "headers": {
                name: {"description": says, "required": always, "schema": form}
                for name, (says, always, form) in _HEADERS.items()
            },
            "securitySchemes": {
                "key": {
                    "type": "http",
                    "scheme": "bearer",
                    "description": "One of RECEIVER_API_KEYS.",
                }
            },
        },
    }


def _operation(row: Row, types: _Types) -> Json:
    answers = {str(answer.status): _answer(answer, types) for answer in row.answers}
    refusals = {str(status): _ref("responses", _joined(kinds)) for status, kinds in _by_status(row)}
    return {
        "operationId": _name(row.method, row.path),
        "summary": row.summary,
        **({"description": row.detail} if row.detail else {}),
        **({"security": []} if row.is_open else {}),
        "parameters": list(_parameters(row)),
        **_body(row.body, types),
        "responses": dict(sorted((answers | refusals).items())),
    }


def _webhook(row: Row, types: _Types) -> Json:
    """Return the description of one outgoing event."""
    described = _operation(row, types)
    described["operationId"] = _name("on", row.path)
    described["responses"] = {str(a.status): {"description": a.meaning} for a in row.answers}
    return described


def _parameters(row: Row) -> Iterator[Json]:
    for name, kind in row.names.items():
        schema = msgspec.json.schema(kind)
        yield {"name": name, "in": "path", "required": True, **_described(schema)}
    for place, kind in (("query", row.query), ("header", row.headers)):
        if kind is None:
            continue
        schema = _documented(kind, schema_of(kind))
        for name, field in schema["properties"].items():
            required = name in schema["required"]
            yield {"name": name, "in": place, "required": required, **_described(field)}
    if row.free:
        names = f"^{re.escape(row.free)}"
        yield {
            "name": row.free.rstrip("."),
            "in": "query",
            "required": False,
            "description": f"Any number of parameters whose names begin with `{row.free}`.",
            "style": "form",
            "explode": True,
            "schema": {
                "type": "object",
                "patternProperties": {names: {"type": "string"}},
                "additionalProperties": False,
            },
        }


def _described(schema: Json) -> Json:
    """Move a schema's description and examples to the parameter, where readers look for them."""
    schema = dict(schema)
    examples = schema.pop("examples", [])
    said = {"description": schema.pop("description")} if "description" in schema else {}
    return {**said, "schema": schema, **({"example": examples[0]} if examples else {})}


def _body(contents: Sequence[Content], types: _Types) -> Json:
    if not contents:
        return {}
    return {"requestBody": {"required": True, "content": _content(contents, types)}}


def _content(contents: Sequence[Content], types: _Types) -> Json:
    forms: defaultdict[str, list[Content]] = defaultdict(list)
    for content in contents:
        forms[content.media_type].append(content)
    return {
        media_type: {
            "schema": (
                {**types[several[0].type], **several[0].also}
                if len(several) == 1
                else {"anyOf": [types[content.type] for content in several]}
            ),
            "examples": {
                _type_name(content.type): {"value": msgspec.to_builtins(content.example)}
                for content in several
                if content.example is not None
            },
        }
        for media_type, several in forms.items()
    }


def _answer(answer: Answer, types: _Types) -> Json:
    csv = {"text/csv": {"schema": {"type": "string"}}} if answer.has_csv else {}
    return {
        "description": answer.meaning,
        **_headers(answer.headers),
        **({"content": _content([answer.content], types) | csv} if answer.content else {}),
        **_links(answer),
    }


def _links(answer: Answer) -> Json:
    listed = answer.content is not None and get_origin(answer.content.type) is Page
    found = "$response.body#/data/0/id" if listed else "$response.body#/id"
    links = {name: {"operationId": name, "parameters": {"id": found}} for name in answer.leads_to}
    return {"links": links} if links else {}


def _headers(names: Iterable[str]) -> Json:
    headers = {name: _ref("headers", name) for name in names}
    return {"headers": headers} if headers else {}


# --- problems ---


def _by_status(row: Row) -> list[tuple[int, tuple[str, ...]]]:
    """Return the problems of a route, grouped by status."""
    statuses: defaultdict[int, set[str]] = defaultdict(set)
    guarded = () if row.is_open else _GUARDED
    for kind in (*row.problems, *_EVERYWHERE, *guarded, *(_ACTING if row.is_acting else ())):
        statuses[PROBLEMS[kind][0]].add(kind)
    return [(status, tuple(sorted(kinds))) for status, kinds in sorted(statuses.items())]


def _refusals(rows: Iterable[Row]) -> list[tuple[str, ...]]:
    return sorted({kinds for row in rows for _, kinds in _by_status(row)})


def _refusal(kinds: Sequence[str]) -> Json:
    status = PROBLEMS[kinds[0]][0]
    header = _STATUS_HEADERS.get(status)
    types = [PREFIX + kind for kind in kinds]
    narrowed = {"type": {"enum": types}, "status": {"const": status}}
    return {
        "description": "; ".join(f"`{kind}`: {PROBLEMS[kind][1]}" for kind in kinds),
        **_headers([header] if header else []),
        "content": {
            "application/problem+json": {
                "schema": {**_ref("schemas", ProblemDetails.__name__), "properties": narrowed}
            }
        },
    }


# --- types ---


class _Types:
    """The schemas of all types that rows use, by type."""

    def __init__(self, rows: Sequence[Row]) -> None:
        said = [answer.content.type for row in rows for answer in row.answers if answer.content]
        taken = [content.type for row in rows for content in row.body]
        self._kinds = list(dict.fromkeys([ProblemDetails, *said, *taken]))
        refs, schemas = msgspec.json.schema_components(
            self._kinds, ref_template=_REF.format("schemas", "{name}")
        )
        self._refs = refs
        known = {_component(kind): kind for kind in _structs(self._kinds)}
        self.schemas: Json = {
            name: _documented(known[name], schema, whole=known[name] not in taken)
            if name in known
            else schema
            for name, schema in schemas.items()
        }

    def __getitem__(self, kind: Any) -> Json:
        return dict(self._refs[self._kinds.index(kind)])


def _documented(kind: Any, schema: Json, *, whole: bool = False) -> Json:
    """Add the docstrings of the fields; `whole`: the receiver sends it with every field present."""
    struct = get_origin(kind) or kind
    fields = {field.name: field for field in msgspec.structs.fields(struct)}
    words: dict[str, str] = {}
    for parent in reversed(struct.__mro__):
        words |= _words(parent.__module__).get(parent.__name__, {})
    properties: Json = {}
    for name, field in fields.items():
        described = dict(schema["properties"][field.encode_name])
        if whole:
            described.pop("default", None)
        if datetime in (field.type, *get_args(field.type)):
            optional = type(None) in get_args(field.type)
            described = {"anyOf": [_DATED, {"type": "null"}]} if optional else _DATED
        if name in words:
            described = {"description": words[name], **described}
        properties[field.encode_name] = described
    if whole and not struct.__struct_config__.omit_defaults:
        schema = {**schema, "required": list(properties)}
    return {**schema, "properties": properties}


_DATED: Final = {"type": "string", "format": "date-time"}
_seen: Final[dict[str, dict[str, dict[str, str]]]] = {}


def _words(module: str) -> dict[str, dict[str, str]]:
    """Read the docstrings of fields from the source of a module, as the interpreter drops them."""
    if module not in _seen:
        try:
            tree = ast.parse(inspect.getsource(sys.modules[module]))
        except (OSError, TypeError):
            tree = ast.parse("")
        classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
        _seen[module] = {node.name: dict(_attribute_docs(node)) for node in classes}
    return _seen[module]


def _attribute_docs(node: ast.ClassDef) -> Iterator[tuple[str, str]]:
    for field, below in zip(node.body, node.body[1:], strict=False):
        match field, below:
            case (
                ast.AnnAssign(target=ast.Name(id=name)),
                ast.Expr(value=ast.Constant(value=str(text))),
            ):
                yield name, re.sub(r"\bNone\b", "null", inspect.cleandoc(text))


def _structs(kinds: Iterable[Any]) -> set[Any]:
    """Return every struct that these types contain."""
    found: set[Any] = set()
    left = list(kinds)
    while left:
        kind = left.pop()
        left.extend(get_args(kind))
        struct = get_origin(kind) or kind
        if isinstance(struct, type) and issubclass(struct, msgspec.Struct) and kind not in found:
            found.add(kind)
            left.extend(field.type for field in msgspec.structs.fields(kind))
    return found


def _component(kind: Any) -> str:
    """Name a type as msgspec does: Found[Prediction] is Found_Prediction_."""
    return re.sub(r"[^\w.-]", "_", _type_name(kind))


def _type_name(kind: Any) -> str:
    inner = ", ".join(_type_name(part) for part in get_args(kind))
    name = getattr(get_origin(kind) or kind, "__name__", str(kind))
    return f"{name}[{inner}]" if inner else name


def _name(method: str, path: str) -> str:
    words = re.findall(r"[a-z]+", path.replace("/v1/", "/"))
    return method.lower() + "".join(word.title() for word in words)


def _joined(kinds: Sequence[str]) -> str:
    return "_".join(kinds)


def _ref(part: str, name: str) -> Json:
    return {"$ref": _REF.format(part, name)}
