#!/bin/bash
# Installs the Debian packages that the tests and the demo (no argument), the package (`deb`), or the bench (`bench`)
# need. Does nothing when all are there.
#
# Starts no service and makes no PostgreSQL cluster: tests run their own, on ports and directories of their own.
set -euo pipefail

packages=(
    postgresql-15 postgresql-client-15      # the database under test
    postgresql dpkg-dev binutils            # what the guide installs: that package, and ours
    bind9 bind9-dnsutils bind9-host         # a witness that is not our own, nsupdate, dig
    knot                                    # another one, by other authors
    faketime                                # a clock of its own for the witness
    iproute2 iputils-arping nftables        # network namespaces, who answers for the VIP, cutting the network
    tcpdump procps util-linux               # looking on; setpriv
    systemd-container dbus polkitd          # a machine with a real service manager
    prometheus                              # promtool, which checks our metrics and alert rules
    openssl python3                         # certificates for client TLS; small helpers
    python3-venv ca-certificates            # drivers in other languages, against the gate
    chromium                                # the status page as people see it
    libpostgresql-jdbc-java ecj             # ... and on the JVM; a compiler, and with it a Java runtime
    lighttpd                                # a web server with a cgi-bin
)
# Other builds of Node bring npm along, and conflict with Debian's.
if ! command -v node >/dev/null || ! command -v npm >/dev/null; then
    packages+=(nodejs npm)
fi
case "${1:-}" in
deb) packages=(dpkg-dev binutils) ;;
bench)
    packages=(
        pgbouncer haproxy pgpool2           # what we are compared with
        gcc make pkg-config curl            # a newer pgbouncer
        libevent-dev libssl-dev libc-ares-dev
        strace linux-perf                   # system calls per transaction; profiles
    )
    ;;
esac

missing=()
for package in "${packages[@]}"; do
    state=$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null || true)
    [ "$state" = installed ] || missing+=("$package")
done
if [ ${#missing[@]} -eq 0 ]; then
    echo "setup: all ${#packages[@]} Debian packages are there"
    exit 0
fi
if [ "$(id -u)" -ne 0 ]; then
    echo "setup: missing: ${missing[*]}; run as root, or: apt-get install ${missing[*]}" >&2
    exit 1
fi

echo "setup: installing ${missing[*]}"
undo=()
trap 'for file in "${undo[@]}"; do rm -f "$file"; done' EXIT

# While apt runs: no service starts (named would take port 53), and no cluster "main" is made.
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
    undo+=("$policy")
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod 0755 "$policy"
fi
no_cluster=/etc/postgresql-common/createcluster.d/portcullis-setup.conf
if [ ! -e "$no_cluster" ]; then
    undo+=("$no_cluster")
    mkdir -p "${no_cluster%/*}"
    echo 'create_main_cluster = false' >"$no_cluster"
fi

export DEBIAN_FRONTEND=noninteractive
apt=(apt-get -q -y -o DPkg::Lock::Timeout=300 -o Dpkg::Use-Pty=0)
"${apt[@]}" update
"${apt[@]}" install --no-install-recommends "${missing[@]}"
echo "setup: done"
