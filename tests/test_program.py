"""From modules to one short program: what is linked, decided, dropped and renamed, and that it still does the same."""

import ast
from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import BaseModel

from fairway.packing.bundle import program_text
from fairway.packing.link import link
from fairway.packing.names import bound_names, global_names
from fairway.packing.shorten import shorten


class Fit(BaseModel):
    """A section that may be absent."""

    steps: int


class Settings(BaseModel):
    """What the little programs below are packed for."""

    kind: Literal["plain", "fancy"] = "plain"
    width: int = 8
    layers: list[int] = [1, 2]
    fit: Fit | None = None


def _program(tmp_path: Path, **modules: str) -> Path:
    for name, text in modules.items():
        (tmp_path / f"{name}.py").write_text(text)
    (tmp_path / "tests_settings.py").write_text("")
    return tmp_path


def _run(root: Path, *arguments: Any) -> tuple[Any, str]:
    """What the packed program leaves in `result`, and its text."""
    text = program_text(root, "main", arguments)
    names: dict[str, Any] = {"__name__": "__main__", "result": []}
    exec(text, names)
    return names["result"], text


def _settings_module() -> str:
    """The classes above as a module of the program, so that its annotations can name them."""
    return (
        "from typing import Literal\nfrom pydantic import BaseModel\n"
        "class Fit(BaseModel):\n    steps: int\n"
        "class Settings(BaseModel):\n    kind: Literal['plain', 'fancy']\n    width: int\n    layers: list[int]\n"
        "    fit: Fit | None\n"
    )


def _settings(root: Path, monkeypatch: pytest.MonkeyPatch, **values: Any) -> Any:
    """An object of the program's own class of settings."""
    monkeypatch.syspath_prepend(str(root))
    monkeypatch.delitem(__import__("sys").modules, "settings", raising=False)
    module = __import__("settings")
    return module.Settings(**{"kind": "plain", "width": 8, "layers": [1, 2], "fit": None} | values)


def test_global_names_follow_the_scopes_of_the_language() -> None:
    code = "def f(a, b=c):\n    d = [e for e in g if e]\n    def h():\n        global d, i\n        return (d, a, j)\n"
    assert global_names(ast.parse(code)) == {"f", "c", "g", "d", "i", "j"}
    assert global_names(ast.parse("class A(B):\n    x = 1\n    def m(self):\n        return x\n")) == {"A", "B", "x"}
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


def test_a_module_as_a_value_is_refused(tmp_path: Path) -> None:
    root = _program(tmp_path, main="import one\n\n\ndef run_shipped():\n    print(one)\n", one="")
    with pytest.raises(ValueError, match="one: a module is used as a value"):
        link(root, "main")


def test_a_class_given_as_an_argument_is_linked_though_no_module_imports_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    main = "def run_shipped(kind, size):\n    result.append(kind(size).doubled())\n"
    given = (
        "from helper import twice\n\n\nclass Chosen:\n    def __init__(self, size):\n        self.size = size\n\n"
        "    def doubled(self):\n        return twice(self.size)\n\n    def unused(self):\n        return 'never'\n\n\n"
        "class Other:\n    word = 'another'\n"
    )
    root = _program(tmp_path, main=main, given=given, helper="def twice(size):\n    return 2 * size\n")
    monkeypatch.syspath_prepend(str(root))
    monkeypatch.delitem(__import__("sys").modules, "given", raising=False)
    found, text = _run(root, __import__("given").Chosen, 21)
    assert found == [42]
    assert "never" not in text
    assert "another" not in text


def test_settings_decide_branches_and_what_they_alone_need_falls_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    main = (
        "from settings import Settings, Fit\n\n\n"
        "def fitted(fit: Fit):\n    return fit.steps * 1000\n\n\n"
        "class Model:\n    def __init__(self, settings: Settings):\n        self.settings = settings\n"
        "        self.fit = settings.fit\n\n"
        "    def value(self):\n        if self.fit is not None:\n            return fitted(self.fit)\n"
        "        return self.settings.width\n\n    def unused(self):\n        return 'never'\n\n\n"
        "def run_shipped(settings: Settings):\n    result.append((Model(settings).value(), settings.layers))\n"
    )
    root = _program(tmp_path, main=main, settings=_settings_module())
    found, text = _run(root, _settings(root, monkeypatch))
    assert found == [(8, [1, 2])]
    assert "1000" not in text
    assert "never" not in text
    found, text = _run(root, _settings(root, monkeypatch, fit={"steps": 2}))
    assert found == [(2000, [1, 2])]


