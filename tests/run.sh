#!/bin/bash
# `make test`: every test there is, and a summary that names what failed. No arguments.
#
# Everything is built first, so that no compiler runs beside a measurement. Then the quick suites, two beside one
# another, each with a loopback of its own, so that no port is taken from the other; then, one after another and beside
# nothing else, those that measure time; the last are the labs, who take turns (tests/lab/turns.rs). All suites run even
# when one fails.
set -euo pipefail
# One group of commands, read whole: who edits this file does not change a run that is under way.
{
cd "$(dirname "$0")/.."
cargo=${CARGO:-cargo}
flags=(--locked --color never)
# The first runs four suites at a time itself, and fetches what they need when it is not there yet.
alone=(drivers peer kernel_gate lab_vip lab)
lanes=2
# A suite that hangs must not take the summary with it; the slowest takes a quarter of this on a good day, and slower
# machines have to be right as well.
limit=3000
# So many lines of what a failed test said are shown once more at the end: where a log is cut, its tail is what stays.
words=30

began=$SECONDS
clock() { printf '%d:%02d' $(((SECONDS - began) / 60)) $(((SECONDS - began) % 60)); }
say() { echo "test: $(clock) $*"; }

# A suite that is declared is run: nothing is listed twice.
mapfile -t declared < <(sed -n '/^\[\[test\]\]$/{n;s/^name = "\(.*\)"$/\1/p}' Cargo.toml)
[ ${#declared[@]} -gt 0 ] || { echo "test: Cargo.toml declares no tests" >&2; exit 1; }
# The longest first, so that the other lane has gone through the short ones when it ends.
beside=(proxy postgres lib)
for name in "${declared[@]}"; do
    [[ " ${alone[*]} ${beside[*]} " == *" $name "* ]] || beside+=("$name")
done
for name in proxy postgres "${alone[@]}"; do
    [[ " ${declared[*]} " == *" $name "* ]] || { echo "test: there is no suite $name" >&2; exit 1; }
done

say "plan: build; $lanes at once: ${beside[*]}; one by one: ${alone[*]}"
say "building"
"$cargo" test "${flags[@]}" --quiet --no-run --all-targets
# What the compiler wrote must not be in the way of a PostgreSQL that waits for the disk.
sync
built=$((SECONDS - began))

work=$(mktemp -d)
trap 'exit 130' INT TERM
trap '{ cat "$work"/*.pid 2>/dev/null | xargs -r kill; } || true; rm -rf "$work"' EXIT
failed_names=() failed_words="" summary=$(printf '%-12s %-7s %7s %7s %7s' suite result passed failed seconds)
bad=0 suites=0 all_passed=0 all_failed=0

# run NAME COMMAND...: runs one suite by the command to its end; leaves its result and seconds in $work.
run() {
    local name=$1 start=$SECONDS result=ok which=(--test "$1")
    shift
    [ "$name" != lib ] || which=(--lib)
    # Labs wait for their turn, where waiting costs nothing.
    [ "$name" != lab ] || which+=(-- --test-threads 100)
    # In a process group of its own, whole: cargo does not end its test with itself.
    timeout -k 30 "$limit" "$@" "$cargo" test "${flags[@]}" "${which[@]}" 2>&1 &
    echo $! >"$work/$name.pid"
    wait $! || result=FAILED
    rm "$work/$name.pid"
    echo "$result $((SECONDS - start))" >"$work/$name.result"
}
# What else this machine has to do waits for a suite that measures; a warning where that is not allowed.
first=(nice -n -10)
own_loopback=(unshare --net -- sh -c 'ip link set lo up && exec "$@"' own_loopback)

# tell NAME: its line of the summary, and the names of what failed in it.
tell() {
    local name=$1 result seconds passed failed names
    read -r result seconds <"$work/$name.result"
    suites=$((suites + 1))
    # The last line of a binary is "test result: ok. 13 passed; 0 failed; ...".
    passed=$(sed -n 's/^test result: .* \([0-9]*\) passed; .*/\1/p' "$work/$name" | tail -n 1)
    failed=$(sed -n 's/^test result: .* \([0-9]*\) failed; .*/\1/p' "$work/$name" | tail -n 1)
    all_passed=$((all_passed + passed)) all_failed=$((all_failed + failed))
    summary+=$(printf '\n%-12s %-7s %7s %7s %7d' "$name" "$result" "${passed:--}" "${failed:--}" "$seconds")
    [ "$result" != ok ] || return 0
    bad=$((bad + 1))
    # After the last line "failures:" each name stands alone; drivers, which is no libtest, says FAILED before each.
    names=$(awk '/^failures:$/ { list = "" } /^    [^ ]+$/ { list = list $1 "\n" }
        /^FAILED / { list = list substr($0, 8) "\n" } END { printf "%s", list }' "$work/$name")
    if [ -z "$names" ]; then
        failed_names+=("$name: ended without a result after $seconds s (killed after $limit s if it hangs)")
        failed_words+=$(printf '\n---- %s: its last words ----\n' "$name"; tail -n "$words" "$work/$name")$'\n'
    else
        while read -r test; do failed_names+=("$name: $test"); done <<<"$names"
        failed_words+=$(said "$name")$'\n'
    fi
}

# said NAME: what each failed test of a suite said, without backtraces: its beginning and where it panicked. libtest has
# it in blocks "---- TEST stdout ----", which end with the next one or with the list of names. (drivers, which is no
# libtest, says why in its FAILED lines.)
said() {
    awk -v suite="$1" -v most="$words" '
        /^---- .* stdout ----$/ { inside = 1; lines = 0; after = 0; print "\n---- " suite ": " substr($0, 6); next }
        /^failures:$/ { inside = 0 }
        !inside || /^stack backtrace:$/ || /^ +[0-9]+: / || /^ +at [.\/]/ { next }
        { lines++ }
        / panicked at / { after = 4 }
        lines <= most || after > 0 { print }
        lines == most + 1 { print "[...]" }
        after > 0 { after-- }
    ' "$work/$1"
}

# The quick ones: each shown whole when it has ended, so that two do not mix.
running=()
reap() {
    local name still=()
    for name in "${running[@]}"; do
        if [ -e "$work/$name.result" ]; then
            echo
            say "$name: $(cat "$work/$name.result") s"
            cat "$work/$name"
            tell "$name"
        else
            still+=("$name")
        fi
    done
    running=("${still[@]}")
}
for name in "${beside[@]}"; do
    while [ ${#running[@]} -ge $lanes ]; do
        wait -n || true
        reap
    done
    say "$name begins"
    # proxy fetches a newer libpq when it is not there yet, so it has the machine's own loopback.
    if [ "$name" = proxy ]; then where=("${first[@]}"); else where=("${own_loopback[@]}"); fi
    run "$name" "${where[@]}" >"$work/$name" &
    running+=("$name")
done
while [ ${#running[@]} -gt 0 ]; do
    wait -n || true
    reap
done

# Those that measure: shown as they go, without the runner's words about tests that wait for their turn.
for name in "${alone[@]}"; do
    echo
    say "$name begins"
    run "$name" "${first[@]}" | sed -u '/has been running for over 60 seconds$/d' | tee "$work/$name"
    say "$name: $(cat "$work/$name.result") s"
    tell "$name"
done

echo
echo "$summary"
echo
echo "$all_passed passed, $all_failed failed"
if [ "$bad" -gt 0 ]; then
    echo "$failed_words"
    printf 'FAILED %s\n' "${failed_names[@]}"
    echo "test: $bad of $suites suites FAILED; $((SECONDS - began)) s, of which $built s building"
    exit 1
fi
echo "test: all $suites suites passed; $((SECONDS - began)) s, of which $built s building"
exit 0
}
