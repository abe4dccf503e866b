"""What a model gets of an example, and which of its tokens the loss counts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.checkpoints import with_tokenizer
from support.task_data import write_lines
from transformers import AutoTokenizer

from lowbit_format.errors import DataError
from lowbit_format.tuning.columns import find_columns
from lowbit_format.tuning.encoding import IGNORED, Encoded, encode
from lowbit_format.tuning.examples import read_examples
from lowbit_format.tuning.labels import find_labels

CHATML = (
    "{% for m in messages %}w9 {{ m['role'] }} {{ m['content'] }} w8 {% endfor %}"
    "{% if add_generation_prompt %}w9 assistant {% endif %}"
)
MARKED = (
    "{% for m in messages %}w9 {% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }} w8"
    "{% endgeneration %} {% else %}{{ m['content'] }} w8 {% endif %}{% endfor %}"
)
CHANGING = "w{{ messages | length }} " + CHATML  # its beginning depends on what follows


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return AutoTokenizer.from_pretrained(with_tokenizer(tmp_path_factory.mktemp("words")))


@pytest.fixture
def encoded(tokenizer: Any, tmp_path: Path) -> Callable[..., Encoded]:
    def run(*rows: dict[str, Any], max_length: int = 64, kind: str | None = None, template: str = "") -> Encoded:
        tokenizer.chat_template = template or None
        table = read_examples(str(write_lines(tmp_path / "rows.jsonl", rows)))
        columns = find_columns(table, {}, kind)
        has_labels = columns.kind in ("classification", "token-classification")
        return encode(table, columns, find_labels(table, columns) if has_labels else None, tokenizer, max_length)

    return run


def ids(text: str) -> list[int]:
    """w0 is token 4; the ends of texts are token 2."""
    return [{"</s>": 2, "<unk>": 0}.get(word) or int(word[1:]) + 4 if word != "<unk>" else 0 for word in text.split()]


def learnt(item: dict[str, Any]) -> list[int]:
    return [label for label in item["labels"] if label != IGNORED]


def test_classification(encoded: Callable[..., Encoded]) -> None:
    found = encoded({"text": "w1 w2 w3", "label": "b"}, {"text": "w4", "label": "a"}, max_length=2)
    assert [item["input_ids"] for item in found.items] == [ids("w1 w2"), ids("w4")]
    assert [item["labels"] for item in found.items] == [1, 0]
    assert (found.truncated, found.empty) == (1, 0)


def test_pairs_and_regression(encoded: Callable[..., Encoded]) -> None:
    found = encoded({"text": "w1", "text_pair": "w2", "label": 0.5}, {"text": "w1", "text_pair": "w3", "label": "2"})
    assert [item["input_ids"] for item in found.items] == [ids("w1 w2"), ids("w1 w3")]
    assert [item["labels"] for item in found.items] == [0.5, 2.0]
    with pytest.raises(DataError, match=r"rows\.jsonl, line 2: 'label' is 'two', expected a number"):
        encoded({"text": "w1", "label": 0.5}, {"text": "w1", "label": "two"}, kind="regression")


def test_token_classification(encoded: Callable[..., Encoded]) -> None:
    """A word of several pieces has its tag on the first."""
    found = encoded({"tokens": ["w1.w2", "w3"], "tags": ["B", "O"]}, {"tokens": "w4 w5", "tags": "O O"})
    assert [item["labels"] for item in found.items] == [[0, IGNORED, IGNORED, 1], [1, 1]]
    with pytest.raises(DataError, match=r"line 1: has 2 tokens and 1 tags"):
        encoded({"tokens": ["w1", "w2"], "tags": ["O"]})


def test_one_word_of_several_pieces_is_learnt(encoded: Callable[..., Encoded]) -> None:
    """Its tag is on the first token, which only a text has nothing to predict by."""
    found = encoded({"tokens": ["w1.w2"], "tags": ["B"]}, {"tokens": ["w3"], "tags": ["O"]})
    assert ([item["labels"] for item in found.items], found.empty) == ([[0, IGNORED, IGNORED], [1]], 0)


def test_one_token_of_a_text_is_not_learnt(encoded: Callable[..., Encoded]) -> None:
    """Nothing predicts it: its loss would be a mean of no numbers."""
    found = encoded({"text": "w1 w2"}, {"text": "w3"}, max_length=2)
    assert [item["input_ids"] for item in found.items] == [ids("w1 w2"), ids("w3 </s>")]
    assert found.empty == 0


def test_long_texts_are_cut_and_nothing_is_lost(encoded: Callable[..., Encoded]) -> None:
    found = encoded({"text": "w1 w2 w3 w4 w5"}, {"text": "w6"}, max_length=4)
    assert [item["input_ids"] for item in found.items] == [ids("w1 w2 w3 w4"), ids("w5 </s>"), ids("w6 </s>")]
    assert all(item["labels"] == item["input_ids"] for item in found.items)
    assert found.truncated == 0


def test_loss_on_the_completion_only(encoded: Callable[..., Encoded]) -> None:
    found = encoded({"prompt": "w1 w2", "completion": "w3"}, {"prompt": "w4", "completion": "w5 w6 w7"}, max_length=4)
    assert [item["input_ids"] for item in found.items] == [ids("w1 w2 w3 </s>"), ids("w4 w5 w6 w7")]
    assert [learnt(item) for item in found.items] == [ids("w3 </s>"), ids("w5 w6 w7")]
    assert found.truncated == 1  # without the end


def test_prompts_that_leave_no_place(encoded: Callable[..., Encoded]) -> None:
    long = {"prompt": "w1 w2 w3 w4", "completion": "w5"}
    found = encoded(long, {"prompt": "w1", "completion": "w5"}, max_length=3)
    assert (len(found.items), found.empty) == (1, 1)
    with pytest.raises(DataError, match=r"of no example anything is left to learn: prompts have 3 tokens and more"):
        encoded(long, max_length=3)


CHAT = [
    {"role": "user", "content": "w1"},
    {"role": "assistant", "content": "w2 w3"},
    {"role": "user", "content": "w4"},
    {"role": "assistant", "content": "w5"},
]


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_loss_on_the_assistants_turns(template: str, encoded: Callable[..., Encoded]) -> None:
    found = encoded({"messages": CHAT}, template=template)
    assert learnt(found.items[0]) == ids("w2 w3 w8 w5 w8")
    assert found.whole_loss == 0


def test_templates_that_do_not_show_turns(encoded: Callable[..., Encoded]) -> None:
    found = encoded({"messages": CHAT}, template=CHANGING)
    assert learnt(found.items[0]) == found.items[0]["input_ids"]
    assert found.whole_loss == 1


@pytest.mark.parametrize(
    ("messages", "template", "message"),
    [
        (CHAT, "", "line 1: has messages, and the base's tokenizer has no chat template"),
        (CHAT[:1], CHATML, "line 1: no message is the assistant's"),
        (
            [{"role": "user"}],
            "{{ raise_exception('no content') }}",
            "line 1: the chat template cannot take .*no content",
        ),
    ],
)
def test_chats_that_do_not_do(messages: Any, template: str, message: str, encoded: Callable[..., Encoded]) -> None:
    with pytest.raises(DataError, match=message):
        encoded({"messages": messages}, template=template)
