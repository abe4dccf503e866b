"""The fingerprint of a base: a digest of its quantized matrices, independent of shards and prefixes (section 12)."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

from ..schema import QuantizationConfig
from ..tensors import tensor_specs


@dataclass(frozen=True)
class Fingerprint:
    """A fingerprint.

    Attributes:
        body: hex SHA-256 over the matrices of the base model.
        head: hex SHA-256 over the matrices outside of the base model, or the empty string.
    """

    body: str
    head: str


@dataclass(frozen=True)
class Identity:
    """What the fingerprints of a base are computed from.

    Attributes:
        config: its ``quantization_config``.
        digests: SHA-256 in lower-case hex of every lowbit tensor, by name.
        shapes: shape of every lowbit tensor, by name.
    """

    config: QuantizationConfig
    digests: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]

    def fingerprint(self) -> Fingerprint:
        """The fingerprint of the base."""
        return fingerprint(self.config, self.digests, self.shapes)


def fingerprint(
    config: QuantizationConfig, digests: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]
) -> Fingerprint:
    """The fingerprint, from digests of the tensors (FPR-1 to FPR-4).

    Args:
        config: the model's ``quantization_config``.
        digests: SHA-256 in lower-case hex of every lowbit tensor, by name.
        shapes: shape of every lowbit tensor, by name; that of ragged planes is known only from the file.
    """
    records: dict[bool, list[bytes]] = {True: [], False: []}
    for module in config:
        path, in_body = config.canonical_path(module.path)
        scheme = module.scheme
        for spec in tensor_specs(module):
            shape = ",".join(str(n) for n in shapes[spec.name])
            fields = (
                path, spec.role, spec.dtype, shape, digests[spec.name],
                scheme.codec, str(scheme.bits), str(scheme.group_size),
            )  # fmt: skip
            records[in_body].append("\t".join(fields).encode() + b"\n")
    body = hashlib.sha256(b"".join(sorted(records[True]))).hexdigest()
    head = hashlib.sha256(b"".join(sorted(records[False]))).hexdigest() if records[False] else ""
    return Fingerprint(body, head)
