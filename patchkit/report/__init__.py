"""Pictures and the self-contained report page, from result objects alone."""

from patchkit.report import _scores_words
from patchkit.report._across_page import comparison_page as comparison_page
from patchkit.report._across_page import generalisation_page as generalisation_page
from patchkit.report._across_page import write_comparison_report as write_comparison_report
from patchkit.report._across_page import write_generalisation_report as write_generalisation_report
from patchkit.report._edge_page import circuits_page as circuits_page
from patchkit.report._edge_page import edges_page as edges_page
from patchkit.report._edge_page import evaluation_page as evaluation_page
from patchkit.report._edge_page import paths_page as paths_page
from patchkit.report._edge_page import scrubbing_page as scrubbing_page
from patchkit.report._edge_page import write_circuits_report as write_circuits_report
from patchkit.report._edge_page import write_edges_report as write_edges_report
from patchkit.report._edge_page import write_evaluation_report as write_evaluation_report
from patchkit.report._edge_page import write_paths_report as write_paths_report
from patchkit.report._edge_page import write_scrubbing_report as write_scrubbing_report
from patchkit.report._scoreboard_docs import write_scoreboard_docs as write_scoreboard_docs
from patchkit.report._scoreboard_page import scoreboard_page as scoreboard_page
from patchkit.report._scoreboard_page import write_scoreboard_report as write_scoreboard_report
from patchkit.report.page import mask_page as mask_page
from patchkit.report.page import recall_page as recall_page
from patchkit.report.page import scores_page as scores_page
from patchkit.report.page import write_mask_report as write_mask_report
from patchkit.report.page import write_recall_report as write_recall_report
from patchkit.report.page import write_report as write_report
from patchkit.report.page import write_scores_report as write_scores_report

scores_headline = _scores_words.headline
scores_warning = _scores_words.warning
