"""The top-k attention study on a small real language model and on associative recall."""

from longcat_sim.studies.topk.study import run_study

__all__ = ["run_study"]
