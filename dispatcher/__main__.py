"""Lets `python -m dispatcher` do what `dispatcher` does."""

from __future__ import annotations

from dispatcher.cli import main

main()
