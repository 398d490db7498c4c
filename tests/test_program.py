"""From modules to one short program: what is linked, dropped, renamed or refused, and that it still does the same."""

import ast
import contextlib
import importlib
import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fairway.packing.bundle import program_text
from fairway.packing.names import bound_names, global_names
from fairway.packing.shorten import shorten


def _program(tmp_path: Path, **modules: str) -> Path:
    for name, text in modules.items():
        (tmp_path / f"{name}.py").write_text(text)
    return tmp_path


def _run(root: Path, *arguments: Any, **chosen: str) -> tuple[Any, str]:
    """What the packed program leaves in `result`, and its text."""
    text = program_text(root, "main", arguments, chosen={f"main.{table}": key for table, key in chosen.items()})
    names: dict[str, Any] = {"__name__": "__main__", "result": []}
    exec(text, names)
    return names["result"], text


SETTINGS = """
from typing import Literal
from pydantic import BaseModel, model_validator

class Fit(BaseModel):
    steps: int

class Shape(BaseModel):
    sides: list[int]

    @property
    def area(self):
        return self.sides[0] * self.sides[1]

class Settings(BaseModel):
    kind: Literal["plain", "fancy"]
    width: int
    shape: Shape
    fit: Fit | None

    @model_validator(mode="after")
    def _agree(self) -> "Settings":
        if self.width > 100:
            raise ValueError("too wide")
        return self
"""


def _settings(root: Path, monkeypatch: pytest.MonkeyPatch, **values: Any) -> Any:
    """An object of the program's own class of settings."""
    (root / "settings.py").write_text(SETTINGS)
    monkeypatch.syspath_prepend(str(root))
    monkeypatch.delitem(sys.modules, "settings", raising=False)
    module = __import__("settings")
    return module.Settings(**{"kind": "plain", "width": 8, "shape": {"sides": [2, 3]}, "fit": None} | values)


def test_global_names_follow_the_scopes_of_the_language() -> None:
    code = "def f(a, b=c):\n    d = [e for e in g if e]\n    def h():\n        global d, i\n        return (d, a, j)\n"
    assert global_names(ast.parse(code)) == {"f", "c", "g", "d", "i", "j"}
    assert global_names(ast.parse("class A(B):\n    x = 1\n    def m(self):\n        return x\n")) == {"A", "B", "x"}
    assert global_names(
        ast.parse("async def f(a):\n    match a:\n        case [b, *c]:\n            return d\n")
    ) == set("fd")
    assert bound_names(ast.parse("for i in a:\n    with b as c, d as (e, f):\n        import g.h\n").body) == set(
        "icefg"
    )


def test_equal_names_of_two_modules_stay_apart(tmp_path: Path) -> None:
    root = _program(
        tmp_path,
        main="import one\nfrom two import value as other\n\n\ndef run_shipped():\n    value = 3\n"
        "    result.append((one.value(), other(), value))\n",
        one="def value():\n    return _inner()\n\n\ndef _inner():\n    return 1\n",
        two="def value():\n    return _inner()\n\n\ndef _inner():\n    return 2\n",
    )
    assert _run(root)[0] == [(1, 2, 3)]


