"""Shared state: records and maps whose fields are cells.

Everything that more than one task can see lives in a :class:`Shared` record (one cell per annotated field) or in a
:class:`SharedMap` (one cell per key). Values are immutable: integers, strings, bytes, tuples, enum members, ``None``,
frozen dataclasses, or references to other shared objects. Model code reads and writes them as plain attributes and
items.

In a live run (solo, replay, random, timed) that is exactly what they are: slots and dictionary entries, with no
overhead. The explorer swaps the class of every object for a *tracked twin* with the same layout, whose accesses go
through a :class:`Recorder`. So one source runs at full speed and can also be taken apart cell by cell, and no model
code knows which of the two is happening. A :class:`Journal` does the same with twins that only log what a write
replaces, so that a machine can be put back to an earlier state in time proportional to what was written since.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from operator import itemgetter
from typing import Any, ClassVar, Generic, Protocol, TypeVar

K = TypeVar("K")
V = TypeVar("V")

#: A cell: the shared object and the field or key in it.
Cell = tuple[Any, Any]

#: Key of the pseudo-cell that stands for "which keys does this map hold" (only for maps that are iterated).
KEYS = "*keys*"


class Recorder(Protocol):
    """What a tracked access calls; the explorer has one for recording a step and one for feeding a step back."""

    def read(self, owner: Any, key: Any, value: Any) -> Any:
        """Called with the cell's present value; returns the value that the model is to see."""

    def write(self, owner: Any, key: Any, old: Any, new: Any) -> bool:
        """Called before a write; returns whether the write is to be carried out."""


class Fixed:
    """Base of objects that tasks hold on to but never change: all that changes behind them is in cells.

    Two references to one such object are equal in every local state, whatever it holds.
    """

    __slots__ = ()


class World(Fixed):
    """The shared objects of one scenario, in order of creation, and whether their accesses are tracked."""

    def __init__(self) -> None:
        self.objects: list[Any] = []
        self._names: dict[str, int] = {}
        self._dress: Callable[[type], type] | None = None
        self.recorder: Recorder | None = None

    def adopt(self, obj: Any, name: str) -> str:
        """Registers a new shared object and returns its unique name."""
        seen = self._names.get(name, 0)
        self._names[name] = seen + 1
        self.objects.append(obj)
        if self._dress is not None:
            object.__setattr__(obj, "__class__", self._dress(type(obj)))
        return name if not seen else f"{name}#{seen}"

    def mark(self) -> tuple[int, dict[str, int]]:
        """Which objects there are now."""
        return len(self.objects), dict(self._names)

    def forget(self, mark: tuple[int, dict[str, int]]) -> None:
        """Drops the objects made since ``mark``: made again, they get the same names."""
        count, names = mark
        del self.objects[count:]
        self._names = dict(names)

    def track(self, recorder: Recorder | None) -> None:
        """Turns tracking on (with a recorder) or off (with ``None``) for every object of the world."""
        self.recorder = recorder
        Tracking.recorder = recorder
        self.dress(twin if recorder is not None else None)

    def dress(self, to_twin: Callable[[type], type] | None) -> None:
        """Gives every object of the world, now and later, the twin of its class (``None``: its own class again)."""
        if to_twin is self._dress:
            return
        for obj in self.objects:
            plain = type(obj) if self._dress is None else type(obj).__mro__[1]
            object.__setattr__(obj, "__class__", plain if to_twin is None else to_twin(plain))
        self._dress = to_twin


