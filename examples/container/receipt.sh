# The container's part in POSIX shell: source this file, then call `dispatch_each COMMAND`.
#
#     . ./receipt.sh
#     dispatch_each ./convert            # runs once for every item, which is in $ITEM
#
# It speaks the protocol of docs/container.md over files and signed URLs (with curl). For s3:// and
# gs:// use the wrapper, `python3 container.py exec --each -- COMMAND`.
#
# With jq, items may be any JSON. Without it they must be numbers or plain texts without commas,
# quotes and backslashes, such as ids.

dispatch_index=${DISPATCH_TASK_INDEX:-${CLOUD_RUN_TASK_INDEX:-${AWS_BATCH_JOB_ARRAY_INDEX:-${JOB_COMPLETION_INDEX:-0}}}}
dispatch_work=$(mktemp -d)
: >"$dispatch_work/done"

dispatch_fail() {
    echo "receipt.sh: $1" >&2
    exit "${2:-75}"
}

# file:///a/b -> /a/b. Names with %20 and the like are not for this example.
dispatch_path() {
    printf '%s\n' "${1#file://}"
}

# Prints an object.
dispatch_get() {
    case $1 in
    file://*) cat "$(dispatch_path "$1")" ;;
    https://* | http://*) curl -fsS --retry 3 "$1" ;;
    *) dispatch_fail "cannot read ${1%%\?*}" 65 ;;
    esac
}

# Writes a file to an object that must not exist yet; 1 if it does.
dispatch_create() {
    case $2 in
    file://*)
        path=$(dispatch_path "$2")
        mkdir -p "$(dirname "$path")" || dispatch_fail "cannot write $2"
        # A link is made whole or not at all, and never over another file.
        cp "$1" "$path.$$.draft" || dispatch_fail "cannot write $2"
        ln "$path.$$.draft" "$path" 2>/dev/null
        linked=$?
        rm -f "$path.$$.draft"
        [ $linked = 0 ] || [ -e "$path" ] || dispatch_fail "cannot write $2"
        return $linked
        ;;
    https://* | http://*)
        status=$(curl -sS --retry 3 -o /dev/null -w '%{http_code}' -X PUT -H 'If-None-Match: *' \
            -H 'Content-Type: application/json' --data-binary "@$1" "$2")
        case $status in
        2??) return 0 ;;
        412) return 1 ;;
        *) dispatch_fail "cannot write ${2%%\?*}: $status" ;;
        esac
        ;;
    *) dispatch_fail "cannot write ${2%%\?*}" 65 ;;
    esac
}

# Writes a file to an object in place of what was there.
dispatch_replace() {
    path=$(dispatch_path "$2")
    mkdir -p "$(dirname "$path")" && cp "$1" "$path.$$.draft" && mv "$path.$$.draft" "$path"
}

# Prints this task's line of the input; or, where there is one task only, its items.
dispatch_line() {
    if [ -n "${DISPATCH_ITEMS:-}" ]; then
        printf '%s\n' "$DISPATCH_ITEMS"
    elif [ -n "${DISPATCH_INPUT:-}" ]; then
        printf '%s\n' "$DISPATCH_INPUT" | sed -n "$((dispatch_index + 1))p"
    elif [ -n "${DISPATCH_INPUT_URI:-}" ]; then
        dispatch_get "$DISPATCH_INPUT_URI" >"$dispatch_work/input" || dispatch_fail "no input"
        sed -n "$((dispatch_index + 1))p" "$dispatch_work/input"
    else
        dispatch_fail "none of DISPATCH_ITEMS, DISPATCH_INPUT and DISPATCH_INPUT_URI is set" 65
    fi
}

# Prints a number that stands in this task's line: `dispatch_number chunk null`.
dispatch_number() {
    found=$(printf '%s\n' "$dispatch_own" | sed -n "s/^{.*\"$1\":\\([0-9][0-9]*\\).*\"items\":.*/\\1/p")
    printf '%s\n' "${found:-$2}"
}

