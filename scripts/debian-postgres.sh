#!/usr/bin/env bash
# Install Debian's own Postgres, for the acceptance test on a server older than the embedded one.
# Does nothing where it is there already, or where this is not a Debian on which we may install.
set -euo pipefail

if compgen -G '/usr/lib/postgresql/15/bin/postgres' >/dev/null; then
    exit 0
fi
if [ "$(id -u)" -ne 0 ] || ! grep -qs '^VERSION_ID="12"' /etc/os-release; then
    echo "no Debian 12 on which we may install: the test on Postgres 15 will be skipped" >&2
    exit 0
fi
apt-get update -qq
# Without a cluster of its own: the tests make theirs.
DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends postgresql-common
sed -i 's/^#\?create_main_cluster.*/create_main_cluster = false/' /etc/postgresql-common/createcluster.conf
DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends postgresql-15