class Journal:
    """An undo log: what every write to a cell of a world has replaced, in order.

    Writing costs a list entry, reading nothing. Marks nest: ``undo`` to an earlier mark also undoes what later ones
    kept. One journal at a time is in force in a process; objects made meanwhile stay, with the values they began with.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self._log: list[tuple[Any, Any, Any]] = []
        self._copied = [owner for owner in world.objects if isinstance(owner, BriefMap)]
        Tracking.log = self._log
        world.dress(logging_twin)

    def mark(self) -> int:
        """A name for the present state."""
        mark = len(self._log)
        self._log += [(owner, BriefMap, dict(owner)) for owner in self._copied]
        return mark

    def position(self) -> int:
        """How much was logged so far: what :meth:`written` counts from."""
        return len(self._log)

    def written(self, owner: Any, position: int) -> list[Any]:
        """The keys of a map, or fields of a record, that were written since a position, each once."""
        return list(dict.fromkeys(key for cell, key, _ in self._log[position:] if cell is owner))

    def undo(self, mark: int) -> None:
        """Puts every cell back to what it was at ``mark``, which stays a name for that state."""
        log = self._log
        for owner, key, value in reversed(log[mark:]):
            if key is BriefMap:
                dict.clear(owner)
                dict.update(owner, value)
            # As poke() does, without a call for each of the many PAMT entries.
            elif isinstance(owner, SharedMap):
                if value == owner.default:
                    _raw_pop(owner, key, None)
                else:
                    _raw_put(owner, key, value)
            else:
                poke(owner, key, value)
        del log[mark + len(self._copied) :]

    def close(self) -> None:
        """Stops logging; the world keeps its state."""
        self.world.dress(None)

    def resume(self) -> None:
        """Logs again after an exploration, or when another journal has been in force meanwhile."""
        Tracking.world, Tracking.log = self.world, self._log
        self.world.dress(logging_twin)


class Tracking:
    """What is in force: recorder, log, and the world that adopts new objects (one scenario at a time in a process)."""

    recorder: ClassVar[Recorder | None] = None
    log: ClassVar[list[tuple[Any, Any, Any]]] = []
    world: ClassVar[World] = World()


class _SharedMeta(type):
    """Turns annotations into slots and remembers their defaults."""

    _defaults: dict[str, Any]

    def __new__(mcs, name: str, bases: tuple[type, ...], space: dict[str, Any]) -> _SharedMeta:
        if "__slots__" not in space:
            declared = [f for f, kind in space.get("__annotations__", {}).items() if "ClassVar" not in str(kind)]
            defaults = {f: space.pop(f) for f in declared if f in space}
            space["__slots__"] = tuple(declared)
            inherited: dict[str, Any] = {}
            for base in bases:
                inherited |= getattr(base, "_defaults", {})
            space["_defaults"] = inherited | defaults
        return super().__new__(mcs, name, bases, space)


class Shared(metaclass=_SharedMeta):
    """A record of shared state: each annotated field of a subclass is one cell.

    ``name`` appears in diagrams and reports; it is made unique within the world. Fields without a default must be
    given by keyword.
    """

    __slots__ = ("name",)
    _defaults: ClassVar[dict[str, Any]] = {}
    name: str

    def __init__(self, name: str, **values: Any) -> None:
        # Defaults go in by slot, not by attribute: setting up a record is not a step of the model.
        for field, value in (self._defaults | values).items():
            object.__setattr__(self, field, value)
        object.__setattr__(self, "name", Tracking.world.adopt(self, name))

    def __repr__(self) -> str:
        return self.name


class SharedMap(dict[K, V], Generic[K, V]):
    """A sparse map of shared state: each key is one cell, and a key that is absent has the value ``default``.

    Absence and the default are one state, so use :meth:`store`, which removes an entry when it returns to the
    default; plain item assignment is for values that are never the default. ``iterated`` maps may be walked with
    :meth:`sorted_items`; the others refuse, because walking makes every insertion conflict with it.
    """

    __slots__ = ("default", "iterated", "name")

    def __init__(self, name: str, default: Any = None, *, iterated: bool = False) -> None:
        super().__init__()
        self.default = default
        self.iterated = iterated
        self.name = Tracking.world.adopt(self, name)

    def __missing__(self, key: K) -> V:
        return self.default  # type: ignore[no-any-return]

    def store(self, key: K, value: V) -> None:
        """Writes a cell; an entry that returns to the default leaves the map."""
        if value == self.default:
            self.pop(key, None)
        else:
            self[key] = value

    def sorted_items(self) -> list[tuple[K, V]]:
        """All entries in key order (only for maps made with ``iterated=True``)."""
        if not self.iterated:
            raise TypeError(f"{self.name} is not an iterated map")
        return sorted(self.items(), key=itemgetter(0))

    def __hash__(self) -> int:  # type: ignore[override]
        return id(self)

    def __eq__(self, other: object) -> bool:
        return self is other

    def __repr__(self) -> str:
        return self.name


class BriefMap(SharedMap[K, V]):
    """A map that is written often and holds next to nothing between calls: lock words.

    A journal copies it at each mark, and logs none of its writes. It has to exist before the journal.
    """

    __slots__ = ()


# --------------------------------------------------------------------------------------------------------------------
# Tracked twins
# --------------------------------------------------------------------------------------------------------------------

_twins: dict[type, type] = {}
_raw_get = dict.get
_raw_contains = dict.__contains__
_raw_put = dict.__setitem__
_raw_pop = dict.pop


def twin(cls: type) -> type:
    """The tracked class of ``cls``: same layout, every access through the recorder."""
    found = _twins.get(cls)
    if found is None:
        space = _map_twin_space() if issubclass(cls, SharedMap) else _record_twin_space(cls)
        metaclass: Any = type(cls)
        found = metaclass(cls.__name__, (cls,), space)
        _twins[cls] = found
    return found


_logging_twins: dict[type, type] = {}


def logging_twin(cls: type) -> type:
    """The class of ``cls`` in a journaled world: same layout, reads as before, writes log the value they replace."""
    found = _logging_twins.get(cls)
    if found is None:
        if issubclass(cls, BriefMap):
            space: dict[str, Any] = {}
        else:
            space = _logging_map_space() if issubclass(cls, SharedMap) else {"__setattr__": _logging_setattr}
        found = _logging_twins[cls] = type(cls)(cls.__name__, (cls,), {"__slots__": (), **space})
    return found


def _logging_setattr(self: Any, field: str, value: Any) -> None:
    Tracking.log.append((self, field, getattr(self, field)))
    object.__setattr__(self, field, value)


def _logging_map_space() -> dict[str, Any]:
    def put(self: Any, key: Any, value: Any) -> None:
        Tracking.log.append((self, key, _raw_get(self, key, self.default)))
        _raw_put(self, key, value)

    def pop(self: Any, key: Any, *default: Any) -> Any:
        if _raw_contains(self, key):
            Tracking.log.append((self, key, _raw_get(self, key)))
        return _raw_pop(self, key, *default)

    return {"__setitem__": put, "__delitem__": lambda self, key: pop(self, key) and None, "pop": pop}


def cells_of(cls: type) -> dict[str, Any]:
    """Field name to slot descriptor, over the whole inheritance chain (``name`` is not a cell)."""
    slots: dict[str, Any] = {}
    for base in reversed(cls.__mro__):
        for field in base.__dict__.get("__slots__", ()):
            if field != "name":
                slots[field] = base.__dict__[field]
    return slots


def _record_twin_space(cls: type) -> dict[str, Any]:
    space: dict[str, Any] = {"__slots__": ()}
    for field, slot in cells_of(cls).items():
        space[field] = _tracked_field(field, slot)
    return space


def _tracked_field(field: str, slot: Any) -> property:
    get, put = slot.__get__, slot.__set__

    def read(self: Any) -> Any:
        recorder = Tracking.recorder
        assert recorder is not None
        return recorder.read(self, field, get(self))

    def write(self: Any, value: Any) -> None:
        recorder = Tracking.recorder
        assert recorder is not None
        if recorder.write(self, field, get(self), value):
            put(self, value)

    return property(read, write)


def _map_twin_space() -> dict[str, Any]:
    def current(self: Any, key: Any) -> Any:
        recorder = Tracking.recorder
        assert recorder is not None
        return recorder.read(self, key, _raw_get(self, key, self.default))

    def put(self: Any, key: Any, value: Any) -> None:
        recorder = Tracking.recorder
        assert recorder is not None
        old = _raw_get(self, key, self.default)
        before = keys_of(self) if self.iterated else None
        if recorder.write(self, key, old, value):
            poke(self, key, value)
            if before is not None and (after := keys_of(self)) != before:
                recorder.write(self, KEYS, before, after)

    def get(self: Any, key: Any, default: Any = None) -> Any:
        value = current(self, key)
        return default if value == self.default else value

    def pop(self: Any, key: Any, *default: Any) -> Any:
        value = current(self, key)
        if value == self.default:
            if default:
                return default[0]
            raise KeyError(key)
        put(self, key, self.default)
        return value

    def keys(self: Any) -> Iterator[Any]:
        if not self.iterated:
            raise TypeError(f"{self.name} is not an iterated map")
        recorder = Tracking.recorder
        assert recorder is not None
        return iter(recorder.read(self, KEYS, keys_of(self)))

    return {
        "__slots__": (),
        "__getitem__": current,
        "__setitem__": put,
        "__delitem__": lambda self, key: pop(self, key) and None,
        "__contains__": lambda self, key: current(self, key) != self.default,
        "__iter__": keys,
        "__len__": lambda self: len(tuple(keys(self))),
        "get": get,
        "pop": pop,
        "keys": keys,
        "items": lambda self: [(key, current(self, key)) for key in keys(self)],
        "values": lambda self: [current(self, key) for key in keys(self)],
    }


def keys_of(table: Any) -> tuple[Any, ...]:
    """The keys of a map in sorted order, without tracking."""
    return tuple(sorted(dict.keys(table)))


def peek(owner: Any, key: Any) -> Any:
    """The value of a cell, without tracking."""
    if isinstance(owner, SharedMap):
        return keys_of(owner) if key is KEYS else _raw_get(owner, key, owner.default)
    return _slot_of(type(owner), key).__get__(owner)


def poke(owner: Any, key: Any, value: Any) -> None:
    """Sets a cell, without tracking."""
    if isinstance(owner, SharedMap):
        if key is KEYS:
            return
        if value == owner.default:
            dict.pop(owner, key, None)
        else:
            dict.__setitem__(owner, key, value)
    else:
        _slot_of(type(owner), key).__set__(owner, value)


_slots: dict[tuple[type, str], Any] = {}


def _slot_of(cls: type, field: str) -> Any:
    found = _slots.get((cls, field))
    if found is None:
        found = _slots[cls, field] = next(
            base.__dict__[field]
            for base in cls.__mro__
            if field in base.__dict__.get("__slots__", ()) and field in base.__dict__
        )
    return found