def test_a_table_of_all_options_keeps_the_chosen_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    main = (
        "from settings import Settings\n\n\n"
        "def plain():\n    return 'simple'\n\n\ndef fancy():\n    return 'costly'\n\n\n"
        "KINDS = {'plain': plain, 'fancy': fancy}\n\n\n"
        "def make(name):\n    if name not in KINDS:\n        raise ValueError(', '.join(KINDS))\n"
        "    return KINDS[name]()\n\n\n"
        "def run_shipped(settings: Settings):\n    result.append(make(settings.kind))\n"
    )
    root = _program(tmp_path, main=main, settings=_settings_module())
    found, text = _run(root, _settings(root, monkeypatch, kind="fancy"))
    assert found == ["costly"]
    assert "simple" not in text
    assert "ValueError" not in text


def test_fields_that_are_always_the_same_decide_branches_too(tmp_path: Path) -> None:
    main = (
        "from dataclasses import dataclass\n\n\n"
        "@dataclass\nclass Cut:\n    size: int\n    last: int | None = None\n    deep: bool = False\n"
        "    turned: bool = False\n\n"
        "    def wanted(self):\n"
        "        return self.size if self.last is None or not self.deep else 'rare' * self.last\n\n\n"
        "def run_shipped():\n    cut = Cut(1)\n    cut.turned = True\n"
        "    result.append((cut.wanted(), Cut(2, last=None).wanted(), 'turned' if cut.turned else 'straight'))\n"
    )
    found, text = _run(_program(tmp_path, main=main))
    assert found == [(1, 2, "turned")]
    assert "rare" not in text


@pytest.mark.parametrize(
    ("head", "body", "made"),
    [
        ("@dataclass", "@classmethod\n    def at(cls, last):\n        return cls(1, last)", "Cut.at(3)"),
        ("@dataclass", "def at(self, last):\n        return type(self)(1, last)", "Cut(1).at(3)"),
        ("@dataclass", "def at(self, last):\n        return replace(self, last=last)", "Cut(1).at(3)"),
        ("@dataclass", "def __post_init__(self):\n        object.__setattr__(self, 'last', 3)", "Cut(1)"),
        ("@dataclass", "def __init__(self, size):\n        self.size, self.last = size, 3", "Cut(1)"),
        ("@dataclass(kw_only=True)", "def at(self):\n        return self", "Cut(last=3, size=1)"),
        ("@dataclass", "more: int = field(default=0, init=False)", "Cut(1, 3)"),
        ("@dataclass", "more: ClassVar[int] = 3", "Cut(1, Cut.more)"),
    ],
)
def test_fields_that_are_filled_in_other_ways_stay_open(tmp_path: Path, head: str, body: str, made: str) -> None:
    main = (
        "from dataclasses import dataclass, field, replace\nfrom typing import ClassVar\n\n\n"
        f"{head}\nclass Cut:\n    size: int\n    last: int | None = None\n    {body}\n\n"
        "    def whole(self):\n        return self.last is None\n\n\n"
        f"def run_shipped():\n    cut = {made}\n"
        "    result.append((cut.size, cut.last, cut.whole()))\n"
    )
    assert _run(_program(tmp_path, main=main))[0] == [(1, 3, False)]


def test_a_store_by_a_function_that_is_no_method_counts(tmp_path: Path) -> None:
    main = (
        "from dataclasses import dataclass\n\n\n@dataclass\nclass Cut:\n    last: int | None = None\n\n"
        "    def whole(self):\n        return self.last is None\n\n\n"
        "class Other:\n    @staticmethod\n    def put(cut, value):\n        cut.last = value\n\n\n"
        "def run_shipped():\n    cut = Cut()\n    Other.put(cut, 3)\n    result.append(cut.whole())\n"
    )
    assert _run(_program(tmp_path, main=main))[0] == [False]


