"""Variance compensation against its theory, at initialisation."""

from __future__ import annotations

import pytest
import torch

from longcat_sim.studies.training.stability import expert_variance, mla_variances

torch.set_num_threads(1)


@pytest.mark.parametrize("fine", [2, 4])
def test_cutting_experts_divides_the_variance_by_m_squared_and_gamma_restores_it(fine: int) -> None:
    """Gates are 1 / m as large and each expert 1 / m as wide; Eq. 8. 10 %: few experts, random gates."""
    coarse = expert_variance(1, 1.0, seed=0)
    assert expert_variance(fine, 1.0, seed=0) / coarse == pytest.approx(1 / fine**2, rel=0.1)
    assert expert_variance(fine, float(fine), seed=0) / coarse == pytest.approx(1.0, rel=0.1)


def test_alphas_bring_low_rank_parts_to_the_variance_of_the_full_width() -> None:
    """q: rank h / 4, k: rank h / 13: without the gains the variances are the ranks' shares of the width."""
    hidden, rank = 256, 256 // 12 // 2 * 2
    with_gain, without = mla_variances(True, 0, layers=1)[0], mla_variances(False, 0, layers=1)[0]
    assert with_gain["k_content"] / with_gain["k_rope"] == pytest.approx(1.0, rel=0.1)
    assert without["k_content"] / without["k_rope"] == pytest.approx(rank / hidden, rel=0.1)
    assert with_gain["q"] == pytest.approx(1.0, rel=0.1)
    assert without["q"] == pytest.approx(0.25, rel=0.1)
    assert with_gain["v"] / without["v"] == pytest.approx(hidden / rank, rel=0.1)
