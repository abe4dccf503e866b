"""Classes made at run time: a mixin in front of an object's class, under that class's name.

torch's FSDP makes its classes in the same way. Copies and pickles name the mixin and the class behind it.
"""

from __future__ import annotations

import functools
from typing import Any, ClassVar


class Mixin:
    """Base of mixins that :func:`mix_in` puts in front of a class.

    Attributes:
        class_behind: the object's class before.
    """

    class_behind: ClassVar[Any]

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(protocol)
        mixin = type(self).__mro__[1]
        return (_new, (mixin, self.class_behind), *reduced[2:])


def mix_in(mixin: type[Mixin], obj: Any) -> None:
    """Make the class of `obj` a subclass of `mixin` and of its present class, in this order."""
    front: Any = mixin
    behind: Any = type(obj)
    obj.__class__ = _joined(front, behind)


def restore_class(obj: Mixin) -> None:
    """Undo :func:`mix_in`."""
    obj.__class__ = obj.class_behind


@functools.cache
def _joined(mixin: Any, cls: Any) -> Any:
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "class_behind": cls}
    return type(cls.__name__, (mixin, cls), names)


def _new(mixin: Any, cls: Any) -> Any:
    joined = _joined(mixin, cls)
    return object.__new__(joined)
