"""Examples as a model takes them: ids of tokens, and what is to be predicted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from ..errors import DataError
from .columns import CLASSIFICATION, LANGUAGE, REGRESSION, TOKENS, Columns, number_of
from .examples import Table
from .labels import Labels, label_texts, tokens_of

IGNORED = -100  # a label that no loss counts, as transformers has it
Item = dict[str, Any]


@dataclass(frozen=True)
class Encoded:
    """Encoded examples.

    Attributes:
        items: arguments of a model by name, one for each example (of long texts of a language model: several).
        truncated: how many examples lost their end.
        empty: how many were left out since nothing of them is to be predicted: their prompt alone fills `max_length`,
            or they are one token.
        whole_loss: how many chats are learnt whole, for their template does not show where the assistant's turns are.
    """

    items: list[Item]
    truncated: int = 0
    empty: int = 0
    whole_loss: int = 0


def encode(table: Table, columns: Columns, labels: Labels | None, tokenizer: Any, max_length: int) -> Encoded:
    """Encode all examples.

    Args:
        table, columns, labels: what was read; labels only where the kind of task has some.
        tokenizer: of the base.
        max_length: most tokens of an example.

    Raises:
        DataError: an example that cannot be encoded, or of which nothing is left.
    """
    one = next(e for (kind, meaning), e in _ENCODERS.items() if kind == columns.kind and meaning in columns.names)
    items, truncated, empty, whole = list[Item](), 0, 0, 0
    for i in range(len(table.rows)):
        for example in one(_Place(table, columns, i, tokenizer, max_length, labels)):
            truncated += example.truncated
            whole += example.whole_loss
            if _learns(example.item, columns.kind):
                items.append(example.item)
            else:
                empty += 1
    if not items:
        raise DataError(
            f"{table.where}: of no example anything is left to learn: prompts have {max_length} tokens and more. "
            "Raise --max-length (max_length=), or shorten them"
        )
    return Encoded(items, truncated, empty, whole)


@dataclass(frozen=True)
class _Place:
    """One example, and what it is encoded with."""

    table: Table
    columns: Columns
    i: int
    tokenizer: Any
    max_length: int
    labels: Labels | None

    @property
    def values(self) -> dict[str, Any]:
        return self.columns.values(self.table, self.i)

    @property
    def outputs(self) -> list[int]:
        known = {} if self.labels is None else self.labels.outputs
        return [known[text] for text in label_texts(self.table, self.columns, self.i)]

    def fail(self, message: str) -> DataError:
        return DataError(f"{self.table.place(self.i)}: {message}")


@dataclass(frozen=True)
class _Example:
    item: Item
    truncated: bool = False
    whole_loss: bool = False


def _learns(item: Item, kind: str) -> bool:
    """Whether something is to be predicted; nothing predicts the first token of a text."""
    labels = item["labels"]
    if kind == LANGUAGE:
        labels = labels[1:]
    return not isinstance(labels, list) or any(label != IGNORED for label in labels)


def _classified(at: _Place) -> Iterator[_Example]:
    item, cut = _texts(at)
    yield _Example({**item, "labels": at.outputs[0]}, cut)


def _scored(at: _Place) -> Iterator[_Example]:
    number = number_of(at.values["label"])
    if number is None:
        raise at.fail(f"{at.columns.names['label']!r} is {at.values['label']!r}, expected a number")
    item, cut = _texts(at)
    yield _Example({**item, "labels": number}, cut)


def _texts(at: _Place) -> tuple[Item, bool]:
    pair = at.values.get("text_pair")
    encoded = at.tokenizer(at.values["text"], pair, verbose=False)
    cut = len(encoded["input_ids"]) > at.max_length
    if cut:
        encoded = at.tokenizer(at.values["text"], pair, truncation=True, max_length=at.max_length)
    return dict(encoded), cut


def _tagged(at: _Place) -> Iterator[_Example]:
    """The first piece of each word has the word's tag, the others none."""
    if not at.tokenizer.is_fast:
        raise DataError("token classification needs a fast tokenizer, which knows the pieces of a word; save one")
    words = [str(token) for token in tokens_of(at.values["tokens"])]
    options = {"is_split_into_words": True, "truncation": True, "max_length": at.max_length}
    encoded, tags, before = at.tokenizer(words, **options), list[int](), None
    places = encoded.word_ids()
    for word in places:
        tags.append(at.outputs[word] if word is not None and word != before else IGNORED)
        before = word
    cut = max((word for word in places if word is not None), default=-1) < len(words) - 1
    yield _Example({**encoded, "labels": tags}, cut)


