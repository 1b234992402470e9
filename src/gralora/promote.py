"""Make an object of PEFT's an instance of a class of ours as well, with its state kept."""

import copy
import functools
from typing import Any


class Promoted:
    """Base of the mixins. Promoted classes are made at run time, so they pickle by their mixin and PEFT's class."""

    keeps_name = False  # whether a promoted class is named as PEFT's; else with "Gralora" in front

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _unpickle, type(self).__bases__, self.__dict__


@functools.cache
def promoted_class(mixin: Any, stock: Any) -> type:
    """The subclass of a class of PEFT's with a mixin in front, the same object at every call."""
    name = stock.__name__ if mixin.keeps_name else f"Gralora{stock.__name__}"
    return type(name, (mixin, stock), {"__module__": __name__})


class Transparent(Promoted):
    """Base of mixins that PEFT's class can do without: copied as what it is, pickled as an object of PEFT's class."""

    keeps_name = True

    def __reduce_ex__(self, protocol: Any) -> Any:
        return object.__new__, (type(self).__bases__[1],), self.__dict__

    def __copy__(self) -> Any:
        copied: Any = object.__new__(type(self))
        copied.__setstate__(self.__dict__)  # torch's
        return copied

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copied: Any = object.__new__(type(self))
        memo[id(self)] = copied
        copied.__setstate__(copy.deepcopy(self.__dict__, memo))
        return copied


def promote(obj: Any, mixin: Any) -> None:
    """Make `obj` an instance of the mixin as well. Its state, and the behaviour of adapters it had, stay.

    Raises:
        TypeError: if it is an instance of a mixin already that this one does not inherit from, and that would go on to
            answer for it.
    """
    if isinstance(obj, mixin):
        return
    before, stock = type(obj).__bases__ if isinstance(obj, Promoted) else (Promoted, type(obj))
    if not issubclass(mixin, before):
        raise TypeError(f"a {type(obj).__name__} cannot be promoted to {mixin.__name__} too.")
    obj.__class__ = promoted_class(mixin, stock)


def demote(obj: Any) -> None:
    """Make `obj` an instance of the class that it was of before, alone, with its state kept.

    Where another library has put a class of its own in front of ours, as FSDP2 does, all stays as it is.
    """
    mixin, *stock = type(obj).__bases__
    if issubclass(mixin, Promoted):
        obj.__class__ = stock[0]


def _unpickle(mixin: Any, stock: Any) -> Any:
    promoted: Any = promoted_class(mixin, stock)
    return promoted.__new__(promoted)
