"""The registry: the `@on` decorator, which events match a handler, and how files are loaded."""

import functools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from receiver import Context, Event, Retry, on, route, source
from receiver.deliveries.handlers import Facts
from receiver.deliveries.importing import load
from receiver.deliveries.registry import Registry, handlers_of
from receiver.model.errors import HandlerError
from receiver.model.retry import Policy
from receiver.providers import NAMES

HERE = Path(__file__).name


def greet(event: Event) -> str:
    return f"hello {event.id}"


async def greet_later(event: Event, ctx: Context) -> str:
    return f"{ctx.attempt}: hello {event.id}"


def registry(**given: Any) -> Registry:
    """Register one handler."""

    def wanted(_: Event) -> None:
        return

    function = on(*given.pop("types", ()), **{"name": "wanted", **given})(wanted)
    found = Registry()
    found.add(handlers_of(function)[-1])
    return found


def test_decorated_function_is_returned_unchanged() -> None:
    def mine(event: str) -> str:
        return f"hello {event}"

    assert on("succeeded")(mine) is mine
    assert mine("you") == "hello you"


def test_handler_name_is_module_and_function_unless_given() -> None:
    [handler] = handlers_of(on("failed")(greet))[-1:]
    assert handler.name == f"{__name__}:greet"
    assert Path(handler.place.rpartition(":")[0]).name == HERE
    assert not handler.is_async
    [later] = handlers_of(on(name="a nicer one", retry=Retry(attempts=2))(greet_later))[-1:]
    assert (later.name, later.is_async, later.retry.attempts) == ("a nicer one", True, 2)


@pytest.mark.parametrize(
    ("types", "wanted"),
    [
        ((), {"succeeded", "failed", "canceled"}),
        (("*",), {"succeeded", "failed", "canceled"}),
        (("succeeded",), {"succeeded"}),
        (("failed", "canceled"), {"failed", "canceled"}),
        (("failed", "*"), {"succeeded", "failed", "canceled"}),
        (("prediction.failed",), {"failed"}),
    ],
)
def test_event_types_select_events(types: tuple[str, ...], wanted: set[str]) -> None:
    found = registry(types=types)
    matching = {
        kind
        for kind in ("succeeded", "failed", "canceled")
        if found.matching(Facts(f"prediction.{kind}", "fal", "m", {}))
    }
    assert matching == wanted


@pytest.mark.parametrize(
    ("given", "provider", "model", "matches"),
    [
        ({}, "fal", "fal-ai/flux/dev", True),
        ({"provider": "fal"}, "fal", "m", True),
        ({"provider": "fal"}, "oxen", "m", False),
        ({"provider": "FAL"}, "fal", "m", False),
        ({"provider": "[of]*"}, "oxen", "m", True),
        ({"model": "fal-ai/*"}, "fal", "fal-ai/flux/dev", True),
        ({"model": "fal-ai/*"}, "fal", "other/fal-ai/x", False),
        ({"model": "flux"}, "fal", "flux-2", False),
        ({"model": "flux.?"}, "fal", "flux-2", False),
        ({"model": "flux*"}, "fal", "flux\nx", True),
    ],
)
def test_glob_patterns_select_providers_and_models(
    given: dict[str, str], provider: str, model: str, *, matches: bool
) -> None:
    found = registry(**given).matching(Facts("prediction.succeeded", provider, model, {}))
    assert found == (["wanted"] if matches else [])


@pytest.mark.parametrize(
    ("pattern", "value", "matches"),
    [
        ("avatar", "avatar", True),
        ("ava*", "avatar", True),
        ("avatar", "Avatar", False),
        ("true", True, True),
        ("True", True, False),
        ("false", False, True),
        ("null", None, True),
        ("None", None, False),
        ("1", 1, True),
        ("1", True, False),
        ("1.5", 1.5, True),
        ("-*", -3, True),
        ("*", "", True),
        ("", "", True),
        ("é", "é", True),
        ('["a", 1]', ["a", 1], False),  # brackets are glob syntax
        ("*a*", ["a", 1], True),
        ("*", {"deep": None}, True),
        ("1180591620717411303424", 2**70, True),
    ],
)
def test_glob_patterns_match_metadata_values_as_json(
    pattern: str, value: Any, *, matches: bool
) -> None:
    found = registry(metadata={"key": pattern})
    assert bool(found.matching(Facts("prediction.failed", "fal", "m", {"key": value}))) == matches