# Whatever a program may hold that packing could get wrong.
VARIED = '''
"""A program of many forms."""
import argparse
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import ClassVar
import helpers
from helpers import Shape, register, registered, tally as count_of

value = 7
switch = False
first, *others = range(3)


@dataclass
class Cut:
    size: int
    last: int | None = None
    made: ClassVar[list[int]] = []
    seen: list[str] = field(default_factory=list)

    @classmethod
    def at(cls, last: int) -> "Cut":
        return cls(1, last)

    def moved(self) -> "Cut":
        return replace(self, last=(self.last or 0) + 1)

    def whole(self) -> bool:
        return self.last is None


class Handler:
    def on_start(self, word: str = "go") -> str:
        return f"start {word}"

    def on_stop(self) -> str:
        return "stop"


@register
def unmentioned() -> str:
    return "registered all the same"


class Derived(helpers.Base):
    pass


def counter(start: int = 0) -> Callable[[], int]:
    count = start

    def step(by: int = 1) -> int:
        nonlocal count
        count += by
        return count

    return step


def squares(numbers: Iterator[int], /, *, offset: int = 0) -> Iterator[int]:
    received = None
    for number in numbers:
        received = yield number * number + offset + (received or 0)


def options(first: int, /, second: int = 2, *rest: int, third: int = 3, **more: int) -> list[object]:
    return [first, second, rest, third, sorted(more.items())]


def found(items: list[int], wanted: int) -> int | None:
    for index, item in enumerate(items):
        if item == wanted:
            return index
    return None


def flip() -> bool:
    global switch
    switch = not switch
    return switch


def described(thing: object) -> str:
    match thing:
        case {"a": int(number), **rest}:
            return f"mapping {number} {rest}"
        case [head, *tail]:
            return f"list {head} {tail}"
        case Cut(size=size):
            return f"cut {size}"
        case _:
            return "other"


def doubled(items, extra=None):
    if extra is not None:
        items, extra = [*items, extra], None
    return items, extra


def run_shipped(width: int = 4) -> None:
    step = counter(width)
    print(step(), step(by=2), [value for value in range(3)], value, first, others)
    stream = squares(iter([1, 2, 3]), offset=1)
    print(next(stream), stream.send(10), list(stream))
    given = {"second": 5, "first": 6, "zero": 0}
    print(options(1, **given), options(1, 2, 3, third=4), options(*[1], **{"third": 9}))
    for name in ("start", "stop"):
        print(getattr(Handler(), f"on_{name}")(), getattr(Handler(), "on_start")(word=name))
    print(found([3, 4], 4), found([], 1), found([1], wanted=1) is None)
    print(Cut.at(3).moved().last, Cut(2).whole(), Cut.made, Cut(1).seen, flip(), flip(), switch)
    print([described(x) for x in ({"a": 1, "b": 2}, [1, 2, 3], Cut(5), 5)])
    print(doubled([1], len("ab")), doubled([1]), functools.reduce(lambda a, b: a * b, [1, 2, 3]))
    print(registered, helpers.Base.derived, count_of("a b a", word="a"), Shape(2).area, helpers.value)
    try:
        helpers.fail(reason="on purpose")
    except helpers.Failure as error:
        print("caught", error, error.args)
    parser = argparse.ArgumentParser()
    parser.add_argument("--width", type=int, default=width)
    print((lambda *a, key=parser.parse_args([]).width: (a, key))(1, 2), {k: v for k, v in zip("ab", (1, value))})
    print(result := max(found([1], 1), 0), [last := item for item in (1, 2)], last)


if __name__ == "__main__":
    run_shipped(4)
'''
HELPERS = '''
"""What the program imports."""
value = "another value"
registered = []


def register(function):
    registered.append(function())
    return function


class Base:
    derived = []

    def __init_subclass__(cls, **options: object) -> None:
        Base.derived.append(len(options))


class Shape:
    def __init__(self, side):
        self._side = side

    @property
    def area(self):
        return self._side**2

    def __getattr__(self, name):
        return name


class Failure(ValueError):
    pass


def fail(*, reason):
    raise Failure(reason)


def tally(text, word):
    from late import counted

    return counted(text, word)
'''


def test_a_varied_program_does_packed_what_it_does_as_it_is(tmp_path: Path) -> None:
    """Closures, generators, **options, getattr by a name made at run time, Optional returns, and more."""
    late = "def counted(text, word):\n    from later import Counter\n\n    return Counter(text.split())[word]\n"
    root = _program(tmp_path, main=VARIED, helpers=HELPERS, late=late, later="from collections import Counter\n")
    done = subprocess.run([sys.executable, "main.py"], cwd=root, capture_output=True, text=True, check=True)
    text = program_text(root, "main", [4])
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(text, {"__name__": "__main__"})
    assert printed.getvalue() == done.stdout
    assert "registered all the same" in done.stdout
    assert len(text) < 0.8 * len(VARIED + HELPERS + late)


def test_what_nobody_reaches_falls_away_and_what_does_something_stays(tmp_path: Path) -> None:
    main = (
        "import colorsys\nimport json\nfrom textwrap import dedent\nfrom typing import TypeVar\n\n"
        "T = TypeVar('T')\nUNUSED = ('long', 'gone')\n\n\n"
        "def unused(text: str) -> T:\n    return json.dumps(dedent(text))\n\n\n"
        "class Quiet(Exception):\n    field: int = 5\n\n\n"
        "def note(word):\n    result.append(word)\n    return word\n\n\n"
        "KEPT = note('assigned')\n\n\ndef with_default(default=note('default')):\n    ...\n\n\n"
        "class WithField:\n    field = note('field')\n\n\n"
        "def run_shipped():\n    unread = lambda x=note('lambda'): x\n    result.append('end')\n"
    )
    found, text = _run(_program(tmp_path, main=main))
    assert found == ["assigned", "default", "field", "lambda", "end"]
    assert "colorsys" in text, "an import that nobody uses is there for what it does"
    assert not [word for word in ("json", "dedent", "TypeVar", "gone", "Exception") if word in text]


