#!/bin/bash
# `make test`: every test there is, one binary after another, and a summary. No arguments.
#
# In the order of Cargo.toml, quick ones first: what measures time (lab_vip, lab) runs last and beside nothing else.
# Everything is built first, so that no compiler runs beside a measurement. All suites run even when one fails.
set -euo pipefail
cd "$(dirname "$0")/.."
cargo=${CARGO:-cargo}
flags=(--locked --color never)

began=$SECONDS
echo "test: building"
"$cargo" test "${flags[@]}" --quiet --no-run --all-targets
built=$((SECONDS - began))

# A suite that is declared is run: nothing is listed twice.
mapfile -t declared < <(sed -n '/^\[\[test\]\]$/{n;s/^name = "\(.*\)"$/\1/p}' Cargo.toml)
[ ${#declared[@]} -gt 0 ] || { echo "test: Cargo.toml declares no tests" >&2; exit 1; }

output=$(mktemp)
trap 'rm -f "$output"' EXIT
summary=$(printf '%-10s %-7s %7s %7s %7s' suite result passed failed seconds)
bad=0 suites=0 all_passed=0 all_failed=0

# suite NAME ARGUMENT...: runs one, shows it as it goes, and keeps its line of the summary.
suite() {
    local name=$1 start=$SECONDS result=ok passed failed
    shift
    suites=$((suites + 1))
    echo
    echo "test: $name"
    if ! "$cargo" test "${flags[@]}" "$@" 2>&1 | tee "$output"; then
        result=FAILED
        bad=$((bad + 1))
    fi
    # The last line of a binary is "test result: ok. 13 passed; 0 failed; ..."; some run themselves once more as user
    # postgres, with a line for each.
    passed=$(sed -n 's/^test result: .* \([0-9]*\) passed; .*/\1/p' "$output" | tail -n 1)
    failed=$(sed -n 's/^test result: .* \([0-9]*\) failed; .*/\1/p' "$output" | tail -n 1)
    all_passed=$((all_passed + passed)) all_failed=$((all_failed + failed))
    summary+=$(printf '\n%-10s %-7s %7s %7s %7d' "$name" "$result" "${passed:--}" "${failed:--}" $((SECONDS - start)))
}

suite lib --lib
for name in "${declared[@]}"; do
    suite "$name" --test "$name"
done

echo
echo "$summary"
echo
echo "$all_passed passed, $all_failed failed"
if [ "$bad" -gt 0 ]; then
    echo "test: $bad of $suites suites FAILED; $((SECONDS - began)) s, of which $built s building"
    exit 1
fi
echo "test: all $suites suites passed; $((SECONDS - began)) s, of which $built s building"
