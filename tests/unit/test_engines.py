"""Engines of a scenario: what the workload says about the contexts in decode."""

import pytest

from longcat_sim.specs.serve import Serve
from longcat_sim.studies.engines import decode_context_spread


def serve(inputs: dict, outputs: dict) -> Serve:
    workload = {"arrivals": {"rate": "1 /s"}, "input_tokens": inputs, "output_tokens": outputs, "num_requests": 5000}
    return Serve.model_validate({"workload": workload})


def test_equal_requests_differ_only_by_how_far_they_are() -> None:
    """Contexts uniform on 1000..2000: standard deviation 1000 / sqrt(12), mean 1500."""
    length = {"distribution": "constant", "mean": 1000}
    assert decode_context_spread(serve(length, length)) == pytest.approx(1000 / 12**0.5 / 1500, rel=0.01)


def test_prompts_that_differ_spread_contexts() -> None:
    """With one token of answer the spread is that of the prompts."""
    prompts = {"distribution": "lognormal", "mean": 4000, "cv": 0.8}
    one = {"distribution": "constant", "mean": 1}
    assert decode_context_spread(serve(prompts, one)) == pytest.approx(0.8, rel=0.1)


def test_no_workload_has_no_spread() -> None:
    assert decode_context_spread(Serve.model_validate({"workload": {}})) == 0.0
