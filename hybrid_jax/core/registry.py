"""Named components: the only lists of names that a config may use.

A component is a frozen dataclass, its fields are its settings. It enters a registry by name:

    @REWARDS.register("length")
    @dataclass(frozen=True)
    class Length: ...

and a config says ``{name: length, target: 20}``. Code outside the package needs no registration: ``name:
my_package.my_module:MyReward`` imports it, where the name is trusted. No name is unless the caller says so, for
what a file that came with a model or a run names would otherwise run on this machine.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import operator
import sys
from collections.abc import Callable, Container, Iterator, Mapping
from typing import Any, Generic, TypeVar

from hybrid_jax.core.errors import Untrusted, UserError

T = TypeVar("T")
E = TypeVar("E")


class _Everything:
    def __contains__(self, name: object) -> bool:
        return True


NOTHING: Container[str] = frozenset()
EVERYTHING: Container[str] = _Everything()  # for what the user gives on the command line or from Python


def names_in(settings: Any) -> frozenset[str]:
    """Collects every text in nested settings, whatever it means: the names that their author has chosen."""
    if isinstance(settings, str):
        return frozenset({settings})
    if isinstance(settings, Mapping):
        settings = [*settings, *settings.values()]
    if isinstance(settings, list | tuple):
        return frozenset().union(*map(names_in, settings))
    return frozenset()


class Registry(Generic[T]):
    """Maps names to component classes (or functions) of one kind.

    Args:
        kind: what to call an entry in an error.
        default: the entry that a config means by ``true``, and by settings without a name; ``false`` is none.
        needs: attributes of every component, which code of a user's may have forgotten.
        as_it_is: its entries are functions and classes to call, not settings: any class will do.
    """

    def __init__(
        self, kind: str, default: str | None = None, needs: tuple[str, ...] = (), as_it_is: bool = False
    ):
        self.kind, self.needs, self.as_it_is = kind, needs, as_it_is
        self.default = default
        self._entries: dict[str, Any] = {}
        self._risks: dict[str, str] = {}
        self._imported: dict[str, Any] = {}

    def register(self, name: str, risk: str | None = None) -> Callable[[E], E]:
        """Adds an entry.

        Args:
            name: in a config.
            risk: something that only the user may ask for, such as "unpickles its checkpoint".
        """

        def add(entry: E) -> E:
            if name in self._entries:
                raise ValueError(f"{self.kind} {name!r} is registered twice")
            self._entries[name] = entry
            if risk is not None:
                self._risks[name] = risk
            return entry

        return add

    def find(self, name: str, trust: Container[str] = NOTHING) -> Any:
        """Finds the entry that a config names; other code is imported if its name is in ``trust``.

        Raises:
            Untrusted: the name runs code or is risky, and is not in ``trust``.
            UserError: there is no such entry.
        """
        risk = "runs code of its own" if ":" in name else self._risks.get(name)
        if risk is not None and name not in trust:
            if _lives_only_in_python(name):  # no trust would help
                raise self._given_from_python(name)
            asked = "which only a config that you give yourself may ask for"
            raise Untrusted(f"{self.kind} {name!r} {risk}, {asked}")
        return self._import(name) if ":" in name else self[name]

    def __getitem__(self, name: str) -> Any:
        if name not in self._entries:
            raise UserError(f"unknown {self.kind} {name!r}; {_with_colon(name)}{suggest(name, self._entries)}")
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._entries))

    def name_of(self, entry: Any) -> str:
        """The name under which a config finds ``entry`` (an instance, or the entry itself)."""
        wanted = entry if is_definition(entry) else type(entry)
        # The own name of a decorated function, a lambda or an alias finds something else, or nothing.
        for name, known in (*self._entries.items(), *self._imported.items()):
            if known is wanted:
                return name
        name = f"{wanted.__module__}:{wanted.__qualname__}"
        if _lives_only_in_python(name) or _found(name) is wanted:
            return name
        return f"{wanted.__module__}:<{wanted.__qualname__}>"

    def _import(self, name: str) -> Any:
        module_name, _, attribute = name.partition(":")
        try:
            entry = operator.attrgetter(attribute)(importlib.import_module(module_name))
            self._imported[name] = entry
            return entry
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # the module may do anything when it is imported, even end the program
            if _lives_only_in_python(name):
                raise self._given_from_python(name) from error
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            if module_name.endswith(".py"):
                module = module_name.removesuffix(".py").replace("/", ".")
                reason = f"before the colon stands a module, not a file: {module}:{attribute}"
            raise UserError(f"{self.kind} {name!r} cannot be imported: {reason}") from error

    def _given_from_python(self, name: str) -> UserError:
        return UserError(
            f"{self.kind} {name!r} was given from Python and lives only there: go on with "
            "HybridTrainer in that program, or move it into a module"
        )


def _with_colon(name: str) -> str:
    """A hint for ``module.thing``, which was probably meant as ``module:thing``."""
    module, dot, attribute = name.rpartition(".")
    return f"code of your own has a colon: {f'{module}:{attribute}'!r}; " if dot and attribute else ""


def _found(name: str) -> Any:
    """Finds the object that ``module:attribute`` names in a module that is imported already; else None."""
    module_name, _, attribute = name.partition(":")
    try:
        return operator.attrgetter(attribute)(sys.modules[module_name])
    except (KeyError, AttributeError):
        return None


def _lives_only_in_python(name: str) -> bool:
    return name.startswith("__main__:") or "<" in name


def is_definition(entry: Any) -> bool:
    """Tells whether it is a class or a function (a compiled or decorated one, too), rather than an instance."""
    return inspect.isclass(entry) or (callable(entry) and hasattr(entry, "__qualname__"))


def suggest(name: str, known: Iterator[str] | dict | set | list | tuple) -> str:
    """Names the nearest known name, then all of them, for an error message."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}known: {', '.join(names) or 'none'}"
