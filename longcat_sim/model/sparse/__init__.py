"""Top-k sparse attention: the operation, the selectors, the indexer's training, and fidelity to dense attention."""

from longcat_sim.model.sparse.attention import attend, topk_attention
from longcat_sim.model.sparse.blocks import BlockSelector
from longcat_sim.model.sparse.fidelity import attention_fidelity, logit_fidelity
from longcat_sim.model.sparse.indexer import IndexerSelector, LightningIndexer, index_scores
from longcat_sim.model.sparse.keep import Keep, Rows, rows_of
from longcat_sim.model.sparse.select import ExactSelector, Selector, Sharing, topk_indices
from longcat_sim.model.sparse.synthetic import SyntheticSelector

__all__ = [
    "BlockSelector",
    "ExactSelector",
    "IndexerSelector",
    "Keep",
    "LightningIndexer",
    "Rows",
    "Selector",
    "Sharing",
    "SyntheticSelector",
    "attend",
    "attention_fidelity",
    "index_scores",
    "logit_fidelity",
    "rows_of",
    "topk_attention",
    "topk_indices",
]
