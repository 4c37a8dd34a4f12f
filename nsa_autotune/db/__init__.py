"""The tuning database: every measurement and the winners, as strings, numbers and canonical JSON."""

from __future__ import annotations

from .database import TuningDatabase
from .lookup import open_for_lookup
from .records import TrialRecord, WinnerRecord
from .store import TuningStore

__all__ = ["TrialRecord", "TuningDatabase", "TuningStore", "WinnerRecord", "open_for_lookup"]
