"""The documentation of the running Python as training data: real text on every machine, with no network.

Docstrings are read from the standard library's source with `ast`, which runs none of it; modules written in C have no
source and are imported.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import random
import re
import sys
import sysconfig
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

SKIPPED = {
    "test",
    "idlelib",
    "lib2to3",
    "turtledemo",
    "ensurepip",
    "antigravity",
    "this",
    "pydoc_data",
    "tests",
    "site-packages",
    "__main__",
}
IN_C = [
    *("array", "atexit", "binascii", "builtins", "cmath", "errno", "faulthandler", "fcntl", "gc", "grp", "itertools", "marshal", "math"),
    *("mmap", "pwd", "pyexpat", "resource", "select", "sys", "syslog", "termios", "time", "unicodedata", "zlib"),
]
LONGEST_ANSWER = 600
"""Characters of documentation that make an answer, in whole paragraphs."""

Function = ast.FunctionDef | ast.AsyncFunctionDef


class Entry(NamedTuple):
    """A documented module, class or function."""

    name: str
    kind: str
    """`module`, `class` or `function`."""
    signature: str
    doc: str


def documents() -> Iterator[dict[str, str]]:
    """Yield {"text"}: the documentation of each module, then each topic of the language reference."""
    for entries in _modules():
        yield {"text": "\n\n".join(_section(entry) for entry in entries)}
    for name, text in _topics():
        yield {"text": f"{name}\n\n{text}"}


def conversations() -> Iterator[dict[str, Any]]:
    """Yield {"messages"}: a question about each documented name, and the opening paragraphs of its documentation."""
    asked = set()
    for entries in _modules():
        for entry in entries:
            question, answer = _question(entry), _answer(entry.doc)
            if question not in asked and len(answer) >= 20:
                asked.add(question)
                yield {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def pairs() -> Iterator[dict[str, Any]]:
    """Yield {"prompt", "chosen", "rejected"}: of every third question the documented answer, and its words in another order.

    Both answers have the same words, so that neither length nor vocabulary tells which is preferred.
    """
    for row in islice(conversations(), 0, None, 3):
        question, answer = (message["content"] for message in row["messages"])
        words = answer.split()
        scrambled = random.Random(question).sample(words, len(words))  # the same on every machine
        if scrambled != words:
            yield {"prompt": question, "chosen": " ".join(words), "rejected": " ".join(scrambled)}


def _question(entry: Entry) -> str:
    if entry.kind == "module":
        return f"What is the module `{entry.name}` for?"
    return f"What is `{entry.name}`?" if entry.kind == "class" else f"What does `{entry.name}` do?"


def _answer(doc: str) -> str:
    """Return the first paragraphs of a docstring, up to LONGEST_ANSWER characters in all, without a leading signature line."""
    paragraphs = [re.sub(r"[ \t]+", " ", part).strip() for part in re.split(r"\n\s*\n", doc)]
    paragraphs = [part for part in paragraphs if part and not re.fullmatch(r"[\w.]+\(.*\)(\s*->.*)?", part)]
    if not paragraphs:
        return ""
    answer = paragraphs[0][:LONGEST_ANSWER]
    for part in paragraphs[1:]:
        if len(answer) + 2 + len(part) > LONGEST_ANSWER or part.startswith(">>>"):
            break
        answer = f"{answer}\n\n{part}"
    return answer


def _section(entry: Entry) -> str:
    head = f"module {entry.name}" if entry.kind == "module" else f"{entry.name}{entry.signature}"
    return f"{head}\n\n{entry.doc}"


def _modules() -> Iterator[list[Entry]]:
    """Yield the documented names of each public module, the module itself first; modules without any are left out."""
    for name, file in _source_files():
        entries = _entries_of_source(name, file)
        if entries:
            yield entries
    for name in IN_C:
        entries = _entries_of_import(name)
        if entries:
            yield entries


def _source_files() -> Iterator[tuple[str, Path]]:
    """Yield (module name, file) of the standard library's public modules, sorted."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for file in sorted(root.rglob("*.py")):
        parts = file.relative_to(root).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        if not parts or parts[0] not in sys.stdlib_module_names or any(part.startswith("_") or part in SKIPPED for part in parts):
            continue
        yield ".".join(parts), file


def _entries_of_source(name: str, file: Path) -> list[Entry]:
    try:
        tree = ast.parse(file.read_text("utf-8"))
    except (SyntaxError, UnicodeDecodeError, OSError):
        return []
    doc = ast.get_docstring(tree)
    entries = [Entry(name, "module", "", doc)] if doc else []
    return entries + list(_entries_of_body(name, tree.body))


def _entries_of_body(prefix: str, body: list[ast.stmt]) -> Iterator[Entry]:
    for node in body:
        if not isinstance(node, ast.ClassDef | Function) or node.name.startswith("_"):
            continue
        name, doc = f"{prefix}.{node.name}", ast.get_docstring(node)
        if isinstance(node, ast.ClassDef):
            if doc:
                yield Entry(name, "class", "", doc)
            yield from _entries_of_body(name, node.body)
        elif doc:
            yield Entry(name, "function", f"({ast.unparse(node.args)})", doc)


def _entries_of_import(name: str) -> list[Entry]:
    try:
        module = importlib.import_module(name)
    except ImportError:  # not on this platform
        return []
    doc = inspect.getdoc(module)
    entries = [Entry(name, "module", "", doc)] if doc else []
    prefix = "" if name == "builtins" else f"{name}."
    for key in sorted(vars(module)):
        if not key.startswith("_"):
            entries.extend(_entries_of_object(f"{prefix}{key}", getattr(module, key)))
    return entries


def _entries_of_object(name: str, value: object) -> Iterator[Entry]:
    if isinstance(value, type):
        doc = value.__doc__
        if isinstance(doc, str) and doc.strip():
            yield Entry(name, "class", "", inspect.cleandoc(doc))
        for key in sorted(vars(value)):
            if not key.startswith("_") and callable(getattr(value, key, None)):
                yield from _entries_of_object(f"{name}.{key}", getattr(value, key))
    elif callable(value):
        doc = getattr(value, "__doc__", None)
        if isinstance(doc, str) and doc.strip():
            yield Entry(name, "function", _signature(value), inspect.cleandoc(doc))


def _signature(value: Any) -> str:
    try:
        return str(inspect.signature(value))
    except (ValueError, TypeError):
        return "(...)"


def _topics() -> Iterator[tuple[str, str]]:
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield name, topics[name].strip()