def test_missing_metadata_key_does_not_match() -> None:
    found = registry(metadata={"a": "*", "b": "*"})
    assert found.matching(Facts("prediction.failed", "fal", "m", {"a": 1})) == []
    assert found.matching(Facts("prediction.failed", "fal", "m", {"a": 1, "b": 2, "c": 3})) == [
        "wanted"
    ]


@pytest.mark.parametrize(
    ("event", "reason"),
    [
        (("prediction.failed", "fal", "m", {"k": "v"}), "type is prediction.failed"),
        (("prediction.succeeded", "oxen", "m", {"k": "v"}), "provider is oxen"),
        (("prediction.succeeded", "fal", "n", {"k": "v"}), "model is n"),
        (("prediction.succeeded", "fal", "m", {"k": 1}), "metadata k is 1"),
        (("prediction.succeeded", "fal", "m", {}), "metadata k is missing"),
        (("prediction.succeeded", "fal", "m", {"k": "v"}), None),
    ],
)
def test_handler_explains_why_an_event_does_not_match(
    event: tuple[str, str, str, dict[str, Any]], reason: str | None
) -> None:
    found = registry(types=["succeeded"], provider="fal", model="m", metadata={"k": "v"})
    assert found.handlers["wanted"].refuses(Facts(*event)) == reason


def test_handler_with_reply_to_gets_only_events_with_a_matching_reply_url() -> None:
    found = registry(reply_to="https://bot.example/*")
    for url, wants in (
        ("https://bot.example/a", True),
        ("https://other.example/", False),
        (None, False),
    ):
        wanted = found.matching(Facts("prediction.failed", "fal", "m", {}, url))
        assert bool(wanted) == wants
    assert "reply_to is None" in str(found.explain(Facts("prediction.failed", "fal", "m", {}))[0])


class Instance:
    async def __call__(self, event: Event) -> None:
        raise NotImplementedError


class Method:
    def tell(self, event: Event) -> None:
        raise NotImplementedError


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "a parameter that is not there": ({"modle": "x"}, "no parameter modle"),
    "two of them": ({"b": 1, "a": 1}, "no parameter a, b"),
    "an unknown type": ({"types": ["succeded"]}, "unknown event type 'succeded'"),
    "a type that is no text": ({"types": [3]}, "unknown event type '3'"),
    "a provider that is no text": ({"provider": 3}, "provider must be a text"),
    "a model that is no text": ({"model": None}, "model must be a text"),
    "a metadata value that is no text": ({"metadata": {"n": 3}}, "n must be a text"),
    "metadata that is no mapping": ({"metadata": "kind=avatar"}, "metadata must be a mapping"),
    "metadata that is nothing much": ({"metadata": []}, "metadata must be a mapping"),
    "a retry that is a number": ({"retry": 3}, r"retry must be a Retry\(…\), not 3"),
    "a retry that says no": ({"retry": False}, r"retry must be a Retry\(…\), not False"),
    "a timeout that is text": ({"timeout": "20"}, "timeout must be a number, not '20'"),
    "a timeout of nothing": ({"timeout": 0}, "timeout must be 0.001 or more"),
    "a timeout without end": ({"timeout": float("inf")}, "timeout must be a number"),
    "a timeout that is not": ({"timeout": float("nan")}, "timeout must be a number"),
    "concurrency that is a yes": ({"concurrency": True}, "concurrency must be a number"),
    "concurrency of nothing": ({"concurrency": 0}, "concurrency must be 1 or more"),
    "a name that is no text": ({"name": 3}, "name must be a printable text"),
    "a name of nothing": ({"name": ""}, "name must be a printable text"),
    "concurrency in part": ({"concurrency": 1.5}, "concurrency must be a whole number"),
    "a timeout of None": ({"timeout": None}, "timeout must be a number, not None"),
    "a time for retries": ({"retry": Retry(after=5)}, "after=… is for `raise Retry"),
    "a name that no route can name": ({"name": "a" * 301}, "of 300 at most"),
    "a name of two lines": ({"name": "a\nb"}, "name must be a printable text"),
}


