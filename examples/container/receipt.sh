# The container's part in POSIX shell: source this file, then call `dispatch_each COMMAND`.
#
#     . ./receipt.sh
#     dispatch_each ./convert            # runs once for every item, which is in $ITEM
#
# It speaks the protocol of docs/container.md over files and signed URLs (with curl). For s3:// and
# gs:// use the wrapper, `python3 container.py exec --each -- COMMAND`.
#
# With jq, items may be any JSON, with numbers up to 2^53. Without it they must be numbers or plain
# texts without commas, quotes and backslashes, such as ids; others are refused.

dispatch_index=${DISPATCH_TASK_INDEX:-${CLOUD_RUN_TASK_INDEX:-${AWS_BATCH_JOB_ARRAY_INDEX:-${JOB_COMPLETION_INDEX:-0}}}}
dispatch_work=$(mktemp -d)
: >"$dispatch_work/done"

dispatch_fail() {
    echo "receipt.sh: $1" >&2
    rm -rf "$dispatch_work"
    exit "${2:-75}"
}

# file:///a/b -> /a/b. Names with %20 and the like are not for this example.
dispatch_path() {
    case $1 in
    *%*) dispatch_fail "$1 is percent-encoded: use container.py" 65 ;;
    file:///*) printf '%s\n' "${1#file://}" ;;
    *) dispatch_fail "$1 is not file:/// and an absolute path" 65 ;;
    esac
}

# Names a draft of a file as nobody else does: in containers, numbers of processes are equal.
dispatch_draft() {
    printf '%s\n' "$1.$(uname -n).${dispatch_work##*/}.draft"
}

# Prints an object.
dispatch_get() {
    case $1 in
    file:*)
        path=$(dispatch_path "$1") || exit
        cat "$path"
        ;;
    https://* | http://*) curl -fsS --retry 3 "$1" ;;
    *) dispatch_fail "cannot read ${1%%\?*}" 65 ;;
    esac
}

# Writes a file to an object that must not exist yet; 1 if it does.
dispatch_create() {
    case $2 in
    file:*)
        path=$(dispatch_path "$2") || exit
        mkdir -p "$(dirname "$path")" || dispatch_fail "cannot write $2"
        # A link is made whole or not at all, and never over another file.
        draft=$(dispatch_draft "$path")
        cp "$1" "$draft" || dispatch_fail "cannot write $2"
        linked=0
        ln "$draft" "$path" 2>/dev/null || linked=1
        rm -f "$draft"
        [ $linked = 0 ] || [ -e "$path" ] || dispatch_fail "cannot write $2"
        return $linked
        ;;
    https://* | http://*)
        # 409 is two conditional writes at once, and 000 no answer.
        for pause in 0 1 3 end; do
            status=$(curl -sS -o /dev/null -w '%{http_code}' -X PUT -H 'If-None-Match: *' \
                -H 'Content-Type: application/json' --data-binary "@$1" "$2")
            case $status in
            2??) return 0 ;;
            412) return 1 ;;
            408 | 409 | 425 | 429 | 5?? | 000) [ $pause = end ] || sleep $pause ;;
            *) break ;;
            esac
        done
        dispatch_fail "cannot write ${2%%\?*}: $status"
        ;;
    *) dispatch_fail "cannot write ${2%%\?*}" 65 ;;
    esac
}

# Writes a file to an object in place of what was there.
dispatch_replace() {
    path=$(dispatch_path "$2") || exit
    draft=$(dispatch_draft "$path")
    mkdir -p "$(dirname "$path")" && cp "$1" "$draft" && mv "$draft" "$path"
}