def _written(at: _Place) -> Iterator[_Example]:
    """A text; one that is too long is cut into several examples, so that nothing of it is lost."""
    ids = _ended(at.tokenizer(at.values["text"], verbose=False)["input_ids"], at.tokenizer)
    for begin in range(0, max(1, len(ids) - 1), at.max_length):  # nothing would predict a last token by itself
        yield _sequence(ids[begin : begin + at.max_length], at.max_length)


def _completed(at: _Place) -> Iterator[_Example]:
    """Loss on the completion only, which begins with a space where neither side has one at the seam."""
    prompt, completion = at.values["prompt"], at.values["completion"]
    if not prompt[-1:].isspace() and not completion[:1].isspace():
        completion = f" {completion}"
    begin = at.tokenizer(prompt, verbose=False)["input_ids"]
    while begin and begin[-1] == at.tokenizer.eos_token_id:
        begin.pop()
    end = at.tokenizer(completion, add_special_tokens=False, verbose=False)["input_ids"]
    ids = _ended(begin + end, at.tokenizer)
    yield _sequence(ids, at.max_length, learnt=[False] * len(begin) + [True] * (len(ids) - len(begin)))


def _chatted(at: _Place) -> Iterator[_Example]:
    """Loss on the assistant's turns, as far as the template shows where they are."""
    messages, tokenizer = at.values["messages"], at.tokenizer
    if not getattr(tokenizer, "chat_template", None):
        raise at.fail("has messages, and the base's tokenizer has no chat template for them")
    try:
        ids, learnt = _turns(tokenizer, messages)
    except DataError:
        raise
    except Exception as e:  # of many kinds, by what the template asks for
        raise at.fail(f"the chat template cannot take these messages: {e}") from e
    if learnt is not None and not any(learnt):
        raise at.fail("no message is the assistant's: there is nothing to learn")
    example = _sequence(ids, at.max_length, learnt=learnt)
    yield _Example(example.item, example.truncated, whole_loss=learnt is None)


def _turns(tokenizer: Any, messages: list[Any]) -> tuple[list[int], list[bool] | None]:
    """Ids of a chat, and which belong to the assistant's turns; None if neither the template says so, nor its prefixes.

    A template with ``{% generation %}`` marks them. Of another, the chat up to a turn is rendered: where it is the
    beginning of the chat with the turn, what comes behind it is the turn.
    """

    def ids(part: list[Any], **options: Any) -> list[int]:
        found = tokenizer.apply_chat_template(part, tokenize=True, return_dict=True, **options)["input_ids"]
        return list(found)

    if "{% generation" in tokenizer.chat_template or "{%- generation" in tokenizer.chat_template:
        options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
        found = tokenizer.apply_chat_template(messages, **options)
        return list(found["input_ids"]), [bool(mine) for mine in found["assistant_masks"]]
    whole = ids(messages)
    learnt = [False] * len(whole)
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before, after = ids(messages[:i], add_generation_prompt=True), ids(messages[: i + 1])
        if whole[: len(before)] != before or whole[: len(after)] != after:
            return whole, None
        learnt[len(before) : len(after)] = [True] * (len(after) - len(before))
    return whole, learnt


def _sequence(ids: list[int], max_length: int, learnt: list[bool] | None = None) -> _Example:
    """`ids` to predict one after the other, as far as they are `learnt`."""
    labels = ids if learnt is None else [i if mine else IGNORED for i, mine in zip(ids, learnt, strict=True)]
    item = {"input_ids": ids[:max_length], "attention_mask": [1] * min(len(ids), max_length)}
    return _Example({**item, "labels": list(labels[:max_length])}, len(ids) > max_length)


def _ended(ids: list[int], tokenizer: Any) -> list[int]:
    """`ids` with the token that ends a text, if there is one."""
    end = tokenizer.eos_token_id
    return ids if end is None or ids[-1:] == [end] else [*ids, end]


_ENCODERS: dict[tuple[str, str], Callable[[_Place], Iterator[_Example]]] = {  # by kind and what tells its form
    (CLASSIFICATION, "label"): _classified,
    (REGRESSION, "label"): _scored,
    (TOKENS, "tags"): _tagged,
    (LANGUAGE, "messages"): _chatted,
    (LANGUAGE, "completion"): _completed,
    (LANGUAGE, "text"): _written,
}
