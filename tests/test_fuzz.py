"""A part of what `python tests/fuzz.py --minutes 60` does, with inputs that hypothesis draws and that stay the same."""

from pathlib import Path

import pytest
import torch
from fuzz import Bench, try_one
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

TARGETS = [name.removeprefix("fuzz_") for name in dir(Bench) if name.startswith("fuzz_")]
INPUTS = 120  # of each target: about half a minute in all


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Bench:
    torch.set_num_threads(1)
    return Bench(Path(tmp_path_factory.mktemp("fuzz")))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("target", TARGETS)
def test_damaged_inputs_work_or_are_refused_with_a_sentence(target, bench):
    refused = set()

    @settings(
        max_examples=INPUTS, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(st.integers(0, 10**9))
    def check(number: int) -> None:
        refused.add(try_one(bench, target, number))

    check()
    assert len(refused) > 1
    print(f"{target}: {INPUTS} inputs, refused in {len(refused - {None})} different ways")
