"""``RoutingTrace``: which experts each token chose in each layer, recorded from the executable model."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from longcat_sim.errors import MeasurementError
from longcat_sim.records.files import atomic

UNREADABLE = (OSError, KeyError, TypeError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)
"""What numpy raises for files that are cut short, damaged, or hold other arrays."""


@dataclass(frozen=True)
class RoutingTrace:
    """Chosen experts [layers, tokens, K]; ids from ``n_routed_experts`` on are zero-computation experts."""

    experts: npt.NDArray[np.int32]
    n_routed_experts: int
    zero_expert_num: int
    note: str = ""
    """Where the tokens and the weights come from: random weights do not route like trained ones."""

    def __post_init__(self) -> None:
        choices = self.n_routed_experts + self.zero_expert_num
        if self.experts.ndim != 3 or 0 in self.experts.shape:
            raise MeasurementError(
                f"routing trace: expected an array [layers, tokens, K], none 0; got {list(self.experts.shape)}"
            )
        low, high = int(self.experts.min()), int(self.experts.max())
        if low < 0 or high >= choices:
            raise MeasurementError(
                f"routing trace: expected expert ids 0..{choices - 1} (n_routed_experts + zero_expert_num - 1); "
                f"got {low if low < 0 else high}"
            )

    @classmethod
    def from_layers(
        cls, layers: Sequence[npt.NDArray[np.integer]], n_routed_experts: int, zero_expert_num: int, note: str = ""
    ) -> RoutingTrace:
        """Return the trace of per-layer arrays [tokens, K]."""
        return cls(np.stack([layer.astype(np.int32) for layer in layers]), n_routed_experts, zero_expert_num, note)

    @property
    def num_layers(self) -> int:
        """Layers with a router."""
        return self.experts.shape[0]

    @property
    def num_tokens(self) -> int:
        """Tokens recorded in each layer."""
        return self.experts.shape[1]

    @property
    def moe_topk(self) -> int:
        """Choices of a token."""
        return self.experts.shape[2]

    def ffn_experts(self) -> npt.NDArray[np.int64]:
        """Return the number of FFN experts of each token [layers, tokens]."""
        return (self.experts < self.n_routed_experts).sum(-1)

    def tokens_per_expert(self) -> npt.NDArray[np.int64]:
        """Return the tokens that chose each expert [layers, FFN experts + zero-computation experts]."""
        choices = self.n_routed_experts + self.zero_expert_num
        return np.stack([np.bincount(layer.ravel(), minlength=choices) for layer in self.experts])

    def expert_popularity(self) -> npt.NDArray[np.float64]:
        """Return each expert's share of all choices [layers, experts]; rows sum to 1."""
        return self.tokens_per_expert() / (self.num_tokens * self.moe_topk)

    def tokens_per_rank(self, ep_size: int) -> npt.NDArray[np.int64]:
        """Return the token copies bound for each expert-parallel rank, experts placed in order [layers, ranks].

        Raises:
            MeasurementError: ``ep_size`` does not divide ``n_routed_experts``.
        """
        if ep_size < 1 or self.n_routed_experts % ep_size:
            raise MeasurementError(
                f"ep_size must divide n_routed_experts: {self.n_routed_experts} % {ep_size} = "
                f"{self.n_routed_experts % ep_size if ep_size > 0 else 'undefined'}"
            )
        loads = self.tokens_per_expert()[:, : self.n_routed_experts]
        return loads.reshape(self.num_layers, ep_size, -1).sum(-1)

    def imbalance(self, ep_size: int) -> npt.NDArray[np.float64]:
        """Return the busiest rank's load over the mean, per layer."""
        loads = self.tokens_per_rank(ep_size)
        return loads.max(1) / np.maximum(loads.mean(1), 1e-300)

    def save(self, path: Path) -> None:
        """Write the trace as a compressed ``.npz`` under just this name, whole or not at all."""
        with atomic(path, binary=True) as file:
            np.savez_compressed(
                file,
                experts=self.experts,
                n_routed_experts=self.n_routed_experts,
                zero_expert_num=self.zero_expert_num,
                note=self.note,
            )

    @classmethod
    def load(cls, path: Path) -> RoutingTrace:
        """Return the trace of a file written by ``save``.

        Raises:
            MeasurementError: no such file, or not a routing trace.
        """
        try:
            with np.load(path, allow_pickle=False) as kept:
                return cls(
                    kept["experts"].astype(np.int32),
                    int(kept["n_routed_experts"]),
                    int(kept["zero_expert_num"]),
                    str(kept["note"]),
                )
        except MeasurementError:
            raise
        except UNREADABLE as error:
            raise MeasurementError(
                f"{path}: expected a routing trace (.npz, written by RoutingTrace.save); {error}"
            ) from None
