"""The data pipeline: from preference rows of any layout to token sequences. Every dropped row is counted."""

from qlora_rm.preferences.comparison import Candidates, Comparison, Content, Message, Origin, Pair, Preferences, Tokens
from qlora_rm.preferences.formats import parse_candidates, parse_comparison, recognize
from qlora_rm.preferences.load import PreferenceData, load_comparisons, load_preferences
from qlora_rm.preferences.load_report import Part, Report
from qlora_rm.preferences.row_errors import Ledger, RowFault
from qlora_rm.preferences.sources import Entry, Source, read_rows, sources
from qlora_rm.preferences.tokenization import EOS_RULE, Tokenization, Tokenized

__all__ = [
    "EOS_RULE",
    "Candidates",
    "Comparison",
    "Content",
    "Entry",
    "Ledger",
    "Message",
    "Origin",
    "Pair",
    "Part",
    "PreferenceData",
    "Preferences",
    "Report",
    "RowFault",
    "Source",
    "Tokenization",
    "Tokenized",
    "Tokens",
    "load_comparisons",
    "load_preferences",
    "parse_candidates",
    "parse_comparison",
    "read_rows",
    "recognize",
    "sources",
]
