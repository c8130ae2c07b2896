#!/bin/sh
# An image's program as it was before: every task reads the same IDS and takes ids[i::n] of it.
# For each of its ids it adds up the numbers of DATA/in/ID.csv and writes DATA/out/ID.json.
set -u
data=${DATA:-/data} index=$CLOUD_RUN_TASK_INDEX count=$CLOUD_RUN_TASK_COUNT
place=0 failed=0

total() {
    numbers=$data/in/$1.csv draft=$data/out/.$1.$$.part
    [ -r "$numbers" ] || { echo "id $1: there is no $numbers" >&2; return 1; }
    mkdir -p "$data/out" &&
        awk -v id="$1" '{ sum += $1 } END { printf "{\"id\": \"%s\", \"total\": %d}\n", id, sum }' \
            "$numbers" > "$draft" &&
        mv "$draft" "$data/out/$1.json" && echo "id $1: done"
}

IFS=,
for id in $IDS; do
    if [ $((place % count)) -eq "$index" ]; then
        total "$id" || failed=1
    fi
    place=$((place + 1))
done
exit $failed
