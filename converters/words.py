"""Bits of the rows of an embedding, by how frequent its words are (Chung et al. 2020, arXiv:2009.07453).

Words are put into clusters by falling frequency: the first has the most bits, and each is `ratio` times as large as the
one before. Frequent words are then precise, and the many rare ones small.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import FrequencyError
from ..schema import is_int

RANK = "rank"  # frequencies by the tokenizer's own order
TOKENIZER = "tokenizer.json"
_TEXT_AT_ONCE = 1 << 16  # characters that are tokenized together


@dataclass(frozen=True)
class Words:
    """Different bits for the words of a vocabulary.

    Attributes:
        frequencies: where they are from: ``"rank"``, the order in which the tokenizer's training found its words (of a
            Unigram tokenizer, their probabilities); a JSON file with a list of a number for each id; or another file,
            a text whose words are counted, and those that it does not have come by rank.
        bits: of the clusters, from the most frequent words to the rarest; falling.
        ratio: size of a cluster relative to that of the one before.
    """

    frequencies: str = RANK
    bits: tuple[int, ...] = (6, 5, 4, 3)
    ratio: float = 2.0

    def __post_init__(self) -> None:
        known = bool(self.bits) and all(is_int(n) and 1 <= n <= 8 for n in self.bits)
        if not known or list(self.bits) != sorted(set(self.bits), reverse=True):
            raise FrequencyError(f"the bits of words are {list(self.bits)}, expected falling numbers from 8 to 1")
        if not 0 < self.ratio <= 1000:
            raise FrequencyError(f"the ratio of clusters is {self.ratio}, expected a number above 0, at most 1000")

    def row_bits(self, directory: Path, rows: int) -> tuple[int, ...]:
        """The bits of each row of an embedding; `directory` has the tokenizer.

        Raises FrequencyError if there are no frequencies, or not for a vocabulary of `rows` words.
        """
        order = by_frequency(self.frequencies, directory, rows)
        sizes = self.ratio ** np.arange(len(self.bits))
        ends = np.round(rows * np.cumsum(sizes) / sizes.sum()).astype(int)
        found = np.empty(rows, np.int64)
        for bits, begin, end in zip(self.bits, [0, *ends[:-1]], ends, strict=True):
            found[order[begin:end]] = bits
        return tuple(found.tolist())


def by_frequency(frequencies: str, directory: Path, rows: int) -> NDArray[np.int64]:
    """Ids of a vocabulary, most frequent first; see :class:`Words`."""
    if frequencies == RANK:
        return np.argsort(-_ranks(directory, rows), kind="stable")
    path = Path(frequencies)
    if path.suffix == ".json":
        return np.argsort(-_counts_in(path, rows), kind="stable")
    counts = _counted(path, directory, rows)
    return np.lexsort((-_ranks(directory, rows), -counts))


def _counts_in(path: Path, rows: int) -> NDArray[np.float64]:
    try:
        found = json.loads(path.read_text("utf-8"))
        if not isinstance(found, list):
            raise TypeError(f"it holds {json.dumps(found)[:40]}")
        counts = np.array(found, np.float64)
    except (OSError, ValueError, TypeError) as e:
        raise FrequencyError(f"{path}: cannot be read as a list of numbers: {e}") from e
    if counts.shape != (rows,) or not np.isfinite(counts).all() or (counts < 0).any():
        raise FrequencyError(
            f"{path}: has {len(found)} entries, and the vocabulary of the embedding has {rows}; expected a list of a "
            "frequency for each id, all finite and not negative"
        )
    return counts


def _counted(path: Path, directory: Path, rows: int) -> NDArray[np.float64]:
    from .calibration_data import load_tokenizer  # a leaf that imports transformers

    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise FrequencyError(f"{path}: cannot be read as a text: {e}") from e
    tokenizer, counts = load_tokenizer(directory), np.zeros(rows)
    for begin in range(0, len(text), _TEXT_AT_ONCE):
        ids = np.array(tokenizer(text[begin : begin + _TEXT_AT_ONCE], add_special_tokens=False)["input_ids"], np.int64)
        if ids.size and ids.max() >= rows:
            raise FrequencyError(
                f"{path}: the tokenizer gives the id {ids.max()}, and the embedding has {rows} rows; is the tokenizer "
                "of another model?"
            )
        counts += np.bincount(ids, minlength=rows)
    if not counts.any():
        raise FrequencyError(f"{path}: has no words to count")
    return counts


def _ranks(directory: Path, rows: int) -> NDArray[np.float64]:
    """A number for each id that is larger for words that a tokenizer's training found more frequent.

    Rows without a word, which pad a vocabulary, are the rarest; special tokens are the most frequent.
    """
    path = directory / TOKENIZER
    try:
        found = json.loads(path.read_text("utf-8"))
        model: dict[str, Any] = found["model"]
        special = [t["id"] for t in found.get("added_tokens") or [] if t.get("special")]
        vocabulary = model["vocab"]
        if isinstance(vocabulary, list):  # Unigram: pairs of a word and its log probability
            pairs = [(i, float(score)) for i, (_, score) in enumerate(vocabulary)]
        else:
            joined = ("".join(m if isinstance(m, list) else m.split(" ", 1)) for m in model.get("merges") or [])
            merges = {word: n for n, word in enumerate(joined)}
            pairs = [(i, -float(merges.get(word, -1) if merges else i)) for word, i in vocabulary.items()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise FrequencyError(
            f"{path}: has no vocabulary whose order could be read ({type(e).__name__}: {e}); give a text or a list of "
            "frequencies instead"
        ) from e
    largest = max((i for i, _ in pairs), default=-1)
    if largest >= rows:
        raise FrequencyError(
            f"{path}: has a word with the id {largest}, and the embedding has {rows} rows; is it the tokenizer of "
            "another model?"
        )
    ranks = np.full(rows, -np.inf)
    for i, value in pairs:
        ranks[i] = value
    for i in special:
        if i < rows:
            ranks[i] = np.inf
    return ranks