@pytest.mark.parametrize("name", WRONG)
def test_invalid_handler_argument_is_rejected_with_file_and_line(name: str) -> None:
    given, words = WRONG[name]
    types = given.get("types", ())
    rest = {key: value for key, value in given.items() if key != "types"}
    with pytest.raises(HandlerError, match=words) as raised:
        on(*types, **rest)(greet)
    path, line, _ = str(raised.value).split(":", 2)
    assert Path(path).name == HERE
    assert line.isdecimal()


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda: None, r":\d+: <lambda> must take"),
        (lambda _a, _b, _c: None, "must take"),
        (lambda *, event: event, "must take"),
        (lambda _event, *, needed: needed, "must take"),
        (3, "must be a function"),
        (Instance(), "has no name of its own"),
        (Method.tell, "Method.tell is a method without its object"),
    ],
)
def test_object_that_cannot_be_called_with_an_event_is_rejected(function: Any, words: str) -> None:
    with pytest.raises(HandlerError, match=words):
        on()(function)


@pytest.mark.parametrize(
    ("function", "context"),
    [
        (lambda _event: None, False),
        (lambda _event, _ctx: None, True),
        (lambda _event, _ctx=None: None, True),
        (lambda *_args: None, True),
        (lambda _event, **_kwargs: None, False),
    ],
)
def test_handler_gets_a_context_only_if_it_takes_a_second_argument(
    function: Callable[..., Any], *, context: bool
) -> None:
    assert on(name="x")(function) is function
    assert handlers_of(function)[-1].takes_context == context


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ({"after": -1}, ValueError),
        ({"after": "soon"}, TypeError),
        ({"attempts": 0}, ValueError),
        ({"attempts": True}, TypeError),
        ({"attempts": 2.5}, TypeError),
        ({"base": -0.1}, ValueError),
        ({"cap": float("nan")}, TypeError),
    ],
)
def test_invalid_retry_argument_is_rejected_with_its_name(
    given: dict[str, Any], error: type[Exception]
) -> None:
    with pytest.raises(error, match=next(iter(given))):
        Retry(**given)


@pytest.mark.parametrize("decorator", [on, route, source])
def test_decorator_without_parentheses_is_rejected(decorator: Any) -> None:
    """Otherwise the function would silently not be registered."""
    with pytest.raises(HandlerError, match=rf"{HERE}:\d+: a decorator needs its parentheses"):
        decorator(greet)


def test_decorated_method_is_a_handler_of_its_own_object_only() -> None:
    one, other = Method(), Method()
    on()(one.tell)
    assert not handlers_of(one.tell)[-1].takes_context
    with pytest.raises(HandlerError, match="is not a handler"):
        handlers_of(other.tell)


def test_retry_policy_takes_missing_values_from_the_default() -> None:
    default = Policy(attempts=10, base=2, cap=3600)
    assert Retry().policy(default) == default
    assert Retry(attempts=1, base=0, cap=5).policy(default) == Policy(attempts=1, base=0, cap=5)


def test_link_that_leads_to_itself_is_rejected_as_any_missing_file(tmp_path: Path) -> None:
    (file := tmp_path / "mine.py").symlink_to(file)
    with pytest.raises(HandlerError, match=r"mine\.py: no such file"):
        load([str(file)])


def test_duplicate_handler_name_is_rejected_with_both_places() -> None:
    found = Registry()
    [first] = handlers_of(on(name="same")(lambda _event: None))
    [second] = handlers_of(on(name="same")(lambda _event: None))
    found.add(first)
    found.add(first)
    with pytest.raises(HandlerError, match=r"'same' is taken by the handler at .*name=…") as raised:
        found.add(second)
    assert str(raised.value).startswith(second.place)


def test_two_registrations_of_one_function_need_two_names() -> None:
    found = Registry()
    first, second = handlers_of(on("succeeded")(on("failed")(lambda _event: None)))
    found.add(first)
    with pytest.raises(HandlerError, match=r"is taken by the handler at .*name=…"):
        found.add(second)


def test_handler_names_with_colliding_digests_are_rejected() -> None:
    found = Registry()
    for name in ("handler-13761", "handler-19680"):  # both have the same digest
        on(name=name)(greet)
    first, second = handlers_of(greet)[-2:]
    found.add(first)
    with pytest.raises(HandlerError, match="rename 'handler-19680': it clashes") as raised:
        found.add(second)
    assert str(raised.value).startswith(second.place)


def test_undecorated_function_is_not_a_handler() -> None:
    def plain(_: Event) -> None:
        raise NotImplementedError

    with pytest.raises(HandlerError, match="is not a handler"):
        handlers_of(plain)
    with pytest.raises(HandlerError, match="is not a handler"):
        handlers_of(len)


