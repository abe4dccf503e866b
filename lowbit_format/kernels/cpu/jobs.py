"""Numbers that stand for codecs and dtypes in jobs, which are int64 throughout (see :mod:`.team`)."""

from __future__ import annotations

import torch

from .intrinsics import BF16_KIND, F16_KIND, F32_KIND

BCQ, UNIFORM, CODEBOOK = 0, 1, 2
CODECS = {"bcq": BCQ, "uniform": UNIFORM, "codebook": CODEBOOK}
KINDS = {torch.float32: F32_KIND, torch.float16: F16_KIND, torch.bfloat16: BF16_KIND}
