"""The thread pool of the kernels: several callers, forks, other pools, and callers inside; always the same result."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from support.concurrency import PATIENCE, at_once, forks, in_child

from lowbit_format.machine import threads
from lowbit_format.machine.threads import num_threads, parallel_rows
from lowbit_format.matrix import StoredMatrix
from lowbit_format.quantize import Target, quantize
from lowbit_format.reference import decode, decode_numpy
from lowbit_format.schema import Scheme
from lowbit_format.testing.decoding import F32
from lowbit_format.testing.matrices import extreme_matrix
from lowbit_format.testing.vectors import assert_same_bits

pytestmark = pytest.mark.filterwarnings(
    "ignore:overflow encountered", "ignore:.*use of fork\\(\\) may lead to deadlocks:DeprecationWarning"
)


@pytest.fixture(autouse=True)
def four_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """More threads than most test machines have cores: the pool is used everywhere."""
    monkeypatch.setenv("LOWBIT_NUM_THREADS", "4")


@pytest.fixture(scope="module")
def matrix() -> StoredMatrix:
    return extreme_matrix(Scheme("bcq", 4, 32, "F16", True), 200, 512)


@pytest.fixture(scope="module")
def expected(matrix: StoredMatrix) -> F32:
    return decode_numpy(matrix)


# --- the number of threads -------------------------------------------------------------------------


@pytest.mark.parametrize(("value", "expected_number"), [("3", 3), ("1", 1)])
def test_the_variable_is_obeyed(value: str, expected_number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOWBIT_NUM_THREADS", value)
    assert num_threads() == expected_number


@pytest.mark.parametrize("value", ["", "0", "-2", "many", "²"])
def test_nonsense_in_the_variable_means_all_cores(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOWBIT_NUM_THREADS")
    cores = num_threads()
    monkeypatch.setenv("LOWBIT_NUM_THREADS", value)
    assert num_threads() == cores >= 1


@pytest.mark.parametrize("count", ["1", "2", "3", "7"])
def test_the_result_does_not_depend_on_the_number(
    count: str, matrix: StoredMatrix, expected: F32, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOWBIT_NUM_THREADS", count)
    assert_same_bits(decode(matrix), expected)
    weight = np.random.default_rng(0).normal(0, 1, (33, 100)).astype(np.float32)
    target = Target("bcq", 3, 32)
    several = quantize(weight, target).matrix
    monkeypatch.setenv("LOWBIT_NUM_THREADS", "1")
    single = quantize(weight, target).matrix
    np.testing.assert_array_equal(several.planes, single.planes)
    assert_same_bits(several.params.scales, single.params.scales)


# --- ranges ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [0, 1, 2, 15, 16, 17, 100])
@pytest.mark.parametrize("grain", [1, 3, 16])
def test_ranges_cover_every_row_once(rows: int, grain: int) -> None:
    seen = list[tuple[int, int]]()
    parallel_rows(lambda start, stop: seen.append((start, stop)), rows, grain=grain)
    assert sorted(r for start, stop in seen for r in range(start, stop)) == list(range(rows))
    assert all(start % grain == 0 for start, _ in seen)


def test_an_error_in_a_kernel_is_raised() -> None:
    def kernel(start: int, stop: int) -> None:
        if start <= 50 < stop:
            raise ValueError("row 50")

    with pytest.raises(ValueError, match="row 50"):
        parallel_rows(kernel, 100)
    parallel_rows(lambda start, stop: None, 100)  # and the pool goes on


@forks
def test_a_kernel_may_call_again(matrix: StoredMatrix, expected: F32) -> None:
    """It runs inline; if every thread of the pool waited for the pool, all would wait for ever."""

    def nested() -> bool:
        out = np.zeros((64, *expected.shape), np.float32)

        def kernel(start: int, stop: int) -> None:
            for i in range(start, stop):
                decode(matrix, out=out[i])

        parallel_rows(kernel, 64)
        return all(copy.tobytes() == expected.tobytes() for copy in out)

    assert in_child(nested)  # a child can be killed when it is stuck, a thread cannot


# --- callers and forks -----------------------------------------------------------------------------


def test_several_python_threads_at_once(matrix: StoredMatrix, expected: F32) -> None:
    weight = np.random.default_rng(1).normal(0, 1, (64, 128)).astype(np.float32)
    packed = quantize(weight, Target("uniform", 4, 32)).matrix.planes

    def decoding() -> None:
        for _ in range(20):
            assert_same_bits(decode(matrix), expected)

    def quantizing() -> None:
        for _ in range(5):
            np.testing.assert_array_equal(quantize(weight, Target("uniform", 4, 32)).matrix.planes, packed)

    at_once(decoding, decoding, quantizing, quantizing)


def test_the_pool_may_grow_while_it_is_used(
    matrix: StoredMatrix, expected: F32, monkeypatch: pytest.MonkeyPatch
) -> None:
    def growing() -> None:
        for n in range(2, 12):
            monkeypatch.setenv("LOWBIT_NUM_THREADS", str(n))
            assert_same_bits(decode(matrix), expected)

    def steady() -> None:
        for _ in range(20):
            assert_same_bits(decode(matrix), expected)

    at_once(growing, steady)


@forks
class TestFork:
    def test_in_a_child(self, matrix: StoredMatrix, expected: F32) -> None:
        assert_same_bits(decode(matrix), expected)
        assert threads._pool is not None  # the parent's threads do not exist in the child
        assert in_child(lambda: decode(matrix).tobytes() == expected.tobytes())
        assert_same_bits(decode(matrix), expected)

    def test_in_a_child_of_a_child(self, matrix: StoredMatrix, expected: F32) -> None:
        def twice() -> bool:
            same = decode(matrix).tobytes() == expected.tobytes()
            return same and in_child(lambda: decode(matrix).tobytes() == expected.tobytes())

        assert in_child(twice)

    def test_while_another_thread_decodes(self, matrix: StoredMatrix, expected: F32) -> None:
        """The child may be born while the pool's lock is held."""
        stop = threading.Event()

        def busy() -> None:
            while not stop.is_set():
                decode(matrix)

        def forking() -> None:
            try:
                for _ in range(5):
                    assert in_child(lambda: decode(matrix).tobytes() == expected.tobytes())
            finally:
                stop.set()

        at_once(busy, forking)