@pytest.mark.parametrize(
    ("main", "fault"),
    [
        ("import one\n\n\ndef run_shipped():\n    print(one)\n", "one: a module is used as a value"),
        ("import one\n\n\ndef run_shipped():\n    one.value = 2\n", "one.value is no name of the program, or is set"),
        ("from .one import value\n", "from .one import value: cannot be linked"),
        ("from one import *\n", r"from one import \*: cannot be linked"),
        ("import os.path\n", "import os.path: give it a name with `as`"),
        ("from one import value\nvalue = 2\n", "value is imported, and bound otherwise too"),
        (
            "from one import value\n\n\ndef f():\n    global value\n    value = 2\n",
            "value is imported, and bound otherwise",
        ),
        ("from one import counter\n", "one.counter is set by `global`"),
        ("from one import missing\n", "one.missing: no such name"),
        ("try:\n    from one import value\nexcept ImportError:\n    value = 2\n", "only at the top, or plainly inside"),
        (
            "def run_shipped():\n    try:\n        from one import value\n    except ImportError:\n        pass\n",
            "catches ImportError, and imports modules of its own inside functions",
        ),
        ("value = 2\nfrom one import counter\n", "from one import counter: behind other statements"),
        ("def f():\n    import one\n", "import one: import names of it, with `from`"),
        ("value = 1\n\n\nclass A:\n    value = value\n", "class A has its own value, and reads the global one"),
        ("a__1 = 2\n", "a__1: a name of the linker's own kind"),
        ("def run_shipped():\n    return run_shipped.__name__\n", "looks at its own text, names or annotations"),
        ("def run_shipped():\n    return globals()\n", "looks at its own text, names or annotations"),
        ("class A:\n    def f(self):\n        return self.__f\n\n\ndef run_shipped():\n    A()\n", "looks at its own"),
    ],
)
def test_what_would_mean_something_else_is_refused(tmp_path: Path, main: str, fault: str) -> None:
    root = _program(
        tmp_path,
        main=main if "run_shipped" in main else f"{main}\n\ndef run_shipped(): ...\n",
        one="value = 1\ncounter = 0\n\n\ndef count():\n    global counter\n    counter += 1\n",
    )
    with pytest.raises(ValueError, match=fault):
        program_text(root, "main", [])


def test_settings_reach_the_program_as_namespaces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    main = (
        "from settings import Settings, Fit\n\n\n"
        "def fitted(fit: Fit) -> int:\n    return fit.steps * 1000\n\n\n"
        "def run_shipped(settings: Settings):\n    fit = settings.fit\n"
        "    result.append(fitted(fit) if fit is not None else settings.width)\n"
    )
    root = _program(tmp_path, main=main)
    found, text = _run(root, _settings(root, monkeypatch))
    assert found == [8]
    assert "too wide" not in text
    assert "Literal" not in text
    assert _run(root, _settings(root, monkeypatch, fit={"steps": 2}))[0] == [2000]


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("result.append(settings.shape.area)", 6),
        ("result.append(isinstance(settings, Settings))", True),
        ("match settings:\n        case Settings(width=width):\n            result.append(width)", 8),
        ("result.append(Fit.model_validate({'steps': 3}).steps)", 3),
        ("result.append(Fit(steps=4) == Fit(steps=4))", True),
        ("result.append(getattr(settings, 'wid' + 'th'))", 8),
        ("result.append(sorted(vars(settings)))", ["fit", "kind", "shape", "width"]),
        ("result.append(type(settings) is Settings)", True),
        ("result.append(isinstance(settings, BaseModel))", True),
    ],
)
def test_settings_keep_what_a_program_asks_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, expected: Any
) -> None:
    head = "from pydantic import BaseModel\nfrom settings import Fit, Settings\n\n\n"
    root = _program(tmp_path, main=f"{head}def run_shipped(settings: Settings):\n    {body}\n")
    assert _run(root, _settings(root, monkeypatch))[0] == [expected]


