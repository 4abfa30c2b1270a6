"""A program and its tests in two sandboxes, linked by two pipes.

What the tests ask of the program goes over the link, a line there and a line back, so that a program can neither see
nor meddle with what judges it. A function that returns an object rather than plain data returns a number to the tests,
which stands for the object when they call it, pass it on, or read and set its attributes.
"""

from __future__ import annotations

import builtins
import json
from types import CodeType, ModuleType

from selfroute.tasks.inside.program import load
from selfroute.tasks.inside.wire import pack, unpack

TYPE_CHECKING = False  # importing typing would take as long as all the others
if TYPE_CHECKING:
    from typing import IO, Any


def serve(start: dict[str, Any], case: str, answers: int) -> None:
    """Answer what tests ask of the program: a name, a call, an attribute, and setting one."""
    names = load(start["program"], "solution", start["setup"])
    kept: list[Any] = []

    def keep(value: Any) -> int:
        kept.append(value)
        return len(kept) - 1

    receive, send = _files(start["link"])
    for line in receive:
        try:
            what, *rest = unpack(json.loads(line), kept.__getitem__)
            if what == "name":
                if rest[0] not in names:
                    raise NameError(f"name {rest[0]!r} is not defined")
                result = names[rest[0]]
            elif what == "call":
                result = rest[0](*rest[1], **rest[2])
            elif what == "get":
                result = getattr(*rest)
            else:
                setattr(*rest)
                result = None
            reply = json.dumps([True, pack(result, keep)])
        except Exception as error:
            reply = json.dumps([False, type(error).__name__, str(error)[:1000]])
        send.write(reply + "\n")
        send.flush()


class _Remote:
    """Something of the program's, as its tests see it: to call, and to read and set attributes of."""

    def __init__(self, link: _Link, name: str, number: int = -1) -> None:
        self.__dict__.update(_link=link, _name=name, _number=number)

    def _at(self) -> _Remote:
        """Itself, known by number to the program; what has only a name is looked up now."""
        if self._number < 0:
            found = self._link.ask("name", self._name)
            if not isinstance(found, _Remote):
                raise TypeError(f"{self._name} is neither a function nor a class")
            self.__dict__["_number"] = found._number
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._link.ask("call", self._at(), args, kwargs)

    def __getattr__(self, name: str) -> Any:
        return self._link.ask("get", self._at(), name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._link.ask("set", self._at(), name, value)


class _Link:
    """The way from tests to the program: a line there, a line back."""

    def __init__(self, numbers: list[int]) -> None:
        self.receive, self.send = _files(numbers)
        self.asked = False

    def ask(self, *request: Any) -> Any:
        self.asked = True
        line = json.dumps(pack(request, self._number))
        try:
            self.send.write(line + "\n")
            self.send.flush()
            line = self.receive.readline(1 << 24)
        except OSError:
            line = ""
        if not line:
            raise EOFError("the program ended before it answered")
        worked, result, *message = unpack(json.loads(line), lambda number: _Remote(self, "", number))
        if worked is True:
            return result
        kind = getattr(builtins, str(result), None)
        if isinstance(kind, type) and issubclass(kind, Exception):
            raise kind(*message)
        raise Exception(f"{result}: {message}")

    @staticmethod
    def _number(value: Any) -> int:
        if not isinstance(value, _Remote):
            raise TypeError(f"the tests pass a {type(value).__name__}, which cannot be sent to the program")
        return int(value._at()._number)


def _files(numbers: list[int]) -> tuple[IO[str], IO[str]]:
    return open(numbers[0], encoding="utf-8"), open(numbers[1], "w", encoding="utf-8")


def tests(start: dict[str, Any], case: str, answers: int) -> None:
    """Run tests, and say which was the first to fail, and how; the program is at the other end of the link."""
    given = json.loads(case)
    link, module = _Link(start["link"]), ModuleType("tests")
    names, number = module.__dict__, 0
    try:
        for text in given["setup"]:
            _bind(names, text, link)
            exec(compile(text, "setup.py", "exec"), names)
        # What is judged is never what the setup defines, such as the empty function of a prompt.
        names.update({name: _Remote(link, name) for name in given["names"]})
        for text in given["tests"]:
            number += 1
            _bind(names, text, link)
            exec(compile(text, "tests.py", "exec"), names)
        if not link.asked:
            raise LookupError("the tests ask nothing of the program")
        verdict: dict[str, Any] = {"passed": number}
    except BaseException as error:
        place = error.__traceback__
        lines = text.splitlines()
        failed = ""
        while place is not None:
            if place.tb_frame.f_code.co_filename == "tests.py" and place.tb_lineno <= len(lines):
                failed = lines[place.tb_lineno - 1].strip()
            place = place.tb_next
        verdict = {"failed": number, "line": failed, "error": f"{type(error).__name__}: {error}"}
    with open(answers, "w", encoding="utf-8") as file:
        file.write(json.dumps(verdict))


def _bind(names: dict[str, Any], text: str, link: _Link) -> None:
    """Bind the names that a text uses and nobody has defined to the program's."""
    codes: list[CodeType] = [compile(text, "tests.py", "exec")]
    for code in codes:
        codes += [inner for inner in code.co_consts if isinstance(inner, CodeType)]
        for name in code.co_names:
            if name not in names and not hasattr(builtins, name):
                names[name] = _Remote(link, name)
