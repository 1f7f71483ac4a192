//! Every check by its id: what it looks at, why, and what a failover would be without it. The table of
//! docs/operations.md is this one.
//!
//! **Invariant:** an id is stable: people filter on it.

/// What a finding means for a failover that came now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Then {
    /// It would not work, or not by one command.
    Fails,
    /// It may lose what was acknowledged.
    Loses,
    /// Somebody can pass the gate by, before or after.
    Passes,
    /// It would work; clients, or the way back, would take longer.
    Hinders,
    /// Nothing of it.
    Works,
}

/// One check: its id, what a finding means, what is looked at, and why.
pub struct Check {
    pub id: &'static str,
    pub then: Then,
    pub what: &'static str,
    pub why: &'static str,
}

const fn row(id: &'static str, then: Then, what: &'static str, why: &'static str) -> Check {
    Check { id, then, what, why }
}

use Then::{Fails, Hinders, Loses, Passes, Works};

/// All of them, in the order of the table.
pub const CHECKS: &[Check] = &[
    row("daemon.down", Fails, "the daemon answers", "nothing can be promoted or fenced without it"),
    row("daemon.version", Hinders, "daemon and program are of one version", "a restart is still due"),
    row("daemon.rights", Fails, "the daemon has CAP_NET_ADMIN and CAP_NET_RAW", "VIP, ARP and kernel gate need them"),
    row("daemon.descriptors", Hinders, "its limit of descriptors holds `pool.max_clients`", "clients would be refused"),
    row("node.maintenance", Fails, "maintenance is off", "nothing can be promoted meanwhile"),
    row("node.fenced", Fails, "the node is not fenced", "nobody can fail over to it before a rejoin"),
    row("node.procedure", Hinders, "no procedure was left half-way", "it has to be finished first"),
    row("node.sync", Loses, "the pair is in sync", "what is acknowledged alone is on one node"),
    row(
        "peer.unreachable",
        Hinders,
        "each node's daemon answers the other",
        "no switchover; the lease hangs on DNS alone",
    ),
    row("peer.unasked", Hinders, "the other node could be looked at", "what is not looked at is not known"),
    row("peer.slow", Hinders, "a round trip to it is far below the lease", "pledges come late"),
    row("peer.version", Hinders, "both daemons are of one version", "an upgrade was left half-way"),
    row("peer.nodes", Hinders, "both name the same nodes", "who is missing in one is not answered"),
    row("config.pledge", Fails, "what the nodes must agree on is equal", "else neither pledges to the other"),
    row("config.differs", Hinders, "all other keys are equal, one by one", "after a failover others would be in force"),
    row("config.files", Fails, "the files that the configuration names can be used", "the next start would fail"),
    row("secret.mode", Passes, "secret files are closed to others", "who reads the key can pass for a node"),
    row("secret.owner", Passes, "and belong to root or the data directory's owner", "who owns a file can open it"),
    row("secret.differs", Fails, "secret files hold the same on both nodes", "the other node could not log in or sign"),
    row("program.missing", Hinders, "commands of the configuration can be run", "nobody is told, or the fence fails"),
    row("dns.none", Hinders, "there is a DNS witness", "without one a silent node needs a person's word"),
    row("dns.config", Fails, "the witness can be asked at all", "no takeover without the record"),
    row("dns.silent", Fails, "each server answers by UDP, as an authority", "its silence lets the lease run out"),
    row("dns.key", Fails, "each server knows the TSIG key, and the clock is near", "unsigned answers count as silence"),
    row("dns.tcp", Fails, "each server answers by TCP, with the zone's SOA", "updates go by TCP"),
    row("dns.strange", Fails, "plain A and AAAA records stand at the name", "an alias is no proof"),
    row("dns.update", Fails, "an update that must fail fails for its prerequisite", "key and rights are proven so"),
    row("dns.unsafe", Passes, "and is not carried out", "two takers could both win"),
    row("dns.unknown", Fails, "and is answered", "whether the record can be moved is not known"),
    row("dns.disagree", Hinders, "all servers show the same addresses", "clients of the others go astray"),
    row("dns.on-node", Hinders, "no server stands on a node", "it dies with the node"),
    row("dns.ttl", Hinders, "the record's TTL is at most `dns.ttl`", "clients stay away longer"),
    row("cache.resolver", Hinders, "this machine's resolver keeps to the TTL", "clients like it come late"),
    row("cache.host", Hinders, "no nscd and no Java keeps names longer", "clients here come late"),
    row("clock.witness", Hinders, "the clock is near the witness's", "beyond 300 s its answers stop counting"),
    row("clock.offset", Works, "the nodes' clocks are near each other", "logs and events cannot be compared"),
    row(
        "clock.rate",
        Passes,
        "the nodes' clocks run alike, within `fence.max_drift`",
        "the lease is time on two clocks",
    ),
    row("clock.source", Works, "the kernel's clock source is a good one", "others lose time under load"),
    row("vip.interface", Fails, "the VIP's interface is there and is one", "the VIP cannot be bound"),
    row("vip.link", Fails, "it is up, with carrier", "nobody would hear the VIP"),
    row("vip.subnet", Hinders, "it has an address of the VIP's subnet", "a wrong mask, or the wrong interface"),
    row("vip.witness", Hinders, "there is a gateway or a `vip.witness`", "nobody to ask over the link"),
    row("vip.arp", Hinders, "it answers ARP or NDP", "on that link nobody would learn of the VIP"),
    row("wall.missing", Passes, "the table of `fence.kernel_gate` stands", "a frozen daemon would leave sessions open"),
    row("pg.down", Fails, "PostgreSQL answers", "it cannot take over, or not be copied"),
    row("pg.wal-level", Fails, "`wal_level` is replica or logical", "nothing can be replicated"),
    row("pg.hot-standby", Fails, "`hot_standby` is on", "nobody sees whether a standby could take over"),
    row("pg.senders", Hinders, "`max_wal_senders` is 3 or more", "a clone needs two beside the standby"),
    row("pg.slots", Fails, "`max_replication_slots` has room", "a standby without its slot"),
    row("pg.fsync", Loses, "`fsync` and `full_page_writes` are on", "a crash loses or tears data"),
    row("pg.restart-after-crash", Works, "`restart_after_crash` is on", "else a person must start it"),
    row("pg.pending-restart", Works, "no setting waits for a restart", "a failover may put it in force by surprise"),
    row("pg.connections", Hinders, "`pool.size` fits `max_connections`", "one user could take all"),
    row(
        "pg.standby-limits",
        Fails,
        "a standby's limits are not below the primary's",
        "its replay stops, or it does not start",
    ),
    row("pg.library", Fails, "libraries of settings and functions are there", "it does not start, or a function fails"),
    row(
        "pg.collation",
        Loses,
        "collations are of the version the indexes were made with",
        "indexes may answer wrongly",
    ),
    row("pg.tools", Fails, "the tools of `bin_dir` are there, of PostgreSQL's version", "promote and rejoin run them"),
    row("pg.identity", Fails, "both clusters have one system identifier", "they are no pair"),
    row("pg.version", Fails, "both PostgreSQL are of one version", "another major version cannot replicate"),
    row("repl.role", Fails, "the replication role is there and may log in", "no standby after a failover"),
    row(
        "repl.login",
        Fails,
        "it really logs in at the other node, with the password file",
        "no standby after a failover",
    ),
    row("repl.hba", Fails, "`pg_hba.conf` lets it in from the other nodes", "no standby after a failover"),
    row("repl.wal", Hinders, "a slot or `wal_keep_size` keeps WAL", "a standby that was away needs a clone"),
    row("slot.missing", Hinders, "each standby has its slot on the active node", "WAL it needs may be removed"),
    row("slot.idle", Hinders, "and uses it", "WAL piles up, or the standby is away"),
    row("slot.lost", Hinders, "and has not lost it", "the standby needs a clone"),
    row("rejoin.rewind", Hinders, "checksums or `wal_log_hints` are on", "without them a rejoin clones"),
    row("rejoin.grants", Hinders, "the role may execute what pg_rewind needs", "a rejoin clones"),
    row("rejoin.login", Hinders, "the role may log in to the database postgres", "a rejoin clones"),
    row(
        "rejoin.disk",
        Hinders,
        "there is room for a whole copy beside the data",
        "a rejoin that must clone is refused",
    ),
    row("commit.off", Loses, "`synchronous_commit` is on", "acknowledged commits are on one node alone"),
    row("commit.lowered", Loses, "no role or database lowers it", "the same, for some"),
    row("commit.cancel", Loses, "nobody may execute `pg_cancel_backend`", "it ends a commit's wait for the standby"),
    row(
        "commit.list",
        Loses,
        "`synchronous_standby_names` is the record's",
        "commits wait for nobody, or for the wrong one",
    ),
    row("data.unlogged", Works, "there are no unlogged tables", "they are empty after a failover"),
    row(
        "door.listen",
        Passes,
        "`listen_addresses` is loopback and the replication address",
        "clients find a way past the gate",
    ),
    row("door.hba", Passes, "`pg_hba.conf` lets in replication alone", "clients find a way past the gate"),
    row("door.trust", Passes, "and nobody without a password", "anybody could copy the data, or be anybody"),
    row("door.knock", Passes, "a login at PostgreSQL's port is refused", "the rules as they work, not as they read"),
    row("door.gate", Passes, "nothing else holds the gate's port", "clients would reach it instead"),
    row("door.socket", Works, "the socket is closed to other users", "`pg_hba.conf` alone stands before it"),
    row("hba.error", Hinders, "every line of `pg_hba.conf` is understood", "PostgreSQL takes no change of the file"),
    row("hba.not-loaded", Hinders, "`pg_hba.conf` is in force as it stands", "it changes at the next start"),
    row("login.trust", Passes, "`hba_file` lets nobody in unasked", "anybody could be anybody at the gate"),
    row("login.lines", Hinders, "PostgreSQL lets the gate in as each role", "clients get 28000"),
    row("login.md5", Hinders, "no secret is of the old kind", "the role cannot log in, or its hash is a password"),
    row("unit.asks", Passes, "PostgreSQL's unit asks `may-start-primary`", "an old primary comes up writable"),
    row("unit.boot", Fails, "portcullis.service starts at boot", "after a reboot the node takes no part"),
    row("unit.missing", Hinders, "`service.units` are there", "the applications do not follow"),
    row("unit.enabled", Hinders, "and do not start by themselves", "they run on the passive node too"),
    row("pair.drill", Works, "a drill was done in the last 90 days and went well", "what was never tried is a hope"),
];

