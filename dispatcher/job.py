"""What to run: the frozen, validated value that a batch keeps a copy of.

A `Job` names a target and says what its containers are given, how items become chunks, and what
happens when a chunk fails. It knows no database and no backend; `config.py` checks its `options`
against the backend of its target.
"""

from __future__ import annotations

import re
from datetime import timedelta
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer

__all__ = ["Chunking", "Duration", "ItemSource", "Job", "Limits", "RetryPolicy", "SuccessPolicy"]
