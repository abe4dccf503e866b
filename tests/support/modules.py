"""Modules with a matrix in them, as loading a file leaves them."""

from __future__ import annotations

import torch
from torch import nn

from lowbit_format.container.writer import module_tensors
from lowbit_format.runtime.modules import LowbitModule
from lowbit_format.schema import ModuleEntry
from lowbit_format.testing.matrices import random_matrix


def filled(module: LowbitModule) -> LowbitModule:
    """`module` with a random matrix in it, as a file would fill it."""
    matrix = random_matrix(module.scheme, module.rows, module.cols)
    for t in module_tensors(ModuleEntry("m", module.scheme, module.kind, (module.rows, module.cols)), matrix):
        role = t.name.removeprefix("m.")
        if role in module.matrix_parameters():
            setattr(module, role, nn.Parameter(torch.from_numpy(t.data.copy()), requires_grad=False))
    if module.bias is not None:
        nn.init.normal_(module.bias)
    module.finish_loading("m")
    return module
