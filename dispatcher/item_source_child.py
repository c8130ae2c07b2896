"""The process in which an item source runs: `python -m dispatcher.item_source_child`.

Started by `item_source.py` and by nobody else; importing it elsewhere does nothing. It takes the
batch's params as JSON from standard input, calls the function, and writes one item a line to a pipe
of its own, so that whatever the function prints goes to the log and never between the items.

The last line says how it went: `!` and the number of items, or `?` and why there are no more. No
JSON text starts with either. Without such a line the list is not whole and is not used.
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from operator import attrgetter
from pathlib import Path
from threading import Thread
from typing import Any, BinaryIO

from dispatcher.errors import InvalidItems
from dispatcher.items import encode_items, refuse_non_items

__all__ = ["write_items"]


_FRAMES = 5
"""The last calls that a traceback shows."""


def write_items(spec: str, params: Mapping[str, Any], out: BinaryIO) -> None:
    """Call the function that `spec` names and write its items, and the line that ends them.

    Args:
        spec: `module:function`.
        params: the batch's params; the function gets those that it names, all if it has `**`.
        out: where the lines go.
    """
    count = 0
    try:
        for text in encode_items(_values(spec, params)):
            out.write(text.encode())
            out.write(b"\n")
            count += 1
    except InvalidItems as error:
        out.write(f"?{json.dumps(str(error))}\n".encode())
    else:
        out.write(f"!{count}\n".encode())
    out.flush()


def _values(spec: str, params: Mapping[str, Any]) -> Iterator[object]:
    """Give what the function gives; whatever goes wrong in its code comes out as `InvalidItems`."""
    name = spec.partition(":")[2]
    function = _imported(spec)
    arguments = _arguments(function, name, params)
    try:
        yield from _listed(function, arguments, name)
    except InvalidItems:
        raise
    except (Exception, SystemExit) as error:  # noqa: BLE001 - the user's code may raise anything
        _print(error)
        raise InvalidItems(f"{name}() raised {_one_line(error)}") from None


def _listed(
    function: Callable[..., object], arguments: Mapping[str, Any], name: str
) -> Iterable[object]:
    return refuse_non_items(function(**arguments), f"what {name}() returns")


def _imported(spec: str) -> Callable[..., object]:
    module_name, _, name = spec.partition(":")
    if not module_name or not name:
        raise InvalidItems("its name must have the form module:function")
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # noqa: BLE001 - the user's code may raise anything
        _print(error)
        raise InvalidItems(
            f"module {module_name!r} cannot be imported: {_one_line(error)} "
            f"(looked in {Path.cwd()} and on Python's path)"
        ) from None
    try:
        function = attrgetter(name)(module)
    except AttributeError:
        raise InvalidItems(f"module {module_name!r} has no {name!r}") from None
    if not callable(function):
        raise InvalidItems(f"{spec} is a {type(function).__name__} and not a function")
    return function  # type: ignore[no-any-return]  # callable, which is all that is known


def _arguments(
    function: Callable[..., object], name: str, params: Mapping[str, Any]
) -> Mapping[str, Any]:
    """Choose the params that the function names: a batch may have others, for its templates."""
    try:
        signature = inspect.signature(function)
    except ValueError:
        raise InvalidItems(
            f"{name} does not tell its parameters; name a plain Python function"
        ) from None
    parameters = signature.parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        taken = dict(params)
    else:
        names = {
            parameter.name
            for parameter in parameters
            if parameter.kind in {parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY}
        }
        taken = {key: value for key, value in params.items() if key in names}
    try:
        signature.bind(**taken)
    except TypeError as error:
        has = ", ".join(sorted(params)) or "none"
        raise InvalidItems(
            f"{name}() cannot be called with the batch's params: {error}; the batch has: {has}"
        ) from None
    return taken


def _print(error: BaseException) -> None:
    """Write the traceback to the log: of the user's own frames, and few enough for its tail."""
    trace = error.__traceback__
    # The frames of this module and of the import mean nothing to the reader.
    while trace is not None and (
        (file := trace.tb_frame.f_code.co_filename) in {__file__, importlib.__file__}
        or file.startswith("<frozen importlib")
    ):
        trace = trace.tb_next
    traceback.print_exception(type(error), error, trace, limit=-_FRAMES)


def _one_line(error: BaseException) -> str:
    return " ".join("".join(traceback.format_exception_only(error)).split())[:500]


def _die_with(lifeline: int) -> None:
    """Wait until the worker that started this process is gone, then end it and its children."""
    os.read(lifeline, 1)
    os.killpg(0, signal.SIGKILL)


def main() -> None:
    """Run as a process: SPEC, the pipe for items, and the pipe whose end means the worker's."""
    spec, out, lifeline = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    for descriptor in (out, lifeline):
        os.set_inheritable(descriptor, False)
    Thread(target=_die_with, args=(lifeline,), daemon=True).start()
    params = json.load(sys.stdin)
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    # The pipe itself stays open until the process ends, after the function's clean-up at exit.
    with open(out, "wb", buffering=1 << 16, closefd=False) as lines:
        write_items(spec, params, lines)


if __name__ == "__main__":
    main()
