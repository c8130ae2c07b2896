#!/usr/bin/env bash
# Install Debian's own Docker Engine and busybox, for the tests that run real containers: they start
# an engine of their own, and make its images of busybox.
# Does nothing where both are there already, or where this is not a Debian on which we may install.
set -euo pipefail

if command -v dockerd >/dev/null && command -v docker >/dev/null && command -v busybox >/dev/null; then
    exit 0
fi
if [ "$(id -u)" -ne 0 ] || ! grep -qs '^VERSION_ID="12"' /etc/os-release; then
    echo "no Debian 12 on which we may install: the tests with real containers will be skipped" >&2
    exit 0
fi
apt-get update -qq
DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends docker.io busybox-static
