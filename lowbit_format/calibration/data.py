"""Text to calibrate with: read, turned into tokens, cut into samples, put into batches."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CalibrationError

BATCH = 4  # samples that go through a model together


@dataclass(frozen=True)
class Data:
    """What goes into a model.

    Attributes:
        batches: arguments of the model's ``forward``; of all, or of those to calibrate with.
        identity: a digest of them: a calibration goes on only with the same data.
    """

    batches: tuple[Mapping[str, Tensor], ...]
    identity: str

    @classmethod
    def of(cls, batches: Sequence[Mapping[str, Tensor]]) -> Data:
        """Batches that the caller made, such as a processor's output.

        Raises:
            CalibrationError: there is none.
        """
        if not batches:
            raise CalibrationError("there is no batch to calibrate with")
        digest = hashlib.sha256()
        for batch in batches:
            for name, value in sorted(batch.items()):
                digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
                digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return cls(tuple(batches), digest.hexdigest())


def read_texts(path: Path, tokenizer: Any) -> list[str]:
    """The texts of a file: of ``.jsonl`` the ``text`` or the ``messages`` of each line, else its paragraphs.

    Args:
        path: the file.
        tokenizer: has the chat template for ``messages``.

    Raises:
        CalibrationError: it cannot be read, or a line has neither.
    """
    try:
        content = path.read_text("utf-8")
    except FileNotFoundError:
        raise CalibrationError(f"{path}: no such file; expected a text file, or JSON lines") from None
    except (OSError, UnicodeDecodeError) as e:
        raise CalibrationError(f"{path}: cannot be read as UTF-8 text: {e}") from e
    if path.suffix not in (".jsonl", ".json"):
        texts = [line for line in content.splitlines() if line.strip()]
    else:
        texts = [_text_of(path, i + 1, line, tokenizer) for i, line in enumerate(content.splitlines()) if line.strip()]
    if not texts:
        raise CalibrationError(f"{path}: holds no text")
    return texts


def _text_of(path: Path, number: int, line: str, tokenizer: Any) -> str:
    try:
        found = json.loads(line)
    except json.JSONDecodeError as e:
        raise CalibrationError(f"{path}, line {number}: is not JSON: {e}") from e
    if isinstance(found, dict) and isinstance(found.get("text"), str):
        return str(found["text"])
    if isinstance(found, dict) and isinstance(found.get("messages"), list):
        if not getattr(tokenizer, "chat_template", None):
            raise CalibrationError(f"{path}, line {number}: has messages, but the model's tokenizer has no chat template")
        return str(tokenizer.apply_chat_template(found["messages"], tokenize=False))
    raise CalibrationError(f'{path}, line {number}: expected an object with "text" or "messages"')


def windows(texts: Sequence[str], tokenizer: Any, *, samples: int, length: int, where: str) -> list[Tensor]:
    """Samples of `length` tokens each, int64 ``[length]``, cut from the texts in their order.

    Raises:
        CalibrationError: there are fewer.
    """
    found: list[Tensor] = []
    left: list[int] = []
    for text in _chunks(texts):
        left += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        while len(left) >= length and len(found) < samples:
            found.append(torch.tensor(left[:length]))
            left = left[length:]
        if len(found) == samples:
            return found
    tokens = len(found) * length + len(left)
    raise CalibrationError(
        f"{where}: has {tokens:,} tokens, expected {samples} samples of {length}; give more text, or lower --samples "
        f"to {tokens // length} or --length"
    )


def _chunks(texts: Sequence[str], size: int = 1 << 16) -> Iterator[str]:
    """Texts joined by newlines, some at a time: a tokenizer is quick on long texts, and not all are needed."""
    chunk: list[str] = []
    for text in texts:
        chunk.append(text)
        if sum(map(len, chunk)) > size:
            yield "\n".join(chunk) + "\n"
            chunk = []
    if chunk:
        yield "\n".join(chunk) + "\n"


def causal_batches(samples: Sequence[Tensor]) -> list[dict[str, Tensor]]:
    """Batches of windows of one length, for a causal model."""
    return [
        {"input_ids": torch.stack(list(samples[i : i + BATCH]))} for i in range(0, len(samples), BATCH)
    ]


def padded_batches(
    texts: Sequence[str], tokenizer: Any, *, samples: int, length: int, where: str
) -> list[dict[str, Tensor]]:
    """Batches of whole texts, each one a sample with its special tokens, sorted by length and padded.

    Raises:
        CalibrationError: there are fewer texts.
    """
    if len(texts) < samples:
        raise CalibrationError(f"{where}: has {len(texts)} texts, expected {samples}; give more, or lower --samples")
    chosen = sorted(texts[:samples], key=len)
    size = 8 * BATCH
    return [
        dict(tokenizer(list(chosen[i : i + size]), return_tensors="pt", padding=True, truncation=True, max_length=length))
        for i in range(0, samples, size)
    ]
