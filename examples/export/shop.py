"""Where the shop's database is, for all programs of this example."""

from __future__ import annotations

import os
import sys

import psycopg

SCHEMA = "shop"


def shop_address() -> str:
    """The libpq address in SHOP_DATABASE_URL; SQLAlchemy's way of writing it is taken too."""
    address = os.environ.get("SHOP_DATABASE_URL")
    if not address:
        sys.exit(
            "SHOP_DATABASE_URL is not set: it must name the shop's database, "
            "such as postgresql://user:password@host:5432/shop"
        )
    return address.replace("postgresql+psycopg:", "postgresql:", 1)


def connect() -> psycopg.Connection:
    """Open the shop's database; each statement is a transaction of its own."""
    return psycopg.connect(shop_address(), connect_timeout=10, autocommit=True)
