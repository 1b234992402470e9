"""Make an object of PEFT's an instance of a class of ours as well, with its state kept."""

import functools
from typing import Any


class Promoted:
    """Base of the mixins. Promoted classes are made at run time, so they pickle by their mixin and PEFT's class."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _unpickle, type(self).__bases__, self.__dict__


@functools.cache
def promoted_class(*bases: type) -> type:
    """The subclass of PEFT's class, the last of `bases`, with mixins in front, the same object at every call."""
    name = bases[-1].__name__
    if name != "ParamWrapper":  # PEFT knows this one by its class's name
        name = f"Gralora{name}"
    return type(name, bases, {"__module__": __name__})


def promote(obj: Any, *mixins: type) -> None:
    """Make `obj` an instance of the mixins as well. Its state, and the behaviour of adapters it had, stay."""
    if not isinstance(obj, mixins):
        obj.__class__ = promoted_class(*mixins, type(obj))


def _unpickle(*bases: type) -> Any:
    promoted = promoted_class(*bases)
    return promoted.__new__(promoted)
