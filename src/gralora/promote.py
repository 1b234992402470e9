"""Make an object of PEFT's an instance of a class of ours as well, with its state kept."""

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


def promote(obj: Any, mixin: Any) -> None:
    """Make `obj` an instance of the mixin as well. Its state, and the behaviour of adapters it had, stay.

    Raises:
        TypeError: if it is an instance of another mixin already, which would go on to answer for this one.
    """
    if isinstance(obj, mixin):
        return
    if isinstance(obj, Promoted):
        raise TypeError(f"a {type(obj).__name__} cannot be promoted to {mixin.__name__} too.")
    stock: Any = type(obj)
    obj.__class__ = promoted_class(mixin, stock)


def _unpickle(mixin: Any, stock: Any) -> Any:
    promoted: Any = promoted_class(mixin, stock)
    return promoted.__new__(promoted)
