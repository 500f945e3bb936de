"""The jinja2 environment of chat templates, with a budget of time and memory.

A template is a program from a model file. The environment renders the same text as that of transformers, but computes nothing
while a template is compiled, and everything that makes a value (operators, literals, slices, filters, methods, macros, output)
goes through `Budget`: it estimates and counts the size of a result before the result exists, and reads the clock. The size of
a container is that of its written form, so two references to one list count twice. Thus no single comparison or output of a
value can take longer than the budget allows.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import re
import secrets
import string
import time
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from datetime import datetime
from typing import Any, NamedTuple

from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.ext import Extension, loopcontrols
from jinja2.runtime import markup_join, str_join
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

_LONGEST = 1 << 18  # limit of a template, in characters
_BITS = 1 << 14  # limit of an integer
_DIGITS = 1000  # limit for `round`
_CONTAINER = 200  # bytes of a container without its parts, with its entry in `Budget`


class Limits(NamedTuple):
    """The limits of one rendering: seconds of processor time, and bytes of all values that it makes."""

    seconds: float = 1.0
    nbytes: int = 64 << 20


class RefusedError(Exception):
    """The template called `raise_exception`."""


class OverBudgetError(Exception):
    """A rendering would exceed its limits."""


class Budget:
    """The time and memory left for one rendering."""

    def __init__(self, limits: Limits) -> None:
        self.limits, self.left = limits, limits.nbytes
        self._end = time.thread_time() + limits.seconds
        self._sizes: dict[int, tuple[Any, int]] = {}  # of containers by id; they are kept alive, so that no id is used twice

    def tick(self) -> bool:
        """Reads the clock; always true."""
        if time.thread_time() > self._end:
            raise OverBudgetError(f"takes longer than {self.limits.seconds:g} s")
        return True

    def need(self, nbytes: int) -> None:
        """Raises OverBudgetError if less is left."""
        self.tick()
        if nbytes > self.left:
            raise OverBudgetError(f"needs more than {self.limits.nbytes >> 20} MiB")

    def take(self, nbytes: int) -> None:
        """Counts bytes of a new value."""
        self.need(nbytes)
        self.left -= nbytes

    def check(self, value: Any) -> Any:
        """The value. Raises OverBudgetError if its written form is larger than the whole budget."""
        if self.size(value) > self.limits.nbytes:
            self.need(self.limits.nbytes + 1)
        return value

    def size(self, value: Any) -> int:
        """Bytes of the written form of a value, at least 16 for each part of a container."""
        if isinstance(value, str):
            return len(value) * (1 if value.isascii() else 4)
        if isinstance(value, bytes):
            return len(value)
        if isinstance(value, int):
            return value.bit_length() // 2
        if not isinstance(value, list | tuple | dict):
            return 64
        known = self._sizes.get(id(value))
        if known is None:
            parts = value if not isinstance(value, dict) else [part for item in value.items() for part in item]
            known = self._sizes[id(value)] = value, sum(16 + self.size(part) for part in parts)
            self.left -= _CONTAINER
            self.tick()
        return known[1]

    def made(self, value: Any) -> Any:
        """Counts a value and returns it. An iterator becomes one that counts its items."""
        if isinstance(value, str | bytes):
            self.take(self.size(value))
        elif isinstance(value, list | tuple | dict):
            self.take(16 * len(self.check(value)))
        elif isinstance(value, int):
            require_bits(value.bit_length())
        elif isinstance(value, Iterator):
            return self._counted(value)
        self.tick()
        return value

    def _counted(self, values: Iterator) -> Iterator:
        for value in values:
            self.take(16)
            yield self.check(value)


def require_bits(bits: int) -> None:
    if bits > _BITS:
        raise OverBudgetError(f"makes an integer of {bits} bits; at most {_BITS} are allowed")


_BUDGET: ContextVar[Budget] = ContextVar("budget")  # LookupError while a template is compiled
_MARKS: ContextVar[tuple[str, str]] = ContextVar("marks", default=("", ""))


@contextlib.contextmanager
def marking() -> Iterator[tuple[str, str]]:
    """Within it, templates render each `{% generation %}` between two texts that no message can contain; yields these."""
    secret = secrets.token_hex(16)
    marks = f"<{secret}>", f"</{secret}>"
    before = _MARKS.set(marks)
    try:
        yield marks
    finally:
        _MARKS.reset(before)


# ---- the size of a result, before it is made


def _numbers(text: str) -> int:
    return sum(int(digits) if len(digits) < 10 else 10**10 for digits in re.findall(r"\d+", text))


def _of_format(budget: Budget, text: str, args: Any) -> int:
    """The size of `text.format(args)`."""
    fields = [(field, spec or "") for _, field, spec, _ in string.Formatter().parse(text) if field is not None]
    width = sum(_numbers(spec) for _, spec in fields)
    size = budget.size(args)
    budget.need(size)
    if any("{" in spec for _, spec in fields):
        width += len(fields) * _numbers(str(args))
    return len(text) + len(fields) * size + width


def _of_percent(budget: Budget, text: str, args: Any) -> int:
    """The size of `text % args`."""
    budget.need(len(text) * text.count("%(") >> 2)  # for a name without an end, the whole text is searched
    fields = re.findall(r"%(?:\([^)]*\))?([-#0 +]*(?:\*|\d+)?(?:\.(?:\*|\d+)?)?)", text)
    values = [abs(arg) for arg in (args if isinstance(args, tuple) else (args,)) if isinstance(arg, int)]
    stars = sum("*" in field for field in fields) * sum(values)
    return len(text) + len(fields) * budget.size(args) + sum(map(_numbers, fields)) + stars


def _of_operator(budget: Budget, operator: str, left: Any, right: Any) -> int:
    if operator == "%" and isinstance(left, str | bytes):
        return _of_percent(budget, left if isinstance(left, str) else left.decode("latin-1"), right)
    if isinstance(left, int) and isinstance(right, int):
        if operator in ("*", "**"):
            bits = left.bit_length()
            require_bits(bits + right.bit_length() if operator == "*" else bits * max(right, 0))
        return 0
    if operator == "*":
        return budget.size(left) * max(right, 0) if isinstance(right, int) else budget.size(right) * max(left, 0)
    return budget.size(left) + budget.size(right) if operator == "+" else 0


_PADDING = {"center", "ljust", "rjust", "zfill", "expandtabs", "to_bytes", "batch", "slice", "indent"}
# Python compares each position of the text with the whole other text.
_EACH_WITH_ALL = {"rfind", "rindex", "rsplit", "rpartition", "strip", "lstrip", "rstrip", "trim"}
_SQUARE = {"pprint", "striptags", "urlize", "wordwrap", "encode", "decode"}  # the time grows with the square of the length
_TIMES = {"escape": 5, "e": 5, "forceescape": 5, "urlencode": 9, "xmlattr": 6, "tojson": 6, "splitlines": 32, "title": 32,
          "wordcount": 32, "upper": 3, "lower": 3, "capitalize": 3, "string": 1}  # fmt: skip
_BY_ITEM = {"list", "sort", "unique", "map", "select", "reject", "selectattr", "rejectattr", "groupby", "min", "max", "sum",
            "dictsort", "items", "reverse", "batch", "slice", "join"}  # fmt: skip


def _of_call(budget: Budget, name: str, value: Any, args: tuple, kwargs: dict[str, Any]) -> int:
    """The size of the result of a filter or of a method of a text. For the method `join`, `value` is the list."""
    given = [*args, *kwargs.values()]
    texts = [arg for arg in given if isinstance(arg, str | bytes)]
    whole, count = budget.size(value), len(value) if hasattr(value, "__len__") else 0
    need = whole * _TIMES.get(name, 0) + 64 * count * (name in _BY_ITEM)
    if name in _PADDING:
        width = sum(abs(arg) for arg in given if type(arg) is int) + sum(map(len, texts))
        times = {"indent": count + 1, "expandtabs": count, "batch": 4, "slice": 4}
        need += whole + 4 * width * times.get(name, 1)
    elif name == "replace":
        pairs = itertools.permutations([arg if isinstance(arg, str | bytes) else str(arg) for arg in given], 2)
        value = value if isinstance(value, str | bytes) else str(value)
        need += whole + max((value.count(old) * budget.size(new) for old, new in pairs if type(old) is type(new)), default=0)
    elif name == "join":
        need = whole + count * (16 + sum(map(budget.size, given)))
    elif name == "translate" and args and isinstance(args[0], dict):
        need += count * max(map(budget.size, args[0].values()), default=0)
    elif name in _EACH_WITH_ALL:
        need += whole * max(map(len, texts), default=0) >> 6
    elif name in _SQUARE:
        need += (whole * whole >> 8) + count * sum(map(len, texts))
    elif name == "strftime_now":
        need += 256 * sum(map(len, texts))
    elif name == "round" and any(isinstance(arg, int) and abs(arg) > _DIGITS for arg in given):
        raise OverBudgetError(f"rounds to more than {_DIGITS} digits")
    elif name in ("format", "format_map") and isinstance(value, str):
        need += _of_format(budget, value, given)
    if name in ("split", "rsplit"):
        need += 64 * value.count(texts[0]) if texts and texts[0] else 32 * whole
    return need


# ---- the environment


def _guarded(name: str, function: Callable) -> Callable:
    """A filter whose result is counted."""
    skip = hasattr(function, "jinja_pass_arg")

    @functools.wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        budget = _BUDGET.get()
        before, value, rest = args[:skip], args[skip], args[skip + 1 :]
        if name == "join" and isinstance(value, Iterator):
            value = budget.made(list(value))
        budget.need(sum(map(budget.size, (*rest, *kwargs.values()))))
        if name == "format":
            budget.need(_of_percent(budget, str(value), kwargs or rest))
        else:
            budget.need(_of_call(budget, name, value, rest, kwargs))
        return budget.made(function(*before, value, *rest, **kwargs))

    return guarded


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    options: dict[str, Any] = {"ensure_ascii": ensure_ascii, "separators": separators, "sort_keys": sort_keys}
    if indent is None and separators is None:
        return json.dumps(value, **options)
    budget = _BUDGET.get()
    budget.need(1000 * (len(indent) if isinstance(indent, str) else indent or 0))  # JSON cannot be nested deeper
    chunks = []
    for chunk in json.JSONEncoder(indent=indent, **options).iterencode(value):
        budget.take(budget.size(chunk))
        chunks.append(chunk)
    return "".join(chunks)


class _Namespace(Namespace):
    def __repr__(self) -> str:  # the attributes could refer to other namespaces many times
        return "<Namespace>"


class _Generation(Extension):
    """`{% generation %}` marks the assistant's part for training: it renders its content, between marks if `marking`."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        begin, end = (nodes.Output([nodes.EnvironmentAttribute(name)], lineno=line) for name in ("begin_mark", "end_mark"))
        return nodes.Scope([begin, *body, end], lineno=line)