def test_of_a_table_the_chosen_entry_stays(tmp_path: Path) -> None:
    main = (
        "def plain():\n    return 'simple'\n\n\ndef fancy():\n    return 'costly'\n\n\n"
        "KINDS = {'plain': plain, 'fancy': fancy}\n\n\n"
        "def run_shipped(kind):\n    result.append(KINDS[kind]())\n"
    )
    root = _program(tmp_path, main=main)
    found, text = _run(root, "fancy", KINDS="fancy")
    assert found == ["costly"]
    assert "simple" not in text
    for table in ("KINDS", "OTHERS"):
        with pytest.raises(ValueError, match=f"main.{table}: no table with an entry 'absent'"):
            _run(root, "fancy", **{table: "absent"})


def test_arguments_by_name_reach_their_parameters(tmp_path: Path) -> None:
    main = (
        "order = []\n\n\ndef note(value):\n    order.append(value)\n    return value\n\n\n"
        "def three(first, second=20, *, third, unread=5):\n    return first, second, third\n\n\n"
        "class Pair:\n    def __init__(self, left, *, right):\n        self.left, self.right = left, right\n\n"
        "    def swap(self, *, twice=False):\n        return (1, 2) if twice else (self.right, self.left)\n\n\n"
        "def run_shipped():\n"
        "    result.append(three(third=note(3), first=note(1)))\n    result.append(three(1, third=3, unread=4))\n"
        "    result.append(Pair(right=2, left=1).swap(twice=True))\n    result.append(order)\n"
    )
    assert _run(_program(tmp_path, main=main))[0] == [(1, 20, 3), (1, 20, 3), (1, 2), [3, 1]]


def test_a_callback_keeps_the_names_of_its_parameters(tmp_path: Path) -> None:
    main = (
        "from functools import partial\n\n\ndef add(base, more):\n    return base + more\n\n\n"
        "def run_shipped():\n    call = partial(add, more=2)\n    result.append(call(base=1))\n"
    )
    assert _run(_program(tmp_path, main=main))[0] == [3]


def test_what_is_imported_inside_functions_runs_if_it_can(tmp_path: Path) -> None:
    """A module that lacks a package takes those along that need it, and nothing else."""
    main = (
        "def run_shipped():\n    if result:\n        from missing import gone\n        from after import also_gone\n"
        "        gone(), also_gone()\n    from there import here\n    result.append(here())\n"
    )
    root = _program(
        tmp_path,
        main=main,
        missing="import no_such_package\nfrom math import floor\n\n\ndef gone():\n    floor(1)\n",
        after="from missing import gone\n\nalso_gone = gone\n",
        there="from math import floor\n\n\ndef here():\n    return floor(1.5)\n",
    )
    assert _run(root)[0] == [1]


def test_annotations_stay_where_somebody_reads_them(tmp_path: Path) -> None:
    main = (
        "from dataclasses import dataclass, fields\nfrom functools import singledispatch\n"
        "from typing import ClassVar\n\n\n"
        "@singledispatch\ndef kind(thing):\n    return 'other'\n\n\n"
        "@kind.register\ndef whole(thing: int) -> str:\n    return 'whole'\n\n\n"
        "@dataclass\nclass Pair:\n    left: int\n    shared: ClassVar[int] = 1\n\n\n"
        "def run_shipped() -> None:\n    count: int = len(fields(Pair))\n"
        "    result.append((kind(1), kind('a'), count))\n"
    )
    found, text = _run(_program(tmp_path, main=main))
    assert found == [("whole", "other", 1)]
    assert "->" in text
    assert text.count("->") == 1


def test_tritons_functions_keep_their_annotations_and_no_branch_mistakes_a_local_for_a_global() -> None:
    """Triton's compiler looks up `out` of `out.store` among globals first, if a branch has it."""
    many = "\n".join(f"def function{i}(): return {i}" for i in range(60))
    kernel = (
        "import triton\nimport triton.language as tl\n@triton.jit\ndef kernel(out, n, WIDE: tl.constexpr):\n"
        "    HALF: tl.constexpr = WIDE // 2\n    if n > HALF:\n        out.store(n)\n"
    )
    called = "".join(f"print(function{i}())\n" for i in range(60)) + "kernel[(1,)](1, 2, 4)\n"
    tree = ast.parse(shorten(ast.parse(f"{many}\n{kernel}{called}")))
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    (short,) = [function for function in functions if function.decorator_list]
    assert [type(statement) for statement in short.body] == [ast.AnnAssign, ast.If]
    (asked,) = [node.value for node in ast.walk(short.body[1]) if isinstance(node, ast.Attribute)]
    assert isinstance(asked, ast.Name)
    assert asked.id in {argument.arg for argument in short.args.args}
    assert asked.id not in bound_names(tree.body)


