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

# What goes through a model together. Small batches train a block further with the same work: of SmolLM2-135M at 3 bits
# 192 steps of 512 tokens took 10%, 6% and 5% of the error of the first three blocks, 48 steps of 2048 tokens 6%, 0, 0.
TOKENS = 512  # of windows; at least one of them
TEXTS = 8  # of an encoder, which are short


@dataclass(frozen=True)
class Data:
    """What goes into a model.

    Attributes:
        batches: arguments of the model's ``forward``.
        held_out: how many of them, the last ones, are not calibrated with: they measure what came of it.
        identity: a digest of them: a calibration goes on only with the same data.
    """

    batches: tuple[Mapping[str, Tensor], ...]
    held_out: int
    identity: str

    @classmethod
    def of(cls, batches: Sequence[Mapping[str, Tensor]], held_out: int = 0) -> Data:
        """Batches that the caller made, such as a processor's output; the last `held_out` only measure.

        Raises:
            CalibrationError: there is none.
        """
        if len(batches) <= held_out:
            raise CalibrationError("there is no batch to calibrate with")
        digest = hashlib.sha256()
        for batch in batches:
            for name, value in sorted(batch.items()):
                digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
                digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return cls(tuple(batches), held_out, digest.hexdigest())


def is_causal(model: Any) -> bool:
    """Whether a model of transformers predicts the next token of the text that it is given."""
    return bool(model.can_generate()) and not model.config.is_encoder_decoder


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
            raise CalibrationError(
                f"{path}, line {number}: has messages, and the model's tokenizer has no chat template for them"
            )
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
    size = max(1, TOKENS // len(samples[0]))
    return [{"input_ids": torch.stack(list(samples[i : i + size]))} for i in range(0, len(samples), size)]


def whole_texts(texts: Sequence[str], tokenizer: Any, *, samples: int, length: int, where: str) -> list[str]:
    """As many texts, in their order, as have the tokens of `samples` of `length`; at least `samples` of them.

    Texts are often short: `samples` of them would tell far less of a layer's inputs than as many windows.

    Raises:
        CalibrationError: there are fewer than `samples`.
    """
    found, left = list[str](), samples * length
    for text in texts:
        if left <= 0 and len(found) >= samples:
            break
        found.append(text)
        left -= min(length, len(tokenizer(text, verbose=False)["input_ids"]))
    if len(found) < samples:
        raise CalibrationError(f"{where}: has {len(found)} texts, expected {samples}; give more, or lower --samples")
    return found


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
    options: dict[str, Any] = {"padding": True, "truncation": True, "max_length": length, "return_tensors": "pt"}
    return [dict(tokenizer(list(chosen[i : i + TEXTS]), **options)) for i in range(0, samples, TEXTS)]


def tensor_batches(path: Path) -> list[dict[str, Tensor]]:
    """Each sample of a safetensors file: a tensor ``[samples, …]`` is the argument of ``forward`` of its name.

    Raises:
        CalibrationError: it cannot be read, or numbers of samples differ.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as e:
        raise CalibrationError(f"{path}: cannot be read: {e}") from e
    sizes = {name: len(t) if t.dim() else 0 for name, t in tensors.items()}
    if len(set(sizes.values())) != 1 or 0 in sizes.values():
        raise CalibrationError(f"{path}: numbers of samples are {sizes}, expected one number for all tensors")
    count = next(iter(sizes.values()))
    return [{name: t[i : i + 1] for name, t in tensors.items()} for i in range(count)]


def hub_texts(name: str, samples: int, tokenizer: Any) -> list[str]:
    """The first texts of a data set on the Hub (or in a directory), its ``train`` split, read as a stream.

    Raises:
        CalibrationError: the package ``datasets`` is missing, or the data set cannot be read or has no text.
    """
    try:
        import datasets  # type: ignore[import-not-found, import-untyped, unused-ignore]
    except ModuleNotFoundError:
        raise CalibrationError(
            f"{name}: no such file; a data set of the Hub needs the package datasets (pip install datasets)"
        ) from None
    repo, _, config = name.partition(":")
    texts: list[str] = []
    try:
        for row in datasets.load_dataset(repo, config or None, split="train", streaming=True):
            line = json.dumps({key: row[key] for key in ("text", "messages") if key in row})
            texts.append(_text_of(Path(name), len(texts) + 1, line, tokenizer))
            if len(texts) >= samples:
                break
    except CalibrationError:
        raise
    except Exception as e:  # of many kinds, by where the data lie
        raise CalibrationError(f"{name}: no such file, and not to be had as a data set of the Hub: {e}") from e
    return [text for text in texts if text.strip()]


def self_written(model: Any, *, samples: int, length: int, seed: int) -> list[Tensor]:
    """Samples that a causal model writes itself, int64 ``[length]`` each (LLM-QAT, Liu et al. 2023, arXiv:2305.17888).

    Each begins with a token drawn at random. The next few tokens are the likeliest, so that the text finds a topic;
    the others are drawn by their probabilities.
    """
    generator = torch.Generator().manual_seed(seed)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    found: list[Tensor] = []
    while len(found) < samples:
        count = min(16, samples - len(found))
        ids = torch.randint(0, vocabulary, (count, 1), generator=generator)
        with torch.no_grad():
            state = torch.random.get_rng_state()
            torch.manual_seed(seed + len(found))
            options: dict[str, Any] = {"attention_mask": None, "eos_token_id": None, "pad_token_id": 0}
            for new, sample in ((min(4, length - 1), False), (length - 1 - min(4, length - 1), True)):
                if new:
                    options |= {"do_sample": sample, "max_new_tokens": new, "attention_mask": torch.ones_like(ids)}
                    if sample:
                        options |= {"top_k": 0, "top_p": 1.0, "temperature": 1.0}
                    ids = model.generate(ids.to(model.device), **options).cpu()
            torch.random.set_rng_state(state)
        found += list(ids)
    return found