class _Generator(CodeGenerator):
    """Generates Python code that counts every value it makes, and computes nothing at compile time."""

    environment: Environment

    def enter_frame(self, frame: Frame) -> None:
        super().enter_frame(frame)
        self.environment.reads |= {name for action, name in frame.symbols.loads.values() if action == "resolve" and name}

    def _output_child_to_const(self, node: nodes.Expr, frame: Frame, finalize: Any) -> str:
        if not isinstance(node, nodes.TemplateData):
            raise nodes.Impossible
        return super()._output_child_to_const(node, frame, finalize)

    def visit_For(self, node: nodes.For, frame: Frame) -> None:
        tick = nodes.EnvironmentAttribute("tick", lineno=node.lineno)
        node.body.insert(0, nodes.ExprStmt(tick, lineno=node.lineno))
        node.test = node.test and nodes.And(tick, node.test, lineno=node.lineno)
        super().visit_For(node, frame)

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.joined(context, (")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")

    def _counted(self, name: str, node: nodes.Node, frame: Frame, before: str = "environment.made(") -> None:
        self.write(before)
        getattr(super(), name)(node, frame)
        self.write(")")

    def visit_List(self, node: nodes.List, frame: Frame) -> None:
        self._counted("visit_List", node, frame)

    def visit_Dict(self, node: nodes.Dict, frame: Frame) -> None:
        self._counted("visit_Dict", node, frame)

    def visit_Tuple(self, node: nodes.Tuple, frame: Frame) -> None:
        if node.ctx == "load":
            self._counted("visit_Tuple", node, frame)
        else:
            super().visit_Tuple(node, frame)

    def visit_Getitem(self, node: nodes.Getitem, frame: Frame) -> None:
        if isinstance(node.arg, nodes.Slice):
            self._counted("visit_Getitem", node, frame)
        else:
            super().visit_Getitem(node, frame)

    def visit_Compare(self, node: nodes.Compare, frame: Frame) -> None:
        self._counted("visit_Compare", node, frame, "(environment.tick and ")

    def visit_Test(self, node: nodes.Test, frame: Frame) -> None:
        self._counted("visit_Test", node, frame, "(environment.tick and ")


class Environment(ImmutableSandboxedEnvironment):
    """The environment of one template. `reads`: the variables that it reads."""

    code_generator_class = _Generator
    intercepted_binops = frozenset(ImmutableSandboxedEnvironment.default_binop_table)

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,
            finalize=self._shown,
            extensions=[_Generation, loopcontrols],
        )
        self.reads: set[str] = set()
        self.filters["tojson"] = _tojson
        self.filters["sum"] = self._sum
        self.filters = {name: _guarded(name, function) for name, function in self.filters.items()}
        del self.globals["lipsum"]
        self.globals["namespace"] = _Namespace
        self.globals["raise_exception"] = self._raise
        self.globals["dict"] = lambda *args, **kwargs: dict(*args, **kwargs)  # not the class, which has methods
        self.globals["strftime_now"] = strftime_now

    @property
    def tick(self) -> bool:
        return _BUDGET.get().tick()

    @property
    def begin_mark(self) -> str:
        return _MARKS.get()[0]

    @property
    def end_mark(self) -> str:
        return _MARKS.get()[1]

    def made(self, value: Any) -> Any:
        return _BUDGET.get().made(value)

    def joined(self, context: Any, parts: tuple) -> str:
        """`a ~ b`."""
        budget = _BUDGET.get()
        budget.need(sum(map(budget.size, parts)))
        return budget.made((markup_join if context.eval_ctx.autoescape else str_join)(parts))

    def concat(self, chunks: Iterable[str]) -> str:  # type: ignore[override]
        budget, parts = _BUDGET.get(), []
        for chunk in chunks:
            budget.take(budget.size(chunk))
            parts.append(chunk)
        return "".join(parts)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        budget = _BUDGET.get()
        budget.need(_of_operator(budget, operator, left, right))
        return budget.made(super().call_binop(context, operator, left, right))

    def getitem(self, obj: Any, argument: Any) -> Any:
        _BUDGET.get().tick()
        return super().getitem(obj, argument)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        budget = _BUDGET.get()
        budget.need(sum(map(budget.size, (*args, *kwargs.values()))))
        method = getattr(__obj, "__wrapped__", __obj)  # a text's `format` comes wrapped
        owner, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
        if name == "join" and args and isinstance(args[0], Iterator):
            args = (budget.made(list(args[0])), *args[1:])
        if name == "join" and args:
            budget.need(_of_call(budget, name, args[0], (owner,), kwargs))
        elif isinstance(owner, str | bytes | int) or method is strftime_now:
            budget.need(_of_call(budget, name, owner, args, kwargs))
        return budget.made(super().call(__context, __obj, *args, **kwargs))

    def _shown(self, value: Any) -> Any:
        """Checks a value before it is written."""
        budget = _BUDGET.get()
        budget.need(budget.size(value))
        return value

    def _sum(self, values: Iterable, attribute: str | int | None = None, start: Any = 0) -> Any:
        for value in values:
            names = [] if attribute is None else [int(n) if n.isdigit() else n for n in str(attribute).split(".")]
            part = functools.reduce(self.getitem, names, value)
            start = self.call_binop(None, "+", start, part)
        return start

    @staticmethod
    def _raise(message: object) -> None:
        raise RefusedError(str(message)[:2000])


def strftime_now(format: str) -> str:
    """The current time in the template's format."""
    return datetime.now().strftime(format)


class Compiled:
    """A template ready to be rendered. `reads`: the variables that it reads."""

    def __init__(self, text: str) -> None:
        """Raises errors of jinja2 and Python if the text cannot be compiled."""
        if len(text) > _LONGEST:
            raise ValueError(f"has {len(text)} characters; at most {_LONGEST} are allowed")
        self._environment = Environment()
        self._template = self._environment.from_string(text)
        self.reads = frozenset(self._environment.reads)

    def render(self, variables: dict[str, Any], limits: Limits) -> str:
        """Renders the text. Raises OverBudgetError, RefusedError, and any error of the template itself."""
        token = _BUDGET.set(Budget(limits))
        try:
            return self._environment.concat(self._template.root_render_func(self._template.new_context(variables)))
        finally:
            _BUDGET.reset(token)