def test_an_argument_of_a_kernel_that_calls_give_by_name_keeps_its_name() -> None:
    kernel = "import triton\n@triton.jit\ndef kernel(out, rows):\n    out.store(rows)\n"
    text = shorten(ast.parse(f"{kernel}kernel[(1,)](1, rows=2)\n"))
    (short,) = [node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)]
    assert [argument.arg for argument in short.args.args] == ["a", "rows"]


def test_a_class_given_as_an_argument_is_linked_though_no_module_imports_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    main = "def run_shipped(kind, size):\n    result.append(kind(size).doubled())\n"
    given = (
        "from helper import twice\n\n\nclass Chosen:\n    def __init__(self, size):\n        self.size = size\n\n"
        "    def doubled(self):\n        return twice(self.size)\n\n\n"
        "class Other:\n    word = 'another'\n"
    )
    root = _program(tmp_path, main=main, given=given, helper="def twice(size):\n    return 2 * size\n")
    monkeypatch.syspath_prepend(str(root))
    monkeypatch.delitem(sys.modules, "given", raising=False)
    found, text = _run(root, importlib.import_module("given").Chosen, 21)
    assert found == [42]
    assert "another" not in text


UNASKED = """
from abc import ABC, abstractmethod
from collections import UserList


class Base(ABC):
    @abstractmethod
    def wanted(self): ...

    @abstractmethod
    def unwanted(self): ...


class Own(Base):
    def wanted(self, extra=None):
        return ["own", extra]

    def unwanted(self):
        return helper("dropped")

    def ringing(self):
        return self.answering()

    def answering(self):
        return self.ringing()

    def made_up(self):
        return "made"

    def made_down(self):
        return "made too"

    def __len__(self):
        return 7

    @property
    def unread(self):
        return "dropped"


class Foreign(UserList):
    def append(self, item):
        super().append(item + 1)

    def unknown(self):
        return "kept"


def helper(word):
    return word


def loop(steps, points=None, every=3, *, log=None, named=0):
    done = []
    if points and (first := points.load()):
        done.append(first)
    for step in range(steps):
        done.append(step if points is None else points.save(step))
        if log is not None:
            log("dropped")
    return done, every, named


def generator(on=False):
    if on:
        yield 1


def changed(value=None):
    value = value or [1]
    return value


def passed_on(value=None):
    return value


def ends(flag=False):
    if not flag:
        return "early"
    return helper("dropped")


def run_shipped():
    own, foreign = Own(), Foreign()
    foreign.extend([1])
    result.append([own.wanted(), len(own), [getattr(own, f"made_{way}")() for way in ("up", "down")], list(foreign)])
    result.append([loop(2), loop(steps=1, named=5), list(generator()), changed(), ends()])
    result.append([[call() for call in (passed_on,)], passed_on(*[4])])
"""


def test_what_the_program_never_asks_for_falls_away(tmp_path: Path) -> None:
    """Methods that nothing names but one another, arguments that no call gives, branches that are never taken."""
    found, text = _run(_program(tmp_path, main=UNASKED))
    assert found == [
        [["own", None], 7, ["made", "made too"], [1]],
        [([0, 1], 3, 0), ([0], 3, 5), [], [1], "early"],
        [[None], 4],
    ]
    assert "dropped" not in text
    assert "kept" in text, "what a class from outside does with its methods is not known"
    assert not [word for word in ("points", "load", "save", "log", "unwanted", "ing()") if word in text]


def test_messages_say_nothing_of_the_repository(tmp_path: Path) -> None:
    main = (
        "def run_shipped(path='a'):\n"
        "    for left in (3, 2, 1):\n"
        "        try:\n"
        "            if left == 3:\n"
        "                raise OSError(f'{path}: no file; `python -m stages.tokenize` makes it')\n"
        "            if left == 2:\n"
        "                raise OSError(f'params.yaml: train.lr: {left}')\n"
        "            raise OSError('not finite (params.yaml: lower its lr)')\n"
        "        except OSError as error:\n"
        "            result.append(str(error))\n"
    )
    assert _run(_program(tmp_path, main=main))[0] == ["a: no file", "train.lr: 2", "not finite (lower its lr)"]
