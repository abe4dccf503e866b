"""Recipe files: what they say, and each mistake that is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from lowbit_format.converters import Recipe, Rule
from lowbit_format.converters.recipe import WORDS, load_recipe, write_recipe
from lowbit_format.errors import RecipeError
from lowbit_format.quantize import Target

BASE = Recipe(Target(bits=3, group_size=64, nested=(2,)), embeddings=True)


def load(tmp_path: Path, obj: Any, base: Recipe = BASE) -> Recipe:
    path = tmp_path / "recipe.json"
    path.write_bytes(obj if isinstance(obj, bytes) else json.dumps(obj).encode())
    return load_recipe(path, base)


def test_an_empty_recipe_changes_nothing(tmp_path: Path) -> None:
    assert load(tmp_path, {}) == BASE


def test_keys_that_are_left_out_come_from_the_default(tmp_path: Path) -> None:
    recipe = load(
        tmp_path,
        {
            "default": {"bits": 4, "nested": [3, 2]},
            "rules": [
                {"match": "*.down_proj", "bits": 5},
                {"match": "lm_head", "codec": "uniform", "bits": 8, "solver": "minmax"},
                {"match": "*.0.*", "keep": True},
                {"match": "*.1.*", "keep": False, "offset": False},
            ],
            "embeddings": False,
            "lm_head": True,
        },
    )
    default = Target(bits=4, group_size=64, nested=(2, 3))
    assert recipe == Recipe(
        default,
        (
            Rule("*.down_proj", Target(bits=5, group_size=64, nested=(2, 3))),
            Rule("lm_head", Target("uniform", 8, 64, nested=(2, 3), solver="minmax")),
            Rule("*.0.*", None),
            Rule("*.1.*", Target(bits=4, group_size=64, offset=False, nested=(2, 3))),
        ),
        embeddings=False,
        lm_head=True,
    )


def test_embeddings_have_a_target_of_their_own(tmp_path: Path) -> None:
    recipe = load(tmp_path, {"embeddings": {"codec": "uniform", "bits": 6, "nested": []}}, Recipe(BASE.default))
    assert recipe.embeddings == Target("uniform", 6, 64)
    assert recipe.lm_head is None


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(),
        BASE,
        Recipe(
            Target("uniform", 3, 0, scale_dtype="F32", rounds=2),
            (
                Rule("a.*", None),
                Rule("b", Target("codebook", group_size=0, table=(-1.0, 0.0, 1.0), scale_dtype="F32", rounds=2)),
                Rule("c", Target("uniform", 3, 0, solver="minmax", scale_dtype="F32", rounds=2), at_least=2, at_most=5),
                Rule("d", WORDS),
                Rule("e", Target("uniform", 4, 0, scale_dtype="F32", rounds=2, row_bits=(4, 1, 4))),
                Rule("f", Target("bcq", 6, 0, scale_dtype="F32", rounds=2, row_bits=(3, 2))),  # of which no row has all
                Rule("g", Target("bcq", 3, 0, scale_dtype="F32", rounds=2, row_bits=(3, 2))),
            ),
            lm_head=WORDS,
            embeddings=False,
        ),
    ],
)
def test_a_recipe_that_is_written_is_read_again(tmp_path: Path, recipe: Recipe) -> None:
    write_recipe(tmp_path / "recipe.json", recipe)
    assert load_recipe(tmp_path / "recipe.json") == recipe


def test_a_codebook_takes_no_nested_precisions_from_the_default(tmp_path: Path) -> None:
    rules = [{"match": "a", "codec": "codebook"}, {"match": "b", "codec": "codebook", "table": [-1, 0, 1]}]
    first, second = load(tmp_path, {"rules": rules}).rules
    assert first.target == Target("codebook", group_size=64)
    assert second.target is not None
    assert (second.target.bits, second.target.values()) == (2, [-1, 0, 1])


def test_a_codebook_may_say_the_bits_that_its_table_has(tmp_path: Path) -> None:
    rule = {"match": "a", "codec": "codebook", "table": "nf4", "bits": 4, "nested": []}
    assert load(tmp_path, {"rules": [rule]}).rules[0].target == Target("codebook", group_size=64)


def test_the_documented_recipe_is_read_and_has_every_key(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text("utf-8")
    [example] = map(json.loads, re.findall(r"^```json[^\n]*\n(.*?)^```", page, re.DOTALL | re.MULTILINE))
    assert len(load(tmp_path, example).rules) == 5
    keys = set(example["default"]).union(*example["rules"])
    assert keys == {*Target.__dataclass_fields__, "match", "keep"} - {"row_bits"}
    elsewhere = {"at_least", "at_most", "words"}  # which need a budget, or a tokenizer
    assert set(example) == set(Recipe.__dataclass_fields__) - elsewhere
    import lowbit_format.converters.recipe as recipe

    for text in (page, recipe.__doc__ or ""):
        assert all(f'"{key}"' in text for key in keys | set(example) | elsewhere | {"row_bits"})


def test_the_first_rule_that_matches_decides() -> None:
    recipe = Recipe(rules=(Rule("model.*.up", None), Rule("*.up", Target(bits=2)), Rule("?.up", Target(bits=3))))
    assert recipe.rule_for("model.layers.3.up") == Rule("model.*.up", None)
    assert recipe.rule_for("a.up") == Rule("*.up", Target(bits=2))
    assert recipe.rule_for("a.UP") is None


def test_patterns_to_keep_come_before_all_rules() -> None:
    recipe = Recipe(rules=(Rule("*", Target(bits=2)),)).keeping(["a.*", "b"])
    assert [rule.match for rule in recipe.rules] == ["a.*", "b", "*"]
    assert recipe.rule_for("a.x") == Rule("a.*", None)


def test_a_pattern_that_matches_nothing_is_refused() -> None:
    recipe = Recipe(rules=(Rule("a.*", None), Rule("c.*", None)))
    with pytest.raises(RecipeError, match=r"'c\.\*' matches no module; modules are named like a\.x, b\.y"):
        recipe.check_matches(["a.x", "b.y"])


@pytest.mark.parametrize(
    "text", [b"", b"{", b"\xff", b'{"default": NaN}', b'{"rules": [], "rules": []}', b"[" * 99_999]
)
def test_what_is_no_json_is_refused(tmp_path: Path, text: bytes) -> None:
    with pytest.raises(RecipeError, match=r"recipe\.json: "):
        load(tmp_path, text)


@pytest.mark.parametrize(
    ("obj", "message"),
    [
        ([], "is not a JSON object"),
        ({"rule": []}, "unknown key 'rule'; expected default, rules"),
        ({"rules": {}}, "rules is not a list"),
        ({"lm_head": 1}, "lm_head must be true, false, or an object"),
        ({"lm_head": None}, "lm_head must be true, false, or an object"),
        ({"embeddings": "yes"}, "embeddings must be true, false, or an object"),
        ({"embeddings": {"match": "*"}}, "embeddings: unknown key 'match'"),
        ({"default": [4]}, "default: is \\[4\\], expected an object"),
        ({"default": {"bit": 4}}, "default: unknown key 'bit'; expected bits, codec"),
        ({"default": {"bits": 9}}, "default: bits is 9, expected 1 to 8"),
        ({"default": {"bits": "4"}}, "default: bits is '4'"),
        ({"default": {"bits": 4.0}}, "default: bits is 4.0"),
        ({"default": {"bits": None}}, "default: bits is None, expected 1 to 8"),
        ({"default": {"codec": "gptq"}}, "default: codec is 'gptq'"),
        ({"default": {"codec": ["bcq"]}}, "default: "),
        ({"default": {"group_size": None}}, "default: group_size is None"),
        ({"default": {"nested": 2}}, "default: "),
        ({"default": {"nested": ["2"]}}, "default: nested is \\['2'\\]"),
        ({"default": {"offset": "no"}}, "default: offset"),
        ({"default": {"recognise": 0}}, "default: recognise"),
        ({"default": {"solver": []}}, "default: "),
        ({"default": {"codec": "codebook", "table": []}}, "default: the table has 0 values"),
        ({"default": {"codec": "codebook", "table": ["a", "b"]}}, "default: "),
        ({"default": {"codec": "codebook", "table": 4}}, "default: "),
        (
            {"default": {"codec": "codebook", "bits": 3}},
            "default: bits is 3, and a codebook has the bits of its table, 4",
        ),
        ({"default": {"table": "nf4"}}, "default: table is for codebook, and codec is 'bcq'"),
        ({"default": {"codec": "uniform", "offset": True}}, "default: offset is for bcq, and codec is 'uniform'"),
        ({"rules": [{"match": "a", "solver": "mse"}]}, "rule 1: solver is for uniform, and codec is 'bcq'"),
        ({"rules": ["x"]}, 'rule 1: is "x", expected an object'),
        ({"rules": [{"match": "a", "bits": 3}, {"bits": 3}]}, 'rule 2: has no "match"'),
        ({"rules": [{"math": "a"}]}, "rule 1: unknown key 'math'; expected match, keep, at_least, at_most, bits"),
        ({"rules": [{"match": "a", "at_least": 0}]}, "rule 1: at_least is 0, expected bits from 1 to 8"),
        (
            {"rules": [{"match": "a", "at_least": 3, "row_bits": "43"}]},
            "rule 1: says row_bits, and at_least, which leaves",
        ),
        ({"rules": [{"match": "a", "at_least": 4, "at_most": 3}]}, "rule 1: asks for at least 4 and at most 3 bits"),
        ({"rules": [{"match": "a", "bits": 4, "at_most": 3}]}, "rule 1: says bits, and at_most"),
        (
            {"rules": [{"match": "a", "keep": True, "at_most": 3}]},
            "rule 1: keep leaves the module as it is, so 'at_most'",
        ),
        ({"rules": [{"match": "a", "keep": 1}]}, "rule 1: keep must be true or false"),
        ({"rules": [{"match": "a", "keep": True, "bits": 3}]}, "rule 1: keep leaves the module as it is, so 'bits'"),
        (
            {"rules": [{"match": "a", "row_bits": [4, 4]}]},
            "rule 1: row_bits is \\[4, 4\\], expected a string with a digit",
        ),
        ({"rules": [{"match": "a", "row_bits": "40"}]}, 'rule 1: row_bits is "40", expected a string with a digit'),
        ({"rules": [{"match": "a", "row_bits": "45", "bits": 4}]}, "rule 1: row_bits has other numbers than integers"),
        ({"rules": [{"match": "a", "row_bits": "4", "codec": "codebook"}]}, "rule 1: a codebook has no row_bits"),
        ({"rules": [{"match": "a", "nested": [3]}]}, "rule 1: nested is \\[3\\], expected precisions from 1 to"),
    ],
)
def test_a_bad_value_is_refused(tmp_path: Path, obj: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=rf"recipe\.json: {message}"):
        load(tmp_path, obj)


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="cannot be read: No such file"):
        load_recipe(tmp_path / "none.json", BASE)
    with pytest.raises(RecipeError, match="cannot be read: Is a directory"):
        load_recipe(tmp_path, BASE)
