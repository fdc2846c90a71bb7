"""Whole experiments that a user runs by name."""

from patchkit.studies.attribution_recall import RecallOptions as RecallOptions
from patchkit.studies.attribution_recall import run_recall as run_recall
from patchkit.studies.comparison import CompareOptions as CompareOptions
from patchkit.studies.comparison import compare_models as compare_models
from patchkit.studies.generalisation import GeneraliseOptions as GeneraliseOptions
from patchkit.studies.generalisation import generalise as generalise
from patchkit.studies.variable_binding import StudyOptions as StudyOptions
from patchkit.studies.variable_binding import run_study as run_study
