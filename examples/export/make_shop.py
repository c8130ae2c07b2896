"""Makes the sample shop: 30 tables of about 1,000,000 rows in all.

The biggest table has 1000 times as many rows as the smallest. The same seed gives the
same rows. Text is awkward on purpose: quotes, commas, line ends, NULL and "NULL", letters of many
scripts, emoji. Run it as `python -m examples.export.make_shop`.
"""

from __future__ import annotations

import argparse
import sys
import time

import psycopg
from psycopg import sql

from examples.export.shop import SCHEMA, connect

SEED = 20261120
ROWS = 1_000_000
SPREAD = 1000
"""How many times more rows the biggest table has than the smallest."""

# From the biggest to the smallest.
TABLES = (
    *("page_views", "cart_items", "order_lines", "payments", "orders", "shipments"),
    *("stock_moves", "reviews", "customers", "addresses", "price_changes", "invoices"),
    *("coupons_used", "returns", "messages", "wish_lists", "products", "refunds"),
    *("gift_cards", "pictures", "suppliers", "campaigns", "categories", "warehouses"),
    *("employees", "tax_rates", "couriers", "currencies", "shops", "settings"),
)

AWKWARD = (
    *("plain", "", "NULL", r"\N", "comma, comma", 'the "quoted" one', "it's", '"'),
    *("two\nlines", "carriage\r\nreturn", "\ttab\t", " spaces ", "back\\slash", "semi;colon"),
    *(
        "Ünïcödé",
        "日本語の商品",
        "שלום",
        "emoji 🦖🎉",
        "e\u0301 combined",
        "-1e5",
        "=1+1",
        'a,b\n"c"',
    ),
)


def row_counts(total: int) -> dict[str, int]:
    """Share the rows out so that each table has the same factor more than the next."""
    shrink = SPREAD ** (-1 / (len(TABLES) - 1))
    biggest = total * (1 - shrink) / (1 - shrink ** len(TABLES))
    return {name: max(1, round(biggest * shrink**rank)) for rank, name in enumerate(TABLES)}


def make_shop(connection: psycopg.Connection, *, seed: int = SEED, rows: int = ROWS) -> bool:
    """Make the shop, all of it or nothing; say whether there was anything to do."""
    mark = f"sample of {rows} rows, seed {seed}, version 1"
    found = connection.execute(
        "SELECT obj_description(to_regnamespace(%s), 'pg_namespace')", [SCHEMA]
    ).fetchone()
    if found == (mark,):
        return False
    schema = sql.Identifier(SCHEMA)
    with connection.transaction():
        connection.execute(sql.SQL("DROP SCHEMA IF EXISTS {} CASCADE").format(schema))
        connection.execute(sql.SQL("CREATE SCHEMA {}").format(schema))
        for name, count in row_counts(rows).items():
            make_table(connection, name, count, seed)
        connection.execute(sql.SQL("COMMENT ON SCHEMA {} IS {}").format(schema, sql.Literal(mark)))
    connection.execute("ANALYZE")
    return True


def make_table(connection: psycopg.Connection, name: str, count: int, seed: int) -> None:
    """Fill one table in one statement; every value follows from seed, table and row number."""
    connection.execute(
        sql.SQL(
            """
            CREATE TABLE {table} AS
            SELECT row::bigint AS id,
                   encode(h, 'hex') AS reference,
                   ((get_byte(h, 0) * 256 + get_byte(h, 1)) / 100.0)::numeric(10, 2)
                     AS amount,
                   timestamptz '2026-01-01 00:00Z' + row * interval '7 seconds' AS made_at,
                   CASE WHEN get_byte(h, 2) < 16 THEN NULL
                        ELSE words[1 + get_byte(h, 2) % cardinality(words)] END AS note,
                   CASE WHEN get_byte(h, 3) < 64 THEN NULL
                        ELSE words[1 + get_byte(h, 3) % cardinality(words)] || ' #' || row END
                     AS comment,
                   get_byte(h, 4) < 200 AS active,
                   ARRAY[get_byte(h, 5), get_byte(h, 6)] AS codes,
                   jsonb_build_object('k', words[1 + get_byte(h, 7) % cardinality(words)])
                     AS details
            FROM generate_series(1, {count}) AS row,
                 -- OFFSET 0: else the planner would put the hash in wherever it is used.
                 LATERAL (SELECT decode(md5({key} || row), 'hex') AS h OFFSET 0) AS hashed,
                 (SELECT {words}::text[] AS words) AS vocabulary
            """
        ).format(
            table=sql.Identifier(SCHEMA, name),
            count=sql.Literal(count),
            key=sql.Literal(f"{seed}/{name}/"),
            words=sql.Literal(list(AWKWARD)),
        )
    )
    connection.execute(
        sql.SQL("ALTER TABLE {} ADD PRIMARY KEY (id)").format(sql.Identifier(SCHEMA, name))
    )


def main() -> int:
    """Make the shop in the database that SHOP_DATABASE_URL names."""
    parser = argparse.ArgumentParser(description="make the sample shop database")
    parser.add_argument("--rows", type=int, default=ROWS, help=f"default: {ROWS:,}")
    parser.add_argument("--seed", type=int, default=SEED, help=f"default: {SEED}")
    asked = parser.parse_args()
    if asked.rows < len(TABLES):
        parser.error(f"--rows is {asked.rows}; it must be at least {len(TABLES)}, one a table")
    began = time.monotonic()
    with connect() as connection:
        made = make_shop(connection, seed=asked.seed, rows=asked.rows)
    what = f"made in {time.monotonic() - began:.1f} s" if made else "is there already"
    total = sum(row_counts(asked.rows).values())
    print(f"the sample shop of {len(TABLES)} tables and {total:,} rows {what}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
