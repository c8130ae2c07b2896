"""Runs bqemulator and gcp-storage-emulator until its standard input ends.

A program of the virtualenv that scripts/google-emulators.sh makes: nothing else imports it. Both
serve on loopback, on ports of their own, which it writes to its standard output as one line of
JSON; log lines may come before it. Both keep all that they are told in memory, but for the files
that BigQuery exports: those go into FOLDER, because bqemulator knows no Cloud Storage.

    google_servers.py FOLDER BUCKET [SHARD]

SHARD is the size in bytes above which an export is cut into more files. Without it there is no
BigQuery, which takes longer to start than all else.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any

from gcp_storage_emulator.server import create_server


async def start_bigquery(folder: Path, shard: int) -> Any:
    """Start bqemulator."""
    from bqemulator.config import Settings  # noqa: PLC0415 -- a second, which few tests need
    from bqemulator.server import EmulatorServer  # noqa: PLC0415 -- as above

    settings = Settings(
        rest_port=0,
        grpc_port=0,
        gcs_local_root=folder,
        export_shard_threshold_bytes=shard,
        enable_format_extensions=False,  # that of Avro would be fetched
        log_level="warning",
    )
    bigquery = EmulatorServer(settings)
    await bigquery.start()
    return bigquery


async def serve(folder: Path, bucket: str, shard: int | None) -> None:
    """Start them, tell where they are, and stop them when nobody needs them any more."""
    bigquery = None if shard is None else await start_bigquery(folder, shard)
    with create_server("127.0.0.1", 0, in_memory=True, default_bucket=bucket) as storage:
        # It tells its port nowhere else.
        port = storage._api._httpd.server_port
        url = "" if bigquery is None else bigquery.rest_url
        told = {"bigquery": url, "storage": f"http://127.0.0.1:{port}"}
        # From here on, what they print is no part of what is told.
        with os.fdopen(os.dup(sys.stdout.fileno()), "w") as out:
            os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
            out.write(f"{json.dumps(told)}\n")
        await asyncio.to_thread(sys.stdin.read)
    if bigquery is not None:
        await bigquery.stop()


if __name__ == "__main__":
    cut = int(sys.argv[3]) if len(sys.argv) > 3 else None
    asyncio.run(serve(Path(sys.argv[1]), sys.argv[2], cut))
