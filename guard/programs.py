"""Programs of ``torch.export`` from files that nobody vouches for.

``torch.export.load`` unpickles example inputs, weights and constants without restriction (torch 2.11 to 2.15), and
hands the strings of symbolic sizes to ``sympy.sympify``, which evaluates them. So the archive is looked through first:
what only a full unpickler could read, compiled code, foreign objects and odd expressions are refused.
"""

from __future__ import annotations

import io
import json
import os
import re
import warnings
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.export.pt2_archive._package import load_pt2

_EXPRESSION = re.compile(
    r"(?:Symbol\('[a-z]+\d++'(?:, (?:positive|integer|nonnegative)=(?:True|False))*+\)|[a-z]+\d++|int_oo|oo|"
    r"True|False|Eq|Ne|Add|Mul|Pow|Integer|Rational|Identity|ModularIndexing|"
    r"Le|Lt|Ge|Gt|Max|Min|Mod|FloorDiv|PythonMod|CleanDiv|CeilDiv|ToFloat|\d++|[-+*/(), <>=&|~])*+"
)
# Operators of torch but the one that maps files, and arithmetic on sizes; not _operator.call and its like.
_TARGET = re.compile(
    r"torch\.ops\.(?!aten\.from_file)\w+\.\w+\.\w+|torch\.sym_\w+|math\.(?:ceil|floor|trunc|sqrt|pow)|"
    r"_operator\.(?:getitem|add|sub|mul|truediv|floordiv|mod|pow|neg|pos|eq|ne|lt|le|gt|ge|and_|or_|not_)"
)


def load_program(path: str | os.PathLike[str]) -> ExportedProgram:
    """The program in a ``.pt2`` file.

    Raises:
        ValueError: the file asks for more than tensors and a graph. Others of torch's: it cannot be read.
    """
    reader = torch._C.PyTorchFileReader(os.fspath(path))
    names: list[str] = reader.get_all_records()
    if "models/model.json" not in names:
        raise ValueError("it holds no program of the archive format of torch 2.8 and later")
    for name in names:
        if name.startswith("data/aotinductor/"):
            raise ValueError("it holds compiled code")
        if name.endswith(".pt"):
            _plain(reader.get_record(name), name)
        elif name.endswith("_config.json"):
            for entry in json.loads(reader.get_record(name))["config"].values():
                if not re.fullmatch(r"(?:weight|tensor)_\d+", entry["path_name"]):
                    raise ValueError("it holds objects that are no tensors")
                if entry["use_pickle"]:
                    folder = name.rpartition("/")[0]
                    _plain(reader.get_record(f"{folder}/{entry['path_name']}"), entry["path_name"])
        elif name.startswith("models/"):
            _harmless(json.loads(reader.get_record(name)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, of its own code
        # not torch.export.load: where this raises, that falls back to an older format, unseen by the checks above
        program: ExportedProgram = load_pt2(os.fspath(path)).exported_programs["model"]
    return program


def _plain(pickled: bytes, name: str) -> None:
    """Refuse what the unpickler for plain tensors refuses."""
    if pickled:
        try:
            torch.load(io.BytesIO(pickled), weights_only=True)
        except Exception as error:
            raise ValueError(f"{name} could only be read by unpickling code") from error


def _harmless(value: Any) -> None:
    """Refuse, anywhere in a serialised graph, symbolic sizes that are more than arithmetic and calls of no operator."""
    if isinstance(value, dict):
        called = value.get("target") if "outputs" in value else None
        for text, allowed in ((value.get("expr_str"), _EXPRESSION), (called, _TARGET)):
            if text is not None and (not isinstance(text, str) or not allowed.fullmatch(text)):
                raise ValueError(f"its graph holds {str(text)[:60]!r}, which is no operator of torch and no size")
        for inner in value.values():
            _harmless(inner)
    elif isinstance(value, list):
        for inner in value:
            _harmless(inner)
