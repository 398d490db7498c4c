"""train_gpt.py: the whole record in one self-extracting file.

The modules that the entry imports, directly or not, are found by reading their source, minified, compressed together
and written as base85 text behind a stub of three lines, which imports them from memory. The file needs the installed
packages and nothing of the repository. Same repository, same bytes.
Source: PR #1172 and #1493 ship LZMA2-raw + base85 of one minified script; #1958 measures Brotli instead.
"""

import ast
import base64
import json
import lzma
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import brotli
import python_minifier

# Modules with these words hand their source or their annotations to somebody: Triton's compiler, operators' schemas.
READ_BY_OTHERS = ("triton", "torch.library")

STUBS = {
    # {0} is the compressed text in base85.
    "brotli": 'import base64,brotli\np=brotli.decompress(base64.b85decode("{0}")).decode().split("\\0")\nexec(p[0])\n',
    "lzma": (
        "import base64,lzma\n"
        'p=lzma.decompress(base64.b85decode("{0}"),3,None,[{{"id":33,"preset":9}}]).decode().split("\\0")\n'
        "exec(p[0])\n"
    ),
}
# Gives every name that is imported from it.
LEFT_OUT = "def __getattr__(name): return None"
# Runs with the stub's p: [this, importer, settings, entry module, name, source, name, source, ...].
LOADER = """
exec(p[1])
install(dict(zip(p[4::2],p[5::2])))
if __name__=="__main__":
 import importlib,json
 importlib.import_module(p[3]).run_shipped(json.loads(p[2]))
"""


def bundle(root: Path, entry: str, settings: dict[str, Any], *, leave_out: Collection[str] = ()) -> bytes:
    """The file's bytes: `entry` (a module under `root`, say "stages.__main__") and all of `root` that it imports.

    Modules named in `leave_out` are imported but never used: they become empty ones. Started as a program the file
    calls `run_shipped(settings)` of the entry module; settings are JSON values.
    """
    modules = import_closure(root, entry, leave_out)
    importer = minify((root / "stages/compress/importer.py").read_text(encoding="utf-8"))
    parts = [LOADER.strip(), importer, json.dumps(settings, separators=(",", ":")), entry]
    for name in sorted(modules):
        parts += [name, minify(modules[name])]
    return _self_extracting("\0".join(parts).encode())


def import_closure(root: Path, entry: str, leave_out: Collection[str] = ()) -> dict[str, str]:
    """Source by module name: `entry`, every module of `root` that it imports anywhere in its text, their packages."""
    found: dict[str, str] = {}
    wanted = [entry]
    while wanted:
        name = wanted.pop()
        path = _module_file(root, name)
        if name in found or path is None:
            continue
        found[name] = LEFT_OUT if name in leave_out else path.read_text(encoding="utf-8") if path.is_file() else ""
        wanted += [*_imports(found[name]), *_parents(name)]
    return found


def minify(source: str) -> str:
    """The same module in fewer bytes: no comments, docstrings or argument annotations, short local names."""
    keep = any(word in source for word in READ_BY_OTHERS)
    annotations = python_minifier.RemoveAnnotationsOptions(
        remove_variable_annotations=not keep,
        remove_return_annotations=not keep,
        remove_argument_annotations=not keep,
        # Fields of pydantic models and dataclasses are annotations.
        remove_class_attribute_annotations=False,
    )
    return python_minifier.minify(
        source,
        remove_annotations=annotations,
        remove_literal_statements=True,
        # Repeated literals cost little once compressed; names of their own for them cost more.
        hoist_literals=False,
        rename_locals=not keep,
        prefer_single_line=True,
    )


def _imports(source: str) -> Iterator[str]:
    """Every module name that may be meant by an import statement; `from a import b` may mean the module a.b."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts))]


def _module_file(root: Path, name: str) -> Path | None:
    """The file of a module of `root`; the folder of a package without __init__.py; None for anybody else's module."""
    path = root / name.replace(".", "/")
    if path.with_suffix(".py").is_file():
        return path.with_suffix(".py")
    if path.is_dir():
        return path / "__init__.py" if (path / "__init__.py").is_file() else path
    return None


def _self_extracting(payload: bytes) -> bytes:
    """The shorter of the Brotli and the raw LZMA2 form."""
    lzma2 = [{"id": lzma.FILTER_LZMA2, "preset": 9}]
    compressed = {
        "brotli": brotli.compress(payload, quality=11, lgwin=24),
        "lzma": lzma.compress(payload, format=lzma.FORMAT_RAW, filters=lzma2),
    }
    files = [STUBS[name].format(base64.b85encode(data).decode()) for name, data in compressed.items()]
    return min(files, key=len).encode()
