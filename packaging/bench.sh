#!/bin/bash
# Brings what `make bench` compares us with: Debian's pgbouncer, HAProxy and pgpool-II, and a pgbouncer that knows
# prepared statements in transaction mode (Debian 12's 1.18 does not), built from Debian's source archive.
#
# Starts none of them, and leaves none of their services enabled: the bench runs its own, with its own configuration.
set -euo pipefail
cd "$(dirname "$0")/.."

packaging/setup.sh
new=()
for package in pgbouncer haproxy pgpool2; do
    [ -e "/var/lib/dpkg/info/$package.list" ] || new+=("$package")
done
packaging/setup.sh bench
# What we installed was not started (setup.sh sees to that) and must not start after a reboot either.
for package in "${new[@]}"; do
    systemctl disable "$package.service" >/dev/null 2>&1 || true
done

# The checksum is that of the signed pgbouncer_1.25.2-1.dsc.
version=1.25.2
sha256=924ad35113fd0a71c8e2dbe85b5d03445532e2b7b37a9f8a48983beea238b332
url=http://deb.debian.org/debian/pool/main/p/pgbouncer/pgbouncer_$version.orig.tar.gz
dir=${CARGO_TARGET_DIR:-target}/bench
program=$dir/pgbouncer-$version/pgbouncer
if [ -x "$program" ]; then
    exit 0
fi
mkdir -p "$dir"
archive=$dir/pgbouncer-$version.tar.gz
log=$dir/pgbouncer-build.log
echo "bench: building pgbouncer $version (log: $log)"
for address in "$url" "https://www.pgbouncer.org/downloads/files/$version/pgbouncer-$version.tar.gz"; do
    if curl -fsS --max-time 60 -o "$archive" "$address" && echo "$sha256  $archive" | sha256sum --check --quiet; then
        break
    fi
    rm -f "$archive"
done
if [ ! -e "$archive" ]; then
    echo "bench: pgbouncer $version cannot be had; only Debian's is measured, which has no prepared statements in" \
        "transaction mode" >&2
    exit 0
fi
# As Debian builds it, less what no scenario uses (LDAP, PAM, systemd).
(
    tar -C "$dir" -xzf "$archive"
    cd "$dir/pgbouncer-$version"
    ./configure CFLAGS='-g -O2'
    make pgbouncer
) >"$log" 2>&1 || { tail "$log" >&2; exit 1; }