# Takes the work for this execution, or leaves with 94. Where it cannot, it must not be begun.
dispatch_claim() {
    [ -n "${DISPATCH_CLAIM_URI:-}" ] || return 0
    case $DISPATCH_CLAIM_URI in
    file:*) ;;
    *) dispatch_fail "cannot claim ${DISPATCH_CLAIM_URI%%\?*}: only files; use container.py" 65 ;;
    esac
    own=${AWS_BATCH_JOB_ID:-}
    own=${CLOUD_RUN_EXECUTION:-${own%%:*}}
    [ -n "$own" ] || own=$(uname -n)
    printf '%s' "$own" >"$dispatch_work/claim" || dispatch_fail "cannot claim the work"
    if dispatch_create "$dispatch_work/claim" "$DISPATCH_CLAIM_URI"; then return; fi
    other=$(dispatch_get "$DISPATCH_CLAIM_URI") || dispatch_fail "cannot read $DISPATCH_CLAIM_URI"
    [ "$other" = "$own" ] || dispatch_fail \
        "$DISPATCH_CLAIM_URI belongs to execution $other, and this is $own: nothing is done here" 94
}

# Prints this task's line of a file; or, where it begins with `[`, all of it: the items themselves.
dispatch_pick() {
    case $(sed -n '1{s/^[[:space:]]*//;p;}' "$1") in
    '['*) cat "$1" ;;
    *) sed -n "$((dispatch_index + 1))p" "$1" ;;
    esac
}

# Prints this task's part of the input.
dispatch_line() {
    if [ -n "${DISPATCH_ITEMS:-}" ]; then
        printf '%s\n' "$DISPATCH_ITEMS"
    elif [ -n "${DISPATCH_INPUT:-}" ]; then
        printf '%s\n' "$DISPATCH_INPUT" >"$dispatch_work/input" || dispatch_fail "no input"
        dispatch_pick "$dispatch_work/input"
    elif [ -n "${DISPATCH_INPUT_URI:-}" ]; then
        dispatch_get "$DISPATCH_INPUT_URI" >"$dispatch_work/input" || dispatch_fail "no input"
        dispatch_pick "$dispatch_work/input"
    else
        dispatch_fail "none of DISPATCH_ITEMS, DISPATCH_INPUT and DISPATCH_INPUT_URI is set" 65
    fi
}

# Prints a value that stands in this task's line, else another: `dispatch_value chunk null`.
dispatch_value() {
    found=
    case $dispatch_own in
    '{'*)
        if command -v jq >/dev/null; then
            found=$(printf '%s\n' "$dispatch_own" | jq -r ".$1 // empty")
        else # what stands before the items is surely no part of something else
            found=$(printf '%s\n' "$dispatch_own" |
                sed -n "s/^{[^[]*\"$1\" *: *\"\{0,1\}\\([^\",[]*\\).*/\\1/p")
        fi
        ;;
    esac
    printf '%s\n' "${found:-$2}"
}

# Prints the items as JSON, one a line.
dispatch_items() {
    if command -v jq >/dev/null; then
        # shellcheck disable=SC2016 # it is jq's
        printf '%s\n' "$dispatch_own" | jq -c '
            (if type == "array" then . else .items end)
            | if type == "array" then .[] else error("there are no items") end
            | if any(.. | numbers; . > 9007199254740991 or . < -9007199254740991)
              then error("an item holds a number beyond 2^53") else . end'
        return
    fi
    case $dispatch_own in *'"items"'*'"result_uri"'*) return 1 ;; esac # it must stand before them
    # What stands between the brackets; nothing but numbers and URLs may precede `items`.
    between=$(printf '%s\n' "$dispatch_own" | tr '\n\t\r' '   ' | sed '
        s/"[a-z]*_uri" *: *"[^"\\[]*" *,//g
        s/^ *{\( *"[a-z_]*" *: *[0-9][0-9]* *,\)* *"items" *: *\[/[/
        s/^ *\[\([^]]*\)\].*$/\1/
        t
        s/.*/"/')
    [ -n "$(printf '%s' "$between" | tr -d ' ')" ] || return 0
    beyond=$(printf '%s\n' "$between" | sed 's/"[^"\\,]*"//g; s/[-+0-9.eE, ]//g')
    [ -z "$beyond" ] || return 1
    printf '%s\n' "$between" | tr ',' '\n' | sed 's/^ *//; s/ *$//'
}

# Sets ITEM to an item: a text as it is, anything else as JSON. 1: no variable can hold it.
dispatch_item() {
    case $1 in
    '"'*\\*)
        case $1 in
        *\\u0000*) printf '%s\n' "$1" | jq -e 'explode | index(0) == null' >/dev/null || return ;;
        esac
        # A shell cuts ends of lines off what it is given, and those of the item must stay.
        ITEM=$(printf '%s\n' "$1" | jq -j . && echo .) || return
        ITEM=${ITEM%.}
        ;;
    '"'*)
        ITEM=${1#?}
        ITEM=${ITEM%?}
        ;;
    *) ITEM=$1 ;;
    esac
}

