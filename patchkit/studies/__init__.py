"""Whole experiments that a user runs by name."""

from patchkit.studies.attribution_recall import RecallOptions as RecallOptions
from patchkit.studies.attribution_recall import run_recall as run_recall
from patchkit.studies.variable_binding import StudyOptions as StudyOptions
from patchkit.studies.variable_binding import run_study as run_study
