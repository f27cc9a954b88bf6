"""The training recipe at small scale: budget control, transfer rules, growth, stability, determinism, MTP.

Source of the recipe: LongCat-Flash Technical Report, arXiv 2509.01322v2, sections 2 and 3. Sizes, rates and
coefficients that the report does not give are ours and say so.
"""

from longcat_sim.model.training.config import TrainConfig
from longcat_sim.model.training.corpus import Corpus, TextCorpus, library_corpus, read_corpus
from longcat_sim.model.training.loop import Trainer

__all__ = ["Corpus", "TextCorpus", "TrainConfig", "Trainer", "library_corpus", "read_corpus"]