/// The row of an id; an id of a newer program on the other node has none.
pub fn of(id: &str) -> Option<&'static Check> {
    CHECKS.iter().find(|check| check.id == id)
}

#[cfg(test)]
mod tests {
    use super::*;

    const BEGIN: &str = "<!-- doctor's checks: from src/app/doctor/checks.rs -->\n";
    const END: &str = "<!-- end of doctor's checks -->";

    fn table() -> String {
        let rows = CHECKS.iter().map(|check| format!("| `{}` | {} | {} |\n", check.id, check.what, check.why));
        format!("| id | what is checked | why |\n|---|---|---|\n{}", rows.collect::<String>())
    }

    #[test]
    fn ids_are_unique_and_the_documents_list_them_all() {
        for (at, check) in CHECKS.iter().enumerate() {
            assert!(!CHECKS[..at].iter().any(|other| other.id == check.id), "{} stands twice", check.id);
        }
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/operations.md");
        let text = std::fs::read_to_string(path).expect("the document");
        let (before, rest) = text.split_once(BEGIN).expect("the table's begin");
        let (found, after) = rest.split_once(END).expect("the table's end");
        if std::env::var_os("UPDATE_GOLDEN").is_some() {
            std::fs::write(path, format!("{before}{BEGIN}{}{END}{after}", table())).expect("written");
            return;
        }
        assert_eq!(found, table(), "UPDATE_GOLDEN=1 writes it anew");
    }
}