def test_handler_wrapped_by_another_modules_decorator_is_found() -> None:
    """The wrapper's globals are those of the module that defines the other decorator."""
    elsewhere: dict[str, Any] = {"functools": functools}
    exec(  # a module other than the handler's
        "def wrap(f):\n"
        "    @functools.wraps(f)\n"
        "    def inner(*args):\n"
        "        return f(*args)\n"
        "    return inner\n",
        elsewhere,
    )
    wrapped = on(name="wrapped")(elsewhere["wrap"](lambda _event: None))
    assert [handler.name for handler in handlers_of(wrapped)] == ["wrapped"]


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Yield a folder to load modules from; afterwards, remove them from `sys.modules`."""
    path, modules = list(sys.path), set(sys.modules)
    yield tmp_path
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


TWO = """
from receiver import on

@on("succeeded")
def first(event):
    return "first"

@on("failed", name="the second")
async def second(event, ctx):
    return neighbour.WORD

import neighbour_of_two as neighbour
"""


def test_file_is_loaded_with_all_handlers_and_can_import_its_siblings(
    folder: Path,
) -> None:
    (folder / "two_handlers.py").write_text(TWO)
    (folder / "neighbour_of_two.py").write_text("WORD = 'hi'")
    found = load([str(folder / "two_handlers.py")])
    assert list(found.handlers) == ["two_handlers:first", "the second"]
    assert found.handlers["two_handlers:first"].place.startswith(str(folder / "two_handlers.py"))


def test_module_is_loaded_by_its_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "by_name_handlers.py").write_text(TWO)
    (folder / "neighbour_of_two.py").write_text("WORD = 'hi'")
    monkeypatch.syspath_prepend(folder)
    assert list(load(["by_name_handlers"]).handlers) == ["by_name_handlers:first", "the second"]
    assert load([]).handlers == {}


def test_installed_handler_is_loaded_by_its_entry_point(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "their_package.py").write_text("from receiver import on\non(name='t')(lambda e: e)")
    info = folder / "their_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-package\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[receiver.handlers]\ntheirs = their_package\n")
    monkeypatch.syspath_prepend(folder)
    assert list(load(["theirs"]).handlers) == ["t"]


def test_handler_file_does_not_shadow_a_module_of_the_same_name(folder: Path) -> None:
    import json  # noqa: PLC0415 - it must still be the standard module below

    (folder / "json.py").write_text("from receiver import on\n@on()\ndef f(event): ...\n")
    assert list(load([str(folder / "json.py")]).handlers) == ["json:f"]
    assert sys.modules["json"] is json


UNLOADABLE = {
    "nothing on it": ("x = 1\n", "has no handler"),
    "a syntax error": (
        "def f(:\n",
        r"broken_file\.py:1:7: invalid syntax\n    def f\(:\n          \^$",
    ),
    "an error of its own": ("\n\n1 / 0\n", r"broken_file\.py:3: ZeroDivisionError"),
    "an import that is missing": ("import nowhere_at_all\n", r"broken_file\.py:1: ModuleNotFound"),
    "a bad parameter": (
        "from receiver import on\n\non(tiemout=1)(print)\n",
        r"broken_file\.py:3: ",
    ),
    "two of one name": (
        "from receiver import on\non(name='a')(lambda e: 1)\non(name='a')(lambda e: 2)\n",
        r"broken_file\.py:3: the name 'a' is taken",
    ),
    "bytes that are no text": ("\udcff", r"broken_file\.py:1:1: .unicode error|UnicodeDecodeError"),
}


@pytest.mark.parametrize("name", UNLOADABLE)
@pytest.mark.parametrize("by_name", [True, False])
def test_load_error_names_the_file_and_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, *, by_name: bool
) -> None:
    source, words = UNLOADABLE[name]
    path = folder / "broken_file.py"
    path.write_bytes(source.encode(errors="surrogateescape"))
    monkeypatch.syspath_prepend(folder)
    with pytest.raises(HandlerError, match=words) as raised:
        load(["broken_file" if by_name else str(path)])
    assert "importlib" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nowhere/handlers.py", "nowhere/handlers.py: no such file"),
        ("handlers_nowhere.py", "no such file"),
        ("no_such_module", "^no_such_module: cannot be loaded: ModuleNotFoundError"),
        ("", "cannot be loaded"),
        ("..", "cannot be loaded"),
    ],
)
def test_missing_file_or_module_is_rejected(name: str, words: str) -> None:
    with pytest.raises(HandlerError, match=words):
        load([name])


def test_all_load_errors_are_reported_together(folder: Path) -> None:
    (folder / "empty.py").write_text("")
    names = ["no_such_module", str(folder / "empty.py"), "nowhere.py"]
    with pytest.raises(HandlerError) as raised:
        load(names)
    problems = str(raised.value).split("\n")
    assert [line.startswith(name) for line, name in zip(problems, names, strict=True)] == [True] * 3


def test_plain_folder_or_non_python_file_is_rejected(folder: Path) -> None:
    (folder / "notes.txt").write_text("from receiver import on")
    with pytest.raises(HandlerError, match="no such file"):
        load([f"{folder}/"])
    with pytest.raises(HandlerError, match="not a Python file"):
        load([str(folder / "notes.txt")])


HEAD = "from __future__ import annotations\nfrom receiver import on\n"
STRUCT = """
import msgspec, pickle, inspect, importlib
class Inner(msgspec.Struct):
    {field}: int
