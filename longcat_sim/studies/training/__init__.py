"""The training recipe: ``train`` a small LongCat-Flash, ``run_study`` for one line per published claim."""

from longcat_sim.studies.training.claims import Claim
from longcat_sim.studies.training.run import TrainResult, train
from longcat_sim.studies.training.study import StudyResult, run_study

__all__ = ["Claim", "StudyResult", "TrainResult", "run_study", "train"]
