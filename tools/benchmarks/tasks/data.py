"""Data of the benchmark of task tuning: SST-2 sentences and a text for a language model, as fixed lists of batches.

Batches, their order and the held-out part are drawn once, with one seed, so that every method sees the same ones.
"""

from __future__ import annotations

import csv
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Batch = dict[str, Tensor]
BUCKET = 50  # batches that are sorted by length together
LONG = 15  # words of a held-out sentence at least: dev has whole sentences, train has mostly short phrases of them


@dataclass(frozen=True)
class Data:
    """Lists of batches.

    Attributes:
        train: all epochs one after another.
        held_out: part of the training data that is not in it; judges the learning rates.
        test: judges the result.
    """

    train: list[Batch]
    held_out: list[Batch]
    test: list[Batch]


@dataclass(frozen=True)
class Sizes:
    """How much of everything: examples of SST-2, or blocks of text."""

    train: int
    epochs: int
    held_out: int
    test: int
    batch: int


# --- sentences -------------------------------------------------------------------------------------


def sst2_data(directory: Path, tokenizer: Any, sizes: Sizes) -> Data:
    """SST-2 from ``train.tsv`` and ``dev.tsv`` (a column ``label`` and one of sentences) in `directory`.

    Train holds phrases of its sentences as examples of their own. So held-out sentences are long ones, as in dev, and
    no example to train on has four words in a row (all its words, if it has fewer) that a held-out one has.
    """
    pool, dev = _read_tsv(directory / "train.tsv"), _read_tsv(directory / "dev.tsv")[: sizes.test]
    random.Random(0).shuffle(pool)
    held_out, chosen, heard = list[tuple[str, int]](), list[tuple[str, int]](), set[tuple[str, ...]]()
    for text, label in pool:
        if len(held_out) == sizes.held_out:
            break
        if len(text.split()) >= LONG:
            held_out.append((text, label))
            heard.update(gram for n in range(1, 5) for gram in _grams(text, n))
    for text, label in pool:
        if len(chosen) == sizes.train:
            break
        if heard.isdisjoint(_grams(text, min(4, len(text.split())))):
            chosen.append((text, label))

    def batches(examples: list[tuple[str, int]], epochs: int = 0) -> list[Batch]:
        ids = tokenizer([text for text, _ in examples], truncation=True, max_length=128)["input_ids"]
        items = [(i, label) for i, (_, label) in zip(ids, examples, strict=True)]
        rng = random.Random(1)
        if epochs == 0:
            return [_pad(part) for part in _cut(sorted(items, key=lambda item: len(item[0])), 2 * sizes.batch)]
        return [_pad(part) for _ in range(epochs) for part in _bucketed(items, sizes.batch, rng)]

    return Data(
        train=batches(chosen, sizes.epochs),
        held_out=batches(held_out),
        test=batches(dev),
    )


def _read_tsv(path: Path) -> list[tuple[str, int]]:
    with open(path, encoding="utf-8", newline="") as f:
        rows = list(csv.DictReader(f, delimiter="\t", quoting=csv.QUOTE_NONE))
    if not rows or len(rows[0]) != 2 or "label" not in rows[0]:
        raise SystemExit(f"{path}: expected a first line with two columns, one of them 'label', and examples below it")
    text = next(column for column in rows[0] if column != "label")
    return [(row[text].strip(), int(row["label"])) for row in rows]


def _grams(text: str, n: int) -> set[tuple[str, ...]]:
    words = text.split()
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}


def _bucketed(items: list[tuple[list[int], int]], size: int, rng: random.Random) -> list[list[tuple[list[int], int]]]:
    """All items once, shuffled, in batches of nearly equal lengths; the batches shuffled again within their bucket."""
    order, out = rng.sample(items, len(items)), []
    for bucket in _cut(order, BUCKET * size):
        parts = _cut(sorted(bucket, key=lambda item: len(item[0])), size)
        out += rng.sample(parts, len(parts))
    return out


def _cut(items: Sequence[Any], size: int) -> list[Any]:
    return [items[i : i + size] for i in range(0, len(items), size)]


def _pad(items: list[tuple[list[int], int]]) -> Batch:
    """``input_ids`` and ``attention_mask`` ``[batch, longest]``, ``labels`` ``[batch]``."""
    longest = max(len(ids) for ids, _ in items)
    return {
        "input_ids": torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in items]),
        "attention_mask": torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids, _ in items]),
        "labels": torch.tensor([label for _, label in items]),
    }


# --- a text ----------------------------------------------------------------------------------------


def text_data(path: Path, tokenizer: Any, sizes: Sizes, block: int = 128, fraction: float = 0.8) -> Data:
    """A text in blocks of `block` tokens: train on the first `fraction` of its characters, test on the rest.

    The held-out blocks are the last ones of the first part. Every block begins with the tokenizer's first token.
    """
    text = path.read_text("utf-8")
    middle = text.index("\n", int(len(text) * fraction)) + 1
    pool, test = _blocks(text[:middle], tokenizer, block), _blocks(text[middle:], tokenizer, block)
    pool, held_out = pool[: -sizes.held_out], pool[-sizes.held_out :]

    def batches(blocks: Tensor, epochs: int = 0) -> list[Batch]:
        generator = torch.Generator().manual_seed(1)
        orders = [torch.randperm(len(blocks), generator=generator) for _ in range(epochs)] or [
            torch.arange(len(blocks))
        ]
        return [{"input_ids": blocks[part]} for order in orders for part in torch.split(order, sizes.batch)]

    return Data(
        train=batches(pool[: sizes.train], sizes.epochs),
        held_out=batches(held_out),
        test=batches(test[: sizes.test]),
    )


def _blocks(text: str, tokenizer: Any, block: int) -> Tensor:
    """Token ids ``[blocks, block]``; what is left over at the end is dropped."""
    lines = tokenizer([line for line in text.splitlines(keepends=True) if line], add_special_tokens=False)["input_ids"]
    ids = torch.tensor([i for line in lines for i in line])
    body = ids[: len(ids) // (block - 1) * (block - 1)].reshape(-1, block - 1)
    return torch.cat([torch.full((len(body), 1), tokenizer.bos_token_id), body], dim=1)
