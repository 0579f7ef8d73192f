"""The page at `/docs`: the OpenAPI document for people, without script and without strangers."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable
from html import escape
from typing import Any, Final, TypeAlias

from tests.openapi.document import Json

_STYLE: Final = """
:root { color-scheme: light dark; --dim: light-dark(#57606a, #9aa4ae);
  --line: light-dark(#d8dee4, #30363d); --box: light-dark(#f6f8fa, #161b22);
  --link: light-dark(#0550ae, #79b8ff); }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 58rem; padding: 1rem;
  background: light-dark(#fff, #0d1117); color: light-dark(#1f2328, #e6edf3); }
a { color: var(--link); text-decoration: none; } a:hover { text-decoration: underline; }
code, pre { font: .875em/1.45 ui-monospace, monospace; } code { overflow-wrap: anywhere; }
pre { background: var(--box); border-radius: .4rem; overflow-x: auto; padding: .75rem; }
h2 { border-bottom: 1px solid var(--line); margin-top: 3rem; }
h3 { margin: 2.5rem 0 .25rem; font-size: 1.05rem; } h4 { margin: 1rem 0 .25rem; }
table { border-collapse: collapse; width: 100%; } small, .dim { color: var(--dim); }
td { border-top: 1px solid var(--line); padding: .35rem .75rem .35rem 0; vertical-align: top; }
td:first-child { width: 12rem; } nav ul { list-style: none; padding: 0; margin: 0; }
b.method { border-radius: .3rem; padding: .1rem .4rem; font-size: .8rem; color: #fff;
  background: #1a7f37; } b.post { background: #0969da; }
summary { cursor: pointer; color: var(--dim); }
@media (max-width: 40rem) { td { display: block; width: auto !important; padding: .1rem 0; }
  td + td { border: 0; } tr { display: block; padding: .3rem 0; } }
"""


def page(made: Json) -> str:
    """Write the document as HTML that needs nothing else, and may do nothing else."""
    info = made["info"]
    title = escape(f"{info['title']} {info['version']}")
    parts = [(tag["name"], _tagged(made, tag["name"])) for tag in made["tags"]]
    parts.append(("Sent to you", [(f"on {n}", w["post"]) for n, w in made["webhooks"].items()]))
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>{_STYLE}</style></head><body>
<h1>{title}</h1>
<p>{_prose(info["description"])}</p>
<p>Routes under <code>/v1</code> want <code>Authorization: Bearer</code> and one of
<code>RECEIVER_API_KEYS</code>. Answers of 4xx and 5xx are
<a href="#ProblemDetails">problem details</a>. For programs:
<a href="openapi.json">openapi.json</a>.</p>
<nav>{"".join(_contents(name, rows) for name, rows in parts)}</nav>
{"".join(_part(name, rows, made) for name, rows in parts)}
<h2 id="types">Types</h2>
{"".join(_type(name, schema) for name, schema in made["components"]["schemas"].items())}
</body></html>
"""


Row: TypeAlias = tuple[str, Json]
"""The heading (`POST /v1/…`) and the operation."""


def _tagged(made: Json, tag: str) -> list[Row]:
    return [
        (f"{method.upper()} {path}", row)
        for path, methods in made["paths"].items()
        for method, row in methods.items()
        if tag in row["tags"]
    ]


def _heading(heading: str) -> str:
    method, _, path = heading.partition(" ")
    return f'<b class="method {method.lower()}">{method}</b> <code>{escape(path)}</code>'


def _contents(name: str, rows: Iterable[Row]) -> str:
    lines = "".join(
        f'<li><a href="#{row["operationId"]}"><code>{escape(heading)}</code></a> '
        f"<small>{escape(row['summary'])}</small></li>"
        for heading, row in rows
    )
    return f"<h4>{escape(name)}</h4><ul>{lines}</ul>"


def _part(name: str, rows: Iterable[Row], made: Json) -> str:
    return f"<h2>{escape(name)}</h2>" + "".join(_row(*row, made) for row in rows)


def _row(heading: str, row: Json, made: Json) -> str:
    parameters = [
        (
            _field(given["name"], required=given["required"]),
            f"<small>{given['in']}</small> {_described(given, given['schema'])}",
        )
        for given in row["parameters"]
    ]
    answers = [
        (f"<code>{status}</code>", _said(_resolved(answer, made)))
        for status, answer in row["responses"].items()
    ]
    method, _, path = heading.partition(" ")
    call = "" if method == "on" else f"<pre>{escape(_curl(method, path, row), quote=False)}</pre>"
    body = row.get("requestBody", {}).get("content", {})
    return (
        f'<h3 id="{row["operationId"]}">{_heading(heading)}</h3>'
        f"<p>{_prose(row['summary'])}. {_prose(row.get('description', ''))}</p>{call}"
        + _titled("Parameters", _table(parameters))
        + _titled("Body", _bodies(body, shown=method == "on"))
        + _titled("Answers", _table(answers))
    )


def _said(answer: Json) -> str:
    names = ", ".join(f"<code>{escape(name)}</code>" for name in answer.get("headers", {}))
    headers = f" <small>with {names}</small>" if names else ""
    # What a problem looks like is said once, at the head of the page.
    contents = {
        name: content for name, content in answer.get("content", {}).items() if name != _PROBLEM
    }
    return _prose(answer["description"]) + headers + _bodies(contents)


def _bodies(contents: Json, *, shown: bool = True) -> str:
    return "".join(
        f"<div><small>{escape(media_type)}</small> {_form(content['schema'])}</div>"
        + "".join(
            f"<details><summary>example</summary><pre>{_pretty(example['value'])}</pre></details>"
            for example in content.get("examples", {}).values()
            if shown
        )
        for media_type, content in contents.items()
    )


def _type(name: str, schema: Json) -> str:
    required = schema.get("required", [])
    fields = [
        (
            _field(field, required=field in required),
            _described(described, described),
        )
        for field, described in schema.get("properties", {}).items()
    ]
    about = _prose(schema.get("description", ""))
    form = _table(fields) if fields else f"<p>{_form(schema)}</p>"
    return f'<h3 id="{escape(name)}">{escape(schema.get("title", name))}</h3><p>{about}</p>{form}'


def _field(name: str, *, required: bool) -> str:
    return f"<code>{escape(name)}</code>" + ("" if required else " <small>optional</small>")


def _described(given: Json, schema: Json) -> str:
    return f"{_form(schema)}<br>{_prose(given.get('description', ''))}"


def _form(schema: Json) -> str:
    """Say in a few words what fits a schema."""
    match schema:
        case {"$ref": str(ref)}:
            name = escape(ref.rpartition("/")[2])
            return f'<a href="#{name}">{name}</a>'
        case {"anyOf": forms}:
            return " or ".join(map(_form, forms))
        case {"enum": words}:
            return " ".join(f"<code>{escape(str(word))}</code>" for word in words)
        case {"const": word}:
            return f"<code>{escape(str(word))}</code>"
        case {"type": "array"}:
            return f"list of {_form(schema.get('items', {}))}"
    bounds = [
        f"{word} <code>{escape(str(schema[key]))}</code>" for key, word in _BOUNDS if key in schema
    ]
    return " ".join([escape(str(schema.get("format", schema.get("type", "any JSON")))), *bounds])


_PROBLEM: Final = "application/problem+json"
_BOUNDS: Final = (
    ("minimum", "from"),
    ("maximum", "to"),
    ("maxLength", "of at most"),
    ("pattern", "like"),
)


def _curl(method: str, path: str, row: Json) -> str:
    for given in row["parameters"]:
        words = given["schema"].get("enum", [given["name"]])
        path = path.replace(f"{{{given['name']}}}", given.get("example", words[0]))
    lines = [f'curl {"" if method == "GET" else f"-X {method} "}"$RECEIVER_URL{path}"']
    if "security" not in row:
        lines.append('-H "Authorization: Bearer $RECEIVER_API_KEY"')
    wishes = [
        f"{given['name']}: {given['example']}"
        for given in row["parameters"]
        if given["in"] == "header" and "example" in given
    ]
    lines += [f"-H {shlex.quote(wish)}" for wish in wishes]
    for media_type, content in row.get("requestBody", {}).get("content", {}).items():
        values = [example["value"] for example in content["examples"].values()]
        text = json.dumps(values[0], ensure_ascii=False) if values else ""
        sent = f"-d {shlex.quote(text)}" if text else "--data-binary @FILE"
        lines += [f"-H 'Content-Type: {media_type}'", sent]
    return " \\\n  ".join(lines)


def _table(rows: Iterable[tuple[str, str]]) -> str:
    # HTML wants no end tags here, and the page is kept small.
    cells = "".join(f"<tr><td>{name}<td>{text}" for name, text in rows)
    return f"<table>{cells}</table>" if cells else ""


def _titled(title: str, text: str) -> str:
    return f"<h4>{title}</h4>{text}" if text else ""


def _prose(text: str) -> str:
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))


def _pretty(value: Any) -> str:
    return escape(json.dumps(value, indent=2, ensure_ascii=False), quote=False)


def _resolved(answer: Json, made: Json) -> Json:
    name = answer.get("$ref", "").rpartition("/")[2]
    return dict(made["components"]["responses"][name]) if name else answer
