"""What a delta does to the parameters of a matrix, and how a bundle names it (spec/BUNDLE.md, TSK-6 to TSK-8).

An operation is one row of :data:`OPERATIONS`. Names, shapes and arithmetic follow from it, in both directions: saving
turns a delta of a model into a name (:func:`delta_name`), loading a name into a module and an operation
(:func:`split_delta`). Numpy only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ..errors import BundleError
from ..matrix import F32, Params
from ..schema import ModuleEntry

SAVED = "modules_to_save."  # names of saved tensors begin with it; all other names are deltas (TSK-6)


def _multiply(scales: F32, delta: F32) -> None:
    scales *= (np.float32(1) + delta)[..., None]


def _add(values: F32, delta: F32) -> None:
    values += delta


@dataclass(frozen=True)
class Operation:
    """How a delta changes parameters.

    Attributes:
        name: in a bundle, behind the name of the module: the role of the changed parameter, a dot, and a verb.
        axes: of the delta, of ``"planes"``, ``"rows"`` and ``"groups"``. Those of stacked experts stand in front.
        combine: changes float32 parameters in place by a delta, with the roundings of TSK-8.
    """

    name: str
    axes: tuple[str, ...]
    combine: Callable[[F32, F32], None]

    @property
    def role(self) -> str:
        """Role of the parameter that changes: ``"scales"``, ``"offsets"`` or ``"zeros"``."""
        return self.name.partition(".")[0]

    @property
    def field(self) -> str:
        """Field of a runtime ``Delta``, and of ``Params``, to which the operation belongs."""
        return "scales" if self.role == "scales" else "shift"

    def axis(self, name: str) -> int | None:
        """Axis of the delta counted from its end, as a negative number; None if the delta does not have it."""
        return self.axes.index(name) - len(self.axes) if name in self.axes else None

    def shape(self, planes: int, rows: int, groups: int) -> tuple[int, ...]:
        """Shape of a delta for the first `planes` planes of one matrix."""
        sizes = {"planes": planes, "rows": rows, "groups": groups}
        return tuple(sizes[axis] for axis in self.axes)

    def fits(self, shape: tuple[int, ...], module: ModuleEntry, bits: int | None) -> bool:
        """Whether a base's module, read at precision `bits`, takes a delta of this shape (TSK-7)."""
        scheme = module.scheme
        if self.role not in ("scales", scheme.shift):
            return False
        stack, planes = () if module.experts is None else (module.experts,), self.axis("planes")
        most = scheme.scale_planes(scheme.planes_at(bits))
        own = 1 if planes is None or len(shape) < -planes else shape[planes]
        return 1 <= own <= most and shape == (*stack, *self.shape(own, module.rows, scheme.groups(module.cols)))

    def apply(self, params: Params, delta: F32) -> None:
        """Change `params` in place by `delta`; planes behind those of the delta stay as they are (TSK-7, TSK-8)."""
        values: F32 | None = getattr(params, self.field)
        if values is not None:
            planes = self.axis("planes")
            self.combine(values if planes is None else values[..., : delta.shape[planes], :, :], delta)


OPERATIONS = {
    operation.name: operation
    for operation in (
        Operation("scales.mul", ("planes", "rows"), _multiply),
        Operation("scales.add", ("planes", "rows", "groups"), _add),
        Operation("offsets.add", ("rows", "groups"), _add),
        Operation("zeros.add", ("rows", "groups"), _add),
    )
}


def split_delta(name: str, file: object = None) -> tuple[str, Operation]:
    """Module and operation of a delta's name, such as ``fc.scales.mul``.

    Raises BundleError, which names `file`, for the name of no delta (TSK-6).
    """
    module, role, verb = (["", "", *name.rsplit(".", 2)])[-3:]
    operation = OPERATIONS.get(f"{role}.{verb}")
    if not module or operation is None or name.startswith(SAVED):
        expected = f"<module>.{{{', '.join(OPERATIONS)}}} or {SAVED}<module>.<parameter>"
        raise BundleError("TSK-6", f"expected {expected}", file=file, tensor=name)
    return module, operation


def delta_name(module: str, field: str, ndim: int, shift: str | None) -> str:
    """Name in a bundle of one tensor of a runtime ``Delta``.

    Args:
        module: the module's name in bundles.
        field: of the ``Delta``: ``"scales"`` or ``"shift"``.
        ndim: number of the tensor's axes, without that of stacked experts.
        shift: role of the shift of the module's scheme.
    """
    roles = ("scales", shift)
    mine = (o for o in OPERATIONS.values() if o.field == field and o.role in roles and len(o.axes) == ndim)
    return f"{module}.{next(mine).name}"