# Prints the items, one a line.
dispatch_items() {
    if command -v jq >/dev/null; then
        printf '%s\n' "$dispatch_own" |
            jq -r '(if type == "array" then . else .items end)[] | if type == "string" then . else tojson end'
    else
        printf '%s\n' "$dispatch_own" | sed 's/^{.*"items"://; s/^[^[]*\[//; s/\].*$//' |
            tr ',' '\n' | sed 's/^ *"//; s/" *$//; /^ *$/d'
    fi
}

# Writes a receipt of what is done: `dispatch_receipt true|false FILE`.
dispatch_receipt() {
    {
        printf '{"version":1,"key":"%s","task":%s' "${DISPATCH_KEY:-}" "$dispatch_index"
        printf ',"chunk":%s' "$(dispatch_number chunk "${DISPATCH_CHUNK:-null}")"
        printf ',"attempt":%s' "$(dispatch_number attempt "${DISPATCH_ATTEMPT:-1}")"
        printf ',"complete":%s,"items":[' "$1"
        paste -s -d, "$dispatch_work/done" | tr -d '\n'
        printf '],"written_at":"%s"}\n' "$(date -u +%Y-%m-%dT%H:%M:%SZ)"
    } >"$2"
}

# Keeps what is done by now, where it may be overwritten: for a signed URL, nowhere.
dispatch_keep() {
    case $dispatch_result in
    file://*)
        dispatch_receipt false "$dispatch_work/progress"
        dispatch_replace "$dispatch_work/progress" "${dispatch_result%.json}.progress.json"
        ;;
    esac
}

dispatch_terminated() {
    trap '' TERM
    [ -z "${dispatch_child:-}" ] || kill -TERM "$dispatch_child" 2>/dev/null
    dispatch_keep
    rm -rf "$dispatch_work"
    exit 143
}

# Runs a command once for every item, and writes the receipt. 0: all succeeded; 1: some failed.
dispatch_each() {
    dispatch_own=$(dispatch_line) || exit
    [ -n "$dispatch_own" ] || dispatch_fail "the input has no line for task $dispatch_index" 65
    dispatch_result=$(printf '%s\n' "$dispatch_own" |
        sed -n 's/^{[^[]*"result_uri":"\([^"]*\)".*/\1/p')
    dispatch_result=${dispatch_result:-${DISPATCH_RESULT_URI:-}}
    case $dispatch_result in
    */) dispatch_result=$dispatch_result$dispatch_index.json ;;
    esac
    trap dispatch_terminated TERM
    dispatch_items >"$dispatch_work/items" || dispatch_fail "the items cannot be read" 65
    position=0
    failed=0
    kept=$(date +%s)
    while IFS= read -r ITEM <&3; do
        export ITEM
        # In the background, because a shell hears a signal only while it waits.
        "$@" 3<&- &
        dispatch_child=$!
        wait "$dispatch_child"
        code=$?
        dispatch_child=
        if [ $code = 0 ]; then
            printf '{"i":%s,"ok":true}\n' "$position" >>"$dispatch_work/done"
        else
            failed=1
            printf '{"i":%s,"ok":false,"error":"exit code %s"}\n' "$position" "$code" \
                >>"$dispatch_work/done"
        fi
        position=$((position + 1))
        now=$(date +%s)
        if [ $((now - kept)) -ge 5 ]; then
            dispatch_keep
            kept=$now
        fi
    done 3<"$dispatch_work/items"
    if [ -n "$dispatch_result" ]; then
        dispatch_receipt true "$dispatch_work/receipt"
        dispatch_create "$dispatch_work/receipt" "$dispatch_result" ||
            echo "receipt.sh: there is a receipt already; it stands" >&2
    fi
    rm -rf "$dispatch_work"
    trap - TERM
    return $failed
}
