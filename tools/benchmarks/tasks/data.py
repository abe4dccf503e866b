"""Data of the benchmark of task tuning: sentences, a text, tables to be told in words; as fixed lists of batches.

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
IGNORED = -100  # a label of a token that is given, not predicted
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
    """How much of everything: examples, or blocks of text."""

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


# --- tables to be told in words --------------------------------------------------------------------


@dataclass(frozen=True)
class Prompts:
    """Meanings to be told in words.

    Attributes:
        prompts: of the model.
        references: how people told each.
    """

    prompts: list[str]
    references: list[list[str]]


def e2e_data(directory: Path, tokenizer: Any, sizes: Sizes) -> tuple[Data, Prompts]:
    """E2E (Novikova et al. 2017, arXiv:1706.09254) from ``train.csv`` and ``eval.csv`` with the columns mr and ref.

    Held out are the last meanings of a shuffled train. The prompts are the first meanings of eval, a hundred at most.
    """
    pool, test = _by_meaning(directory / "train.csv"), _by_meaning(directory / "eval.csv")
    meanings = random.Random(0).sample(sorted(pool), len(pool))

    def examples(of: dict[str, list[str]], meanings: Sequence[str], count: int) -> list[tuple[list[int], int]]:
        """Token ids and how many of them are the prompt's."""
        found = []
        for meaning, text in [(m, text) for m in meanings for text in of[m]][:count]:
            prompt = tokenizer(_prompt(meaning), add_special_tokens=False)["input_ids"]
            answer = tokenizer(" " + text, add_special_tokens=False)["input_ids"]
            found.append((prompt + answer + [tokenizer.eos_token_id], len(prompt)))
        return found

    def batches(items: list[tuple[list[int], int]], epochs: int = 0) -> list[Batch]:
        rng = random.Random(1)
        if epochs == 0:
            return [_completions(part) for part in _cut(sorted(items, key=lambda item: len(item[0])), sizes.batch)]
        return [_completions(part) for _ in range(epochs) for part in _bucketed(items, sizes.batch, rng)]

    many = [(m, text) for m in meanings for text in pool[m]]
    first_held_out = next(i for i, m in enumerate(meanings) if m == many[-sizes.held_out][0])
    shuffled = random.Random(2).sample(examples(pool, meanings[:first_held_out], len(many)), sizes.train)
    told = list(test)[: min(100, sizes.test)]
    return Data(
        train=batches(shuffled, sizes.epochs),
        held_out=batches(examples(pool, meanings[first_held_out:], sizes.held_out)),
        test=batches(examples(test, list(test), sizes.test)),
    ), Prompts([_prompt(m) for m in told], [test[m] for m in told])


def _prompt(meaning: str) -> str:
    return f"{meaning}\n"


def _by_meaning(path: Path) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    with open(path, encoding="utf-8", newline="") as f:
        for row in csv.DictReader(f):
            found.setdefault(row["mr"], []).append(row["ref"])
    return found


def _completions(items: list[tuple[list[int], int]]) -> Batch:
    """As :func:`_pad`, with ``labels`` ``[batch, longest]``: the tokens after each prompt."""
    batch = _pad(items)
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED)
    for labels, (_, given) in zip(batch["labels"], items, strict=True):
        labels[:given] = IGNORED
    return batch