# --- beside torch ----------------------------------------------------------------------------------


class TestBesideTorch:
    @forks
    def test_in_a_worker_of_a_data_loader(self, matrix: StoredMatrix, expected: F32) -> None:
        torch = pytest.importorskip("torch")

        class Decoded(torch.utils.data.Dataset):  # type: ignore[misc, name-defined]
            def __len__(self) -> int:
                return 3

            def __getitem__(self, i: int) -> F32:
                return decode(matrix)

        decode(matrix)
        torch.ones(256, 256) @ torch.ones(256, 256)  # torch's pool exists in the parent too
        loader = torch.utils.data.DataLoader(
            Decoded(), batch_size=1, num_workers=1, multiprocessing_context="fork", timeout=PATIENCE
        )
        batches = list(loader)
        assert len(batches) == 3
        for batch in batches:
            assert_same_bits(batch[0].numpy(), expected)

    def test_beside_its_pool(self, matrix: StoredMatrix, expected: F32) -> None:
        torch = pytest.importorskip("torch")
        a = torch.arange(300.0 * 300).reshape(300, 300) % 7
        product = a @ a  # small integers: exact in any order

        def multiplying() -> None:
            for _ in range(20):
                assert torch.equal(a @ a, product)

        def decoding() -> None:
            for _ in range(20):
                assert_same_bits(decode(matrix), expected)

        at_once(multiplying, decoding, decoding)
