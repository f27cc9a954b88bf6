"""The study's real model: tokens, loss and fidelity against values measured independently on the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

pytest.importorskip("gguf")
pytest.importorskip("tokenizers")

from longcat_sim.errors import ModelError
from longcat_sim.model.sparse import ExactSelector, Keep, SyntheticSelector
from longcat_sim.studies.topk import smollm2
from longcat_sim.studies.topk.windows import Window, by_selector


@pytest.fixture(scope="module")
def model() -> smollm2.SmolLM2:
    try:
        smollm2.check_installed()
    except ModelError as error:
        pytest.skip(str(error))
    torch.set_num_threads(1)
    return smollm2.SmolLM2()


@pytest.fixture(scope="module")
def text(model: smollm2.SmolLM2) -> torch.Tensor:
    from pydoc_data.topics import topics

    return model.encode("\n\n".join(topics.values()))


@pytest.mark.slow
def test_tokenizer_and_teacher_forcing(model: smollm2.SmolLM2) -> None:
    said = "Paris has 2,148 people-years; naïve <|im_end|>"
    tokens = model.encode(said)
    assert model.tokenizer.decode(tokens.tolist(), skip_special_tokens=False) == said
    pieces = [model.tokenizer.id_to_token(i) for i in tokens.tolist()]
    assert [p for p in pieces if p.strip("Ġ").isdigit()] == ["2", "1", "4", "8"]  # digits stand alone
    assert pieces[-1] == "<|im_end|>"
    prompt = model.encode("The capital of France is")
    logits = model.continue_with(prompt[-1:], model.prefill(prompt[:-1]))
    assert model.tokenizer.decode([int(logits.argmax())]).strip() == "Paris"
    # in two passes as in one
    whole = model.continue_with(prompt[1:], model.prefill(prompt[:1]))
    torch.testing.assert_close(whole[-1], logits[0], rtol=1e-3, atol=1e-3)


def reference(shared: Path) -> dict[str, Any]:
    page = (shared / "reference" / "topk-attention.md").read_text(encoding="utf-8")
    block = page.rsplit("```yaml", 1)[1].split("```")[0]
    return yaml.safe_load(block)["fidelity_smollm2_135m"]


@pytest.mark.slow
def test_fidelity_reference_values(shared: Path, model: smollm2.SmolLM2, text: torch.Tensor) -> None:
    """Reference: section 10 of the fact sheet, with the tolerances given there."""
    wanted = reference(shared)
    if len(text) != 112955:
        pytest.skip(f"another version of the text: {len(text)} tokens")
    window = Window(model, text[1000:], 2048)
    assert window.dense_nll == pytest.approx(1.947, abs=0.005)  # read off another implementation, to 3 digits
    cases = {
        "n2048_rho05_perhead": (Keep(ratio=0.05), ExactSelector()),
        "n2048_rho05_shared": (Keep(ratio=0.05), ExactSelector("all")),
        "n2048_rho01_perhead": (Keep(ratio=0.01), ExactSelector()),
        "n2048_w102_p06_random_miss": (Keep(count=102), SyntheticSelector(0.6, "random", seed=17)),
        "n2048_w102_p06_tail_miss": (Keep(count=102), SyntheticSelector(0.6, "lowest", seed=17)),
    }
    names = {"KL": "kl_nats", "mass": "mass", "precision": "precision"}
    faults = []
    for name, (keep, selector) in cases.items():
        got = window.score(keep, by_selector(selector))
        want = wanted[name]
        for key, value in want.items():
            if key not in names:
                continue
            allowed = want["tol_abs"] if "tol_abs" in want else want["tol"] * value
            found = got[names[key]]
            print(f"{name} {key}: wanted {value} +- {allowed:.3g}, got {found:.4f}")
            if abs(found - value) > allowed:
                faults.append((name, key, value, found))
    assert not faults


@pytest.mark.slow
def test_fidelity_reference_at_4096(shared: Path, model: smollm2.SmolLM2, text: torch.Tensor) -> None:
    want = reference(shared)["n4096_rho05_perhead"]
    if len(text) != 112955:
        pytest.skip(f"another version of the text: {len(text)} tokens")
    got = Window(model, text[1000:], 4096).score(Keep(ratio=0.05), by_selector(ExactSelector()))
    print(f"n4096_rho05_perhead: KL {got['kl_nats']:.4f}, mass {got['mass']:.4f}; wanted {want}")
    assert got["kl_nats"] == pytest.approx(want["KL"], abs=want["tol_abs"])
    assert got["mass"] == pytest.approx(want["mass"], abs=want["tol_abs"])
