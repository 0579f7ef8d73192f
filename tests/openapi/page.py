"""Generate the page at `/docs`: the OpenAPI document as one self-contained HTML file."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable
from html import escape
from typing import Any, Final, TypeAlias

from receiver.http.problems import PROBLEMS
from tests.openapi.document import USUAL, Json

_STYLE: Final = """
:root { color-scheme: light dark; --dim: light-dark(#57606a, #9aa4ae);
  --line: light-dark(#d8dee4, #30363d); --box: light-dark(#f6f8fa, #161b22);
  --link: light-dark(#0550ae, #79b8ff); }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 56rem; padding: 1rem;
  background: light-dark(#fff, #0d1117); color: light-dark(#1f2328, #e6edf3); }
a { color: var(--link); text-decoration: none; } a:hover { text-decoration: underline; }
code, pre { font: .875em/1.45 ui-monospace, monospace; } code { overflow-wrap: anywhere; }
pre { background: var(--box); border-radius: .4rem; overflow-wrap: anywhere; padding: .75rem;
  padding-right: 4.5rem; position: relative; white-space: pre-wrap; }
pre button { position: absolute; right: .4rem; top: .4rem; }
h2 { border-bottom: 1px solid var(--line); margin-top: 3rem; }
h3 { margin: 2.5rem 0 .25rem; font-size: 1.05rem; } h4 { margin: 1rem 0 .25rem; }
table { border-collapse: collapse; width: 100%; } small, .dim { color: var(--dim); }
td { border-top: 1px solid var(--line); padding: .35rem .75rem .35rem 0; vertical-align: top; }
td:first-child { width: 12rem; } nav ul { list-style: none; padding: 0; margin: 0; }
nav { background: light-dark(#fff, #0d1117); position: sticky; top: 0; z-index: 1; }
nav details { max-height: 80vh; overflow: auto; padding: .5rem 0; } nav small { display: block; }
input { font: inherit; max-width: 100%; } h2, h3 { scroll-margin-top: 3rem; }
@media (min-width: 68rem) { body { display: grid; gap: 0 2rem; grid-template-columns: 20rem 1fr;
  max-width: 84rem; } nav { align-self: start; } nav details { max-height: 100vh; }
  main { min-width: 0; } }
b.method { border-radius: .3rem; padding: .1rem .4rem; font-size: .8rem; color: #fff;
  background: #1a7f37; } b.post { background: #0969da; }
summary { cursor: pointer; color: var(--dim); }
@media (max-width: 40rem) { td { display: block; width: auto !important; padding: .1rem 0; }
  td + td { border: 0; } tr { display: block; padding: .3rem 0; } }
"""
_SCRIPT: Final = r"""
// Without it the page is the same, but for copying, filtering, and this server's own address.
const base = location.origin + location.pathname.replace(/\/docs\/?$/, "");
const menu = document.querySelector("nav details"), wide = matchMedia("(min-width: 68rem)");
menu.open = wide.matches;
wide.addEventListener("change", () => { menu.open = wide.matches; });
for (const pre of document.querySelectorAll("pre")) {
  if (/^[\w:/.~[\]-]+$/.test(base))
    pre.textContent = pre.textContent.replaceAll("$RECEIVER_URL", base);
  const text = pre.textContent, button = document.createElement("button");
  button.textContent = "copy";
  button.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(text);
      button.textContent = "copied";
    } catch { // not on HTTPS: leave it to the reader
      getSelection().setBaseAndExtent(pre, 0, pre, 1);
    }
  });
  pre.append(button);
}
const filter = document.createElement("input");
filter.type = "search";
filter.placeholder = filter.ariaLabel = "Filter routes";
filter.addEventListener("input", () => {
  const wanted = filter.value.toLowerCase();
  for (const link of document.querySelectorAll("nav li a")) {
    const route = document.getElementById(link.hash.slice(1)).parentNode;
    const gone = !route.textContent.toLowerCase().includes(wanted);
    link.parentNode.hidden = route.hidden = gone;
  }
});
menu.querySelector("summary").after(filter);
menu.addEventListener("click", (event) => {
  if (event.target.closest("a")) menu.open = wide.matches;
});
"""


def page(made: Json) -> str:
    """Return the document as HTML that loads nothing from elsewhere."""
    info = made["info"]
    title = escape(f"{info['title']} {info['version']}")
    parts = [(tag["name"], _tagged(made, tag["name"])) for tag in made["tags"]]
    schemas = made["components"]["schemas"]
    parts.append(("Sent to you", [(f"on {n}", w["post"]) for n, w in made["webhooks"].items()]))
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>{_STYLE}</style></head><body>
<nav><details><summary>Contents</summary>{"".join(_contents(name, rows) for name, rows in parts)}
<h4><a href="#types">Types</a></h4></details></nav>
<main><h1>{title}</h1>
<p>{_prose(info["description"])}</p>
<p>Routes under <code>/v1</code> want <code>Authorization: Bearer</code> and one of
<code>RECEIVER_API_KEYS</code>. Answers of 4xx and 5xx are
<a href="#ProblemDetails">problem details</a>. For programs:
<a href="openapi.json">openapi.json</a>.</p>
<p>What is not said again for each of them:</p>
{_table([(f"<code>{PROBLEMS[kind][0]}</code>", _meaning(kind)) for kind in USUAL])}
{"".join(_part(name, rows, made) for name, rows in parts)}
<h2 id="types">Types</h2>
{"".join(_type(name, schema) for name, schema in schemas.items() if name not in _sent(made))}
</main><script>{_SCRIPT}</script></body></html>
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
        if _name(answer) not in USUAL  # those are listed at the head of the page
    ]
    method, _, path = heading.partition(" ")
    call = "" if method == "on" else f"<pre>{escape(_curl(method, path, row), quote=False)}</pre>"
    body = row.get("requestBody", {}).get("content", {})
    unfolded = _bodies(body, shown=method == "on") if method == "on" else _unfolded(body, made)
    return (
        f'<section><h3 id="{row["operationId"]}">{_heading(heading)}</h3>'
        f"<p>{_prose(row['summary'])}. {_prose(row.get('description', ''))}</p>{call}"
        + _titled("Parameters", _table(parameters))
        + _titled("Body", unfolded)
        + _titled("Answers", _table(answers))
        + "</section>"
    )


def _sent(made: Json) -> set[str]:
    """Return the types of request bodies, which are shown with their routes only."""
    return {
        _name(content["schema"])
        for methods in made["paths"].values()
        for row in methods.values()
        for content in row.get("requestBody", {}).get("content", {}).values()
    }


def _unfolded(contents: Json, made: Json) -> str:
    """Return the fields of request bodies, to show them with their route."""
    return "".join(
        f"<small>{escape(media_type)}</small>"
        + (_type(name, made["components"]["schemas"][name], "div") if name else " any JSON")
        for media_type, content in contents.items()
        for name in [_name(content["schema"])]
    )


def _name(schema: Json) -> str:
    return str(schema.get("$ref", "")).rpartition("/")[2]


def _said(answer: Json) -> str:
    names = ", ".join(f"<code>{escape(name)}</code>" for name in answer.get("headers", {}))
    headers = f" <small>with {names}</small>" if names else ""
    # The format of problems is described once, at the head of the page.
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


def _type(name: str, schema: Json, head: str = "h3") -> str:
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
    title = escape(schema.get("title", name))
    return f'<{head} id="{escape(name)}">{title}</{head}><p>{about}</p>{form}'


def _field(name: str, *, required: bool) -> str:
    return f"<code>{escape(name)}</code>" + ("" if required else " <small>optional</small>")


def _described(given: Json, schema: Json) -> str:
    return f"{_form(schema)}<br>{_prose(given.get('description', ''))}"


def _form(schema: Json) -> str:
    """Return a short description of a schema."""
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
        text = json.dumps(_given(values[0]), indent=2, ensure_ascii=False) if values else ""
        sent = f"-d {shlex.quote(text)}" if text else "--data-binary @FILE"
        lines += [f"-H 'Content-Type: {media_type}'", sent]
    return " \\\n  ".join(lines)


def _given(body: Any) -> Any:
    """Return a body without fields that are None."""
    is_object = isinstance(body, dict)
    return {name: it for name, it in body.items() if it is not None} if is_object else body


def _table(rows: Iterable[tuple[str, str]]) -> str:
    # HTML needs no end tags here, and the page is kept small.
    cells = "".join(f"<tr><td>{name}<td>{text}" for name, text in rows)
    return f"<table>{cells}</table>" if cells else ""


def _titled(title: str, text: str) -> str:
    return f"<h4>{title}</h4>{text}" if text else ""


def _prose(text: str) -> str:
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))


def _meaning(kind: str) -> str:
    return _prose(f"`{kind}`: {PROBLEMS[kind][1]}")


def _pretty(value: Any) -> str:
    return escape(json.dumps(value, indent=2, ensure_ascii=False), quote=False)


def _resolved(answer: Json, made: Json) -> Json:
    name = answer.get("$ref", "").rpartition("/")[2]
    return dict(made["components"]["responses"][name]) if name else answer