# Writes a receipt of what is done: `dispatch_receipt true|false FILE`.
dispatch_receipt() {
    {
        printf '{"version":1,"key":%s' "${DISPATCH_KEY:+\"}${DISPATCH_KEY:-null}${DISPATCH_KEY:+\"}"
        printf ',"task":%s' "$dispatch_index"
        printf ',"chunk":%s' "$(dispatch_value chunk "${DISPATCH_CHUNK:-null}")"
        printf ',"attempt":%s' "$(dispatch_value attempt "${DISPATCH_ATTEMPT:-1}")"
        printf ',"complete":%s,"items":[' "$1"
        paste -s -d, "$dispatch_work/done" | tr -d '\n'
        printf '],"written_at":"%s"}\n' "$(date -u +%Y-%m-%dT%H:%M:%SZ)"
    } >"$2"
}

# Keeps what is done by now, where it may be overwritten: for a signed URL, nowhere.
dispatch_keep() {
    case $dispatch_result in
    file:*)
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
    case $dispatch_index in
    *[!0-9]* | 0?*) dispatch_fail "the task index is $dispatch_index, and must be a number" 65 ;;
    esac
    dispatch_claim
    dispatch_own=$(dispatch_line) || exit
    [ -n "$dispatch_own" ] || dispatch_fail "the input has no line for task $dispatch_index" 65
    dispatch_items >"$dispatch_work/items" ||
        dispatch_fail "the items cannot be read, or not without jq" 65
    dispatch_result=$(dispatch_value result_uri "${DISPATCH_RESULT_URI:-}")
    case $dispatch_result in
    */) dispatch_result=$dispatch_result$dispatch_index.json ;;
    esac
    # What could not be written at the end is not begun.
    case $dispatch_result in
    '' | https://* | http://*) ;;
    file:*) dispatch_path "$dispatch_result" >/dev/null || exit ;;
    *) dispatch_fail "cannot write ${dispatch_result%%\?*}: use container.py" 65 ;;
    esac
    trap dispatch_terminated TERM
    position=0
    failed=0
    kept=$(date +%s)
    while IFS= read -r item <&3; do
        if dispatch_item "$item"; then
            export ITEM
            # In the background, because a shell hears a signal only while it waits.
            "$@" 3<&- &
            dispatch_child=$!
            unset ITEM # if it is large, no other command could be started
            code=0
            wait "$dispatch_child" || code=$?
            dispatch_child=
            error="exit code $code"
        else
            code=1
            error="the item holds a NUL: no program can be given it"
        fi
        if [ $code = 0 ]; then
            printf '{"i":%s,"ok":true}\n' "$position" >>"$dispatch_work/done"
        else
            failed=1
            printf '{"i":%s,"ok":false,"error":"%s"}\n' "$position" "$error" \
                >>"$dispatch_work/done"
            # Without a receipt, the log is all that tells which.
            [ -n "$dispatch_result" ] || echo "receipt.sh: item $position: $error" >&2
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
