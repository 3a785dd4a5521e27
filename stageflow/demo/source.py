"""What one Python file holds: functions, classes, imports, complexity, docstrings, and the words on its lines.

Pure functions over bytes and text. May not import the engine: any of this can be used and tested without a pipeline.
"""

from __future__ import annotations

import ast
import io
import os
import re
import tokenize
import warnings
from collections.abc import Iterator
from itertools import pairwise
from typing import Final

import msgspec

_NOT_SOURCE: Final = frozenset({"__pycache__", "site-packages", "dist-packages", "node_modules"})
_WORD: Final = re.compile(r"[^\W\d]\w+")
_BRANCHES: Final = (
    ast.If,
    ast.IfExp,
    ast.For,
    ast.AsyncFor,
    ast.While,
    ast.ExceptHandler,
    ast.comprehension,
    ast.match_case,
)

#: nothing is counted on these or below them, and they are most of any tree; lists also hold names as plain text
_LEAVES: Final = (ast.Name, ast.Constant, ast.expr_context, ast.operator, ast.cmpop, ast.alias, str, type(None))


class SourceFile(msgspec.Struct, frozen=True):
    """The bytes of one file, or the reason why there are none. `number` counts the files of the walk from 0."""

    number: int
    path: str  #: relative to the root, with forward slashes
    data: bytes = b""
    skipped: str = ""


class Module(msgspec.Struct, frozen=True):
    """The facts about one file; all zero if it was `skipped`, which then says why."""

    number: int
    path: str
    skipped: str = ""
    nbytes: int = 0
    lines: int = 0
    functions: int = 0
    classes: int = 0
    imports: tuple[str, ...] = ()  #: top-level names of absolute imports, sorted
    complexity: int = 0  #: sum over the functions of the module (cyclomatic: 1 + branches)
    worst: str = ""  #: the most complex function
    worst_line: int = 0
    worst_complexity: int = 0
    public: int = 0  #: the module and its public classes and functions
    documented: int = 0  #: how many of those have a docstring


class Parsed(msgspec.Struct, frozen=True):
    """A module's facts with its text, which is empty if the module was skipped."""

    module: Module
    text: str = ""


class Words(msgspec.Struct, frozen=True):
    """A module's facts with where each word stands: word -> packed entry (see `pack_entry`)."""

    module: Module
    entries: dict[str, bytes] = {}


def python_files(root: str) -> Iterator[str]:
    """Paths of the Python files under `root`, relative, in a fixed order.

    Folders that cannot be listed are passed over.
    """
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if name not in _NOT_SOURCE and not name.startswith("."))
        for name in sorted(names):
            if name.endswith(".py"):
                yield os.path.relpath(os.path.join(folder, name), root).replace(os.sep, "/")


def analyse(source: SourceFile) -> Parsed:
    """Parse one file. A file that is no valid Python gives a skipped module with the reason, never an exception."""
    if source.skipped:
        return Parsed(Module(source.number, source.path, skipped=source.skipped))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old code has invalid escapes by the hundred; they are not our findings
            tree = ast.parse(source.data, source.path)
        text = _decode(source.data)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return Parsed(Module(source.number, source.path, skipped=_reason(error), nbytes=len(source.data)))
    return Parsed(_measure(tree, source, lines=text.count("\n") + (not text.endswith("\n"))), text)


def words_of(parsed: Parsed) -> Words:
    """The identifiers and words of a module, in lower case, with the lines they stand on."""
    found: dict[str, list[int]] = {}
    for number, line in enumerate(parsed.text.lower().split("\n"), 1):
        for word in _WORD.findall(line):
            if word in found:
                found[word].append(number)
            else:
                found[word] = [number]
    document = parsed.module.number
    return Words(parsed.module, {word: pack_entry(document, lines) for word, lines in found.items()})


def pack_entry(document: int, lines: list[int]) -> bytes:
    """Variable-length integers: document, number of occurrences, first line, then the distance of each further line."""
    head = _varint(document) + _varint(len(lines)) + _varint(lines[0])
    steps = [after - before for before, after in pairwise(lines)]
    if not steps or max(steps) < 128:
        return head + bytes(steps)  # one byte each: the usual case, at the speed of C
    return head + b"".join(map(_varint, steps))


def unpack_entries(data: bytes) -> Iterator[tuple[int, list[int]]]:
    """Undo `pack_entry` for any number of entries one after the other: (document, lines) of each."""
    values = _varints(data)
    for document in values:
        count = next(values)
        line = next(values)
        lines = [line]
        for _ in range(count - 1):
            line += next(values)
            lines.append(line)
        yield document, lines


def _varint(value: int) -> bytes:
    if value < 128:
        return bytes((value,))
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def _varints(data: bytes) -> Iterator[int]:
    value = shift = 0
    for byte in data:
        value |= (byte & 127) << shift
        if byte < 128:
            yield value
            value = shift = 0
        else:
            shift += 7


def _decode(data: bytes) -> str:
    encoding, _ = tokenize.detect_encoding(io.BytesIO(data).readline)
    return data.decode(encoding)


def _reason(error: Exception) -> str:
    if isinstance(error, SyntaxError):
        line = f" (line {error.lineno})" if error.lineno else ""
        return f"not valid Python: {error.msg}{line}"
    return f"not readable as Python: {type(error).__name__}: {error}"


def _measure(tree: ast.Module, source: SourceFile, *, lines: int) -> Module:
    """One pass over the tree without recursion; each branch counts for the innermost function around it."""
    names: list[str] = [""]  # row 0 is the module's own level
    starts: list[int] = [0]
    branches: list[int] = [0]
    classes = 0
    public = 1
    documented = int(ast.get_docstring(tree, clean=False) is not None)
    imports: set[str] = set()
    # A row of the stack: node, function it belongs to, dotted prefix of the names inside it, may they be public.
    stack: list[tuple[ast.AST, int, str, bool]] = [(tree, 0, "", True)]
    while stack:
        node, owner, prefix, open_ = stack.pop()
        if isinstance(node, _BRANCHES):
            branches[owner] += 1
        elif isinstance(node, ast.BoolOp):
            branches[owner] += len(node.values) - 1
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            seen = open_ and not node.name.startswith("_")
            public += seen
            documented += seen and ast.get_docstring(node, clean=False) is not None
            if isinstance(node, ast.ClassDef):
                classes += 1
                open_ = seen
            else:
                owner = len(names)
                names.append(prefix + node.name)
                starts.append(node.lineno)
                branches.append(0)
                open_ = False
            prefix = f"{prefix}{node.name}."
        elif isinstance(node, ast.Import):
            imports.update(alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            imports.add(node.module.partition(".")[0])
        for field in node._fields:
            value = getattr(node, field, None)
            if isinstance(value, list):
                stack.extend([(child, owner, prefix, open_) for child in value if not isinstance(child, _LEAVES)])
            elif isinstance(value, ast.AST) and not isinstance(value, _LEAVES):
                stack.append((value, owner, prefix, open_))
    worst = max(range(1, len(names)), key=lambda row: (branches[row], -starts[row]), default=0)
    return Module(
        number=source.number,
        path=source.path,
        nbytes=len(source.data),
        lines=lines,
        functions=len(names) - 1,
        classes=classes,
        imports=tuple(sorted(imports)),
        complexity=sum(branches[1:]) + len(names) - 1,
        worst=names[worst],
        worst_line=starts[worst],
        worst_complexity=branches[worst] + 1 if worst else 0,
        public=public,
        documented=documented,
    )