def test_a_parameter_that_is_set_anew_is_not_what_it_is_set_to(tmp_path: Path) -> None:
    main = (
        "def doubled(items, extra=None):\n    if extra is not None:\n        items, extra = [*items, extra], None\n"
        "    return items, extra\n\n\n"
        "def run_shipped():\n    result.append((doubled([1], len('ab')), doubled([1])))\n"
    )
    assert _run(_program(tmp_path, main=main))[0] == [(([1, 2], None), ([1], None))]


def test_what_a_lambda_does_when_it_is_made_is_done(tmp_path: Path) -> None:
    main = (
        "def note():\n    result.append('made')\n\n\n"
        "def run_shipped():\n    unread = lambda x=note(): x\n    result.append('end')\n"
    )
    assert _run(_program(tmp_path, main=main))[0] == ["made", "end"]


def test_a_loop_left_in_its_first_round_is_that_round(tmp_path: Path) -> None:
    main = (
        "def first(items):\n    for i in range(3):\n        items.append(i)\n        return items\n"
        "    return 'never'\n\n\n"
        "def all_of(items):\n    for i in range(3):\n        if i < 1:\n            continue\n"
        "        return items, i\n\n\n"
        "def run_shipped():\n    result.append((first([]), all_of([])))\n"
    )
    found, text = _run(_program(tmp_path, main=main))
    assert found == [([0], ([], 1))]
    assert "never" not in text


def test_what_changes_is_not_taken_for_a_constant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    main = (
        "from settings import Settings\n\nswitch = False\n\n\n"
        "class Thing:\n    def __init__(self):\n        self.mark = None\n        self.name = None\n\n\n"
        "def flip():\n    global switch\n    switch = True\n\n\n"
        "def run_shipped(settings: Settings):\n    thing = Thing()\n    thing.mark = 1\n    setattr(thing, 'name', 2)\n"
        "    total = 0\n    for width in (settings.width, 1):\n        total += width\n    flip()\n"
        "    result.append((thing.mark is None, thing.name is None, total, switch))\n"
    )
    root = _program(tmp_path, main=main, settings=_settings_module())
    assert _run(root, _settings(root, monkeypatch))[0] == [(False, False, 9, True)]


def test_a_program_that_makes_settings_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    main = "from settings import Fit, Settings\n\n\ndef run_shipped(settings: Settings):\n    Fit(steps=1)\n"
    root = _program(tmp_path, main=main, settings=_settings_module())
    with pytest.raises(ValueError, match="makes settings of its own"):
        program_text(root, "main", [_settings(root, monkeypatch)])


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
    main = (
        "def run_shipped():\n    from there import here\n    result.append(here())\n"
        "    if not result:\n        from missing import gone\n        gone()\n"
    )
    root = _program(
        tmp_path,
        main=main,
        there="def here():\n    return 1\n",
        missing="import no_such_package\n\n\ndef gone(): ...\n",
    )
    assert _run(root)[0] == [1]


def test_tritons_functions_keep_their_annotations_and_no_branch_mistakes_a_local_for_a_global() -> None:
    """Triton's compiler looks up `out` of `out.store` among globals first, if a branch has it."""
    many = "\n".join(f"def function{i}(): return {i}" for i in range(60))
    kernel = (
        "import triton\nimport triton.language as tl\n@triton.jit\ndef kernel(out, n, WIDE: tl.constexpr):\n"
        "    HALF: tl.constexpr = WIDE // 2\n    if n > HALF:\n        out.store(n)\n"
    )
    called = "".join(f"print(function{i}())\n" for i in range(60)) + "kernel[(1,)](1, 2, 4)\n"
    tree = ast.parse(shorten(ast.parse(f"{many}\n{kernel}{called}"), set()))
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    (short,) = [function for function in functions if function.decorator_list]
    assert [type(statement) for statement in short.body] == [ast.AnnAssign, ast.If]
    (asked,) = [node.value for node in ast.walk(short.body[1]) if isinstance(node, ast.Attribute)]
    assert isinstance(asked, ast.Name)
    assert asked.id in {argument.arg for argument in short.args.args}
    assert asked.id not in bound_names(tree.body)
