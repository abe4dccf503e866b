"""Results by name, beside scikit-learn's and torch's; and the choice of a rate."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lowbit_format.errors import TuningError
from lowbit_format.tuning.encoding import IGNORED
from lowbit_format.tuning.metrics import macro_f1, pearson, reduced, results
from lowbit_format.tuning.rates import choose_rate, trial_rate, trial_steps
from lowbit_format.tuning.training import class_weights_of, steps_for

DRAW = np.random.default_rng(0)


def test_classification() -> None:
    logits, labels = DRAW.normal(size=(50, 4)).astype(np.float32), DRAW.integers(0, 3, 50)
    found = results("classification", logits, labels)
    assert found["accuracy"] == pytest.approx((logits.argmax(1) == labels).mean())
    assert found["loss"] == pytest.approx(float(F.cross_entropy(torch.tensor(logits), torch.tensor(labels))), rel=1e-5)


def test_f1_is_that_of_scikit_learn() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    found, wanted = DRAW.integers(0, 5, 60), DRAW.integers(0, 4, 60)
    assert macro_f1(found, wanted) == pytest.approx(metrics.f1_score(wanted, found, average="macro"))


def test_token_classification_counts_what_is_asked() -> None:
    logits, labels = np.zeros((2, 3, 2), np.float32), np.array([[IGNORED, 1, 0], [1, IGNORED, IGNORED]])
    logits[..., 1] = 1
    found = results("token-classification", logits, labels)
    assert (found["accuracy"], found["f1"]) == (pytest.approx(2 / 3), pytest.approx(0.4))


def test_regression() -> None:
    wanted = DRAW.normal(size=30)
    found = results("regression", (2 * wanted + 1)[:, None], wanted)
    assert (found["pearson"], found["mse"]) == (pytest.approx(1), pytest.approx(np.square(wanted + 1).mean()))
    assert pearson(np.zeros(3), wanted[:3]) == 0


def test_perplexity_counts_tokens_not_batches() -> None:
    logits, labels = torch.randn(3, 6, 10), torch.randint(0, 10, (3, 6))
    labels[0, 2:] = IGNORED
    parts = [reduced("language-modelling", logits[i : i + 1], labels[i : i + 1]) for i in range(3)]
    found = results("language-modelling", torch.cat(parts).numpy(), labels.numpy())
    want = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)
    assert found["loss"] == pytest.approx(float(want), rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(float(want)), rel=1e-5)


def test_class_weights_make_labels_equal() -> None:
    items = [{"labels": 0}] * 6 + [{"labels": 1}] * 2
    weights = class_weights_of("classification", items, 2)
    assert 6 * weights[0] == 2 * weights[1] == pytest.approx(4)
    with pytest.raises(TuningError, match="regression has no classes"):
        class_weights_of("regression", items, 2)


# --- rates and steps -------------------------------------------------------------------------------


@pytest.mark.parametrize("best", [0.000625, 0.00125, 0.0025, 5e-3, 1e-2, 2e-2, 4e-2, 8e-2, 0.16])
def test_the_best_rate_is_found_also_beyond_the_first_ones(best: float) -> None:
    tried = list[float]()

    def trial(rate: float) -> float:
        tried.append(rate)
        return abs(math.log(rate / best))

    losses = dict[float, float]()
    assert choose_rate(trial, losses) == pytest.approx(best)
    assert list(losses) == tried
    assert choose_rate(trial, losses) == pytest.approx(best)
    assert len(tried) == len(set(tried)) <= 6  # what is known is not tried again


def test_of_rates_that_do_as_well_the_smallest_is_taken() -> None:
    assert choose_rate(lambda rate: {5e-3: 0.6, 1e-2: 0.51, 2e-2: 0.5}.get(rate, 0.7), {}) == 1e-2


def test_a_short_training_goes_as_far() -> None:
    assert trial_rate(1e-2, 800) * trial_steps(800) == pytest.approx(1e-2 * 800)
    assert trial_rate(1e-2, 10) == 1e-2  # it is the whole one


def test_rates_that_all_diverge() -> None:
    with pytest.raises(TuningError, match="diverged at all rates"):
        choose_rate(lambda rate: math.inf, {})


def test_steps() -> None:
    assert steps_for(6000, 32, None) == 570  # three epochs, rounded up
    assert steps_for(40, 32, None) == 40  # twenty epochs
    assert steps_for(1000, 32, None) == 200
    assert steps_for(67_000, 32, None) == 2100  # one epoch
    assert steps_for(1000, 32, 0.5) == 20
    assert steps_for(10, 32, 1) == 1
    assert [trial_steps(n) for n in (10, 100, 800, 4000)] == [10, 20, 100, 150]
