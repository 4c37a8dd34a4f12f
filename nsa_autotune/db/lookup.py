"""Opening the database for the dispatcher, which must serve even where no database can be made."""

from __future__ import annotations

import logging
import os

from ..errors import StoreError
from .engine import parse_location
from .paths import DATABASE_VARIABLE, chosen_url
from .store import TuningStore

logger = logging.getLogger(__name__)


def open_for_lookup(url: str | None = None) -> TuningStore:
    """A store to look winners up in; if the default file cannot be made, the shipped winners alone, in memory."""
    try:
        return TuningStore(url)
    except StoreError as error:
        default = parse_location(chosen_url(url))
        if url or os.environ.get(DATABASE_VARIABLE) or default.path is None or default.path.exists():
            raise
        logger.warning("%s Only the shipped winners are served.", error)
        return TuningStore("sqlite://")