class Outer(msgspec.Struct):
    inner: Inner
@on(name="{name}")
def told(event):
    made = msgspec.json.decode('{{"inner": {{"{field}": 1}}}}', type=Outer)
    assert pickle.loads(pickle.dumps(told)) is told
    assert "{field}" in inspect.getsource(Outer) + inspect.getsource(Inner)
    return made.inner.{field}
"""
TELLS = "@on()\ndef told(event): return {word}\n"
BESIDE: dict[str, tuple[dict[str, str], list[str], dict[str, Any]]] = {
    "its own package called handlers": (
        {
            "main.py": HEAD + "from handlers.x import y\nimport handlers.x as z\n"
            "@on()\ndef told(event): return y, z.y\n",
            "handlers/__init__.py": "",
            "handlers/x.py": "y = 1",
        },
        ["main.py"],
        {"main:told": (1, 1)},
    ),
    "a folder without __init__": (
        {"main.py": HEAD + "from parts.x import y\n" + TELLS.format(word="y"), "parts/x.py": "y=2"},
        ["main.py"],
        {"main:told": 2},
    ),
    "names of others": (
        {
            f"{name}.py": HEAD + "import json, types\n" + TELLS.format(word="json.dumps(1)")
            for name in ("handlers", "receiver", "json", "types", "test", "a-b c", "é", "1.2,3")
        },
        [
            "handlers.py",
            "receiver.py",
            "json.py",
            "types.py",
            "test.py",
            "a-b c.py",
            "é.py",
            "1.2,3.py",
        ],
        {
            f"{name}:told": "1"
            for name in ("handlers", "receiver", "json", "types", "test", "a-b c", "é", "1_2,3")
        },
    ),
    "two files of one name": (
        {
            "a/hooks.py": HEAD + STRUCT.format(name="a", field="first"),
            "b/hooks.py": HEAD + STRUCT.format(name="b", field="second"),
        },
        ["a/hooks.py", "b/hooks.py"],
        {"a": 1, "b": 1},
    ),
    "neighbours of one name": (
        {
            "a/one.py": HEAD + "import helpers\n" + TELLS.format(word="helpers.W"),
            "b/two.py": HEAD + "from helpers import W\n" + TELLS.format(word="W"),
            "a/helpers.py": "W = 'a'",
            "b/helpers.py": "import more\nW = more.W",
            "b/more.py": "W = 'b'",
        },
        ["a/one.py", "b/two.py"],
        {"one:told": "a", "two:told": "b"},
    ),
    "relative imports": (
        {
            "plain.py": HEAD + "from . import x\nfrom .x import W\n" + TELLS.format(word="W + x.W"),
            "x.py": "W = 'x'",
            "pack/__init__.py": HEAD + "from .sub import told",
            "pack/sub.py": HEAD + "from . import y\n" + TELLS.format(word="y.W"),
            "pack/y.py": "W = 'y'",
        },
        ["plain.py", "pack/"],
        {"plain:told": "xx", "sub:told": "y"},
    ),
    "a file with imported handlers": (
        {
            "all.py": HEAD + "from other import told as theirs\n@on()\ndef mine(event): ...\n",
            "other.py": HEAD + TELLS.format(word="1"),
        },
        ["all.py", "other.py", "all.py", "link.py"],
        {"all:mine": None, "other:told": 1},
    ),
}


@pytest.mark.parametrize("case", BESIDE)
def test_handler_files_and_their_imports_never_collide(folder: Path, case: str) -> None:
    files, names, told = BESIDE[case]
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    (folder / "link.py").symlink_to("all.py")
    (folder / "here").symlink_to(folder)
    found = load([f"{folder}/{name}" for name in names] + [f"{folder}/here/{names[0]}"])
    assert {name: found.handlers[name].function(None) for name in found.handlers} == told


def test_each_load_runs_every_file_exactly_once(folder: Path) -> None:
    runs = folder / "runs"
    (folder / "first.py").write_text(
        HEAD
        + f"with open({str(runs)!r}, 'a') as file: file.write('x')\n@on()\ndef told(event): ...\n"
    )
    (folder / "all.py").write_text(HEAD + "from first import told\n")
    names = [str(folder / name) for name in ("first.py", "all.py")]
    for times, order in enumerate((names, names, names[::-1]), 1):
        assert list(load(order).handlers) == ["first:told"]
        assert runs.read_text() == "x" * times


@pytest.mark.parametrize("ending", ["import sys; sys.exit(3)", "raise KeyboardInterrupt"])
def test_file_that_exits_on_import_is_a_load_error_with_its_line(folder: Path, ending: str) -> None:
    (folder / "ends.py").write_text(f"\n{ending}\n")
    with pytest.raises(HandlerError, match=r"ends\.py:2: (SystemExit|KeyboardInterrupt)"):
        load([str(folder / "ends.py")])


def test_spawned_process_can_import_the_functions_of_a_handler_file(folder: Path) -> None:
    (folder / "pools.py").write_text(
        HEAD + "import concurrent.futures as f, multiprocessing as m\n"
        "def double(n): return 2 * n\n"
        "@on()\ndef told(event):\n"
        "    with f.ProcessPoolExecutor(1, m.get_context('spawn')) as pool:\n"
        "        return pool.submit(double, 21).result()\n"
    )
    [handler] = load([str(folder / "pools.py")]).handlers.values()
    assert handler.function(None) == 42


def _yields(_: Event) -> Iterator[int]:
    yield 1


async def _yields_later(_: Event) -> Any:
    yield 1


class _Yields:
    def __call__(self, _: Event) -> Iterator[int]:
        yield 1


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (_yields, "yields"),
        (_yields_later, "yields"),
        (_Yields(), "yields"),
        (functools.partial(_yields), "yields"),
        (functools.wraps(_yields)(lambda _event: None), "yields"),
        (Instance, "is a class"),
    ],
)
def test_generator_function_or_class_is_rejected_as_a_handler(function: Any, words: str) -> None:
    with pytest.raises(HandlerError, match=rf"{HERE}:\d+: .*{words}"):
        on(name="x")(function)


# --- the order of handlers ---


def ordered(**after: str | tuple[str, ...]) -> Registry:
    """Register handlers by name, each with its value of `after`."""
    found = Registry()
    for name, others in after.items():

        @on("*", name=name, after=others)
        def handler(_: Event) -> None: ...

        for made in handlers_of(handler):
            found.add(made)
    return found


def test_after_waits_only_for_handlers_of_the_same_event() -> None:
    found = ordered(post="save", save=(), log=(), all=("save", "post", "nobody", "chain"))
    assert found.waiting(["post", "log"]) == {}
    assert found.waiting(["save", "post"]) == {"post": ("save",)}
    assert found.waiting(["save", "post", "all"]) == {"post": ("save",), "all": ("save", "post")}
    [warning] = found.warnings(NAMES)
    assert warning.startswith("handler all is to run after nobody, which is not a handler here")


@pytest.mark.parametrize(
    "after",
    [{"a": "a"}, {"a": "b", "b": "a"}, {"a": ("x", "b"), "b": "c", "c": ("y", "a")}],
)
def test_cycle_in_after_is_rejected(after: dict[str, Any]) -> None:
    with pytest.raises(HandlerError, match="would wait for itself"):
        ordered(**after)


@pytest.mark.parametrize("after", [7, None, ["a", 7], {"a"}])
def test_invalid_after_argument_is_rejected(after: Any) -> None:
    with pytest.raises(HandlerError, match="after must be the name"):
        on("*", name="x", after=after)(lambda _: None)
