//! `may-start-primary`: may the local cluster start writable (R6)? Asked by the PostgreSQL unit, with or without the
//! daemon: the journal first, then the witness, at most 10 s.
//!
//! **Invariant:** the answer is yes only with a record, read now, that names this node at the very epoch it completed,
//! or for a start that the daemon itself has just ordered (it had the proof, or the procedure); everything unknown is
//! no.

use crate::base::config::{Config, DnsMode, Node};
use crate::base::fault::Fault;
use crate::base::time::Duration;
use crate::engine::durable::Durable;
use crate::engine::evidence::{self, Memory, Seen, Verdict};
use crate::engine::setup::Setup;
use crate::io::dns::Authority;
use crate::io::journal::replay;
use crate::io::postgres::{clear_cut_short, is_rewind_broken, start_was_ordered};
use crate::io::{clock, files};
use crate::wire::dns::{ServiceNames, TsigKey};
use std::sync::Arc;

/// For each attempt; with pauses they stay below the contract's 10 s.
const ASK_LIMIT: Duration = Duration::from_secs(2);
const ATTEMPTS: u32 = 4;

/// Neither here nor at the witness is anything a primary could collide with.
const VIRGIN: &str = "a fresh pair: no epoch was ever held, and the witness has no marker";

/// `Ok` with the reason why it may; `Err` with the reason why not.
///
/// # Errors
/// A fault of the configuration (exit code 2).
pub async fn may_start(config: &Config, node: &Node) -> Result<Result<String, String>, Fault> {
    let bad = |why: String| Fault::new(crate::base::fault::ExitCode::Config, why);
    // A daemon that died while it promoted could not; the standby that starts now would take them for its timeline.
    clear_cut_short(&node.postgres.data_dir);
    if is_rewind_broken(&config.state_dir, &node.postgres.data_dir) {
        let me = &node.name;
        return Ok(Err(format!("a rewind did not end here, the data is half of each; `portcullis rejoin {me}`")));
    }
    if node.postgres.data_dir.join("standby.signal").exists() {
        return Ok(Ok("it starts as a standby".to_owned()));
    }
    if !node.voter {
        let me = &node.name;
        return Ok(Err(format!("{me} has no vote (voter = false) and is never a primary; `portcullis rejoin {me}`")));
    }
    let durable = match replay(&config.state_dir) {
        Ok(Some(durable)) => durable,
        Ok(None) => Durable::default(),
        Err(why) => return Ok(Err(why)),
    };
    if let Some(reason) = &durable.fenced {
        return Ok(Err(format!("this node is fenced: {reason}; rejoin it, or promote")));
    }
    if !durable.is_holder() && !durable.is_virgin() {
        return Ok(Err("this node is not the active one; rejoin it, or promote".to_owned()));
    }
    if start_was_ordered(&config.state_dir) {
        return Ok(Ok("the daemon itself has ordered this start".to_owned()));
    }
    let Some(dns) = config.dns.as_ref().filter(|dns| dns.mode == DnsMode::Update) else {
        return Ok(Err("only the peer can confirm the epoch here: start the daemon, it starts PostgreSQL".to_owned()));
    };
    let Some(server) = dns.servers.first() else {
        return Ok(Err("dns.servers is not set, so the daemon has to ask; start it".to_owned()));
    };
    let names = Arc::new(ServiceNames::new(&dns.zone, &config.service.name).map_err(bad)?);
    let key = match &dns.tsig {
        Some(tsig) => {
            let secret = files::tsig_secret(&tsig.key_file).map_err(bad)?;
            let text = data_encoding::BASE64.encode(secret.expose());
            Some(Arc::new(TsigKey::new(&tsig.name, &tsig.algorithm, &text).map_err(bad)?))
        }
        None => None,
    };
    let boot = clock::boot_id().unwrap_or_default();
    let setup = Setup::new(config, &node.name, vec![server.to_string()], String::new(), 0, boot);
    let authority = Authority::new(*server, names, key);
    let mut silence = String::new();
    for _ in 0..ATTEMPTS {
        match authority.ask(ASK_LIMIT).await {
            Ok(reading) => return Ok(judge(&setup, &durable, &evidence::see(&setup, &reading))),
            Err(why) => silence = why,
        }
        tokio::time::sleep(Duration::from_millis(300)).await;
    }
    Ok(Err(format!("the witness {server} does not answer ({silence}); the daemon starts PostgreSQL when proof comes")))
}

fn judge(setup: &Setup, durable: &Durable, seen: &Seen) -> Result<String, String> {
    if durable.is_virgin() {
        return match (evidence::marker_of(seen), seen) {
            (Some(marker), _) => Err(format!(
                "this node has no state of its own, but the record names {} at epoch {}; rejoin it, or promote",
                marker.active, marker.epoch
            )),
            (None, Seen::Nothing { why, .. }) => Err(format!("the record says nothing: {why}")),
            (None, _) => Ok(VIRGIN.to_owned()),
        };
    }
    let memory = Memory { epoch: durable.won, seq: durable.seq, seen: durable.seen };
    // Another boot of this very node is what a reboot looks like.
    let mut seen = seen.clone();
    if let Seen::Agreed { marker } = &mut seen
        && marker.active == setup.me
    {
        marker.boot = setup.boot.clone();
    }
    match evidence::judge(setup, memory, true, &seen) {
        Verdict::Here => Ok(format!("the record confirms epoch {}", durable.complete)),
        Verdict::Higher { epoch, active } => Err(format!("{active} took over at epoch {epoch}; rejoin this node")),
        Verdict::Elsewhere { node } => Err(format!("the record names {node}")),
        Verdict::Nothing { why } => Err(format!("the record says nothing: {why}")),
        Verdict::Lagging => Err("the witness gave an old answer".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config_in(dir: &std::path::Path) -> Config {
        let at = dir.display();
        let node = |name: &str, last: u8| {
            format!(
                "[[node]]\nname = \"{name}\"\naddress = \"192.0.2.{last}\"\n\
                 [node.postgres]\ndata_dir = \"{at}\"\nbin_dir = \"/b\"\n"
            )
        };
        let text = format!(
            "state_dir = \"{at}\"\n[service]\nname = \"db.example.org\"\n{}{}[cluster]\nkey_file = \"/k\"\n\
             [vip]\naddress = \"192.0.2.100/24\"\n",
            node("alp", 11),
            node("midna", 12)
        );
        Config::parse(&text, std::path::Path::new("portcullis.toml")).expect("it parses")
    }

    /// The daemon was killed while it promoted: what kept other timelines' numbers from being used is still there.
    #[tokio::test]
    async fn a_promotion_that_was_cut_short_does_not_mislead_the_standby() {
        let dir = tempfile::tempdir().expect("a directory");
        let file = |name: &str| dir.path().join("pg_wal").join(name);
        std::fs::create_dir(dir.path().join("pg_wal")).expect("made");
        std::fs::write(dir.path().join("standby.signal"), "").expect("written");
        let skipped = "# portcullis: this number was used by another promotion\n";
        std::fs::write(file("00000003.history"), skipped).expect("written");
        std::fs::write(file("00000002.history"), "1\t0/3000148\tno recovery target specified\n").expect("written");
        let config = config_in(dir.path());
        let said = may_start(&config, &config.nodes[0]).await.expect("no fault of the configuration");
        assert_eq!(said, Ok("it starts as a standby".to_owned()));
        assert!(!file("00000003.history").exists(), "it would be the newest timeline");
        assert!(file("00000002.history").exists(), "PostgreSQL's own stay");
    }

    /// Also as a standby, and after a person gave the directory the mode that PostgreSQL asked for.
    #[tokio::test]
    async fn half_rewound_data_never_starts() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().expect("a directory");
        let mode = |mode| std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(mode)).expect("chmod");
        let config = config_in(dir.path());
        let ask = async || may_start(&config, &config.nodes[0]).await.expect("no fault of the configuration");
        for file in ["standby.signal", "PG_VERSION"] {
            std::fs::write(dir.path().join(file), "").expect("written");
        }
        assert!(ask().await.is_ok());
        mode(0o701);
        assert!(ask().await.is_err_and(|why| why.contains("portcullis rejoin alp")));
        mode(0o700);
        let mark = dir.path().join("rewind-under-way");
        for (word, may) in [("rewinding", false), ("cloning", true), ("rewound", true)] {
            std::fs::write(&mark, format!("{word} 700 /kept\n")).expect("written");
            assert_eq!(ask().await.is_ok(), may, "{word}");
        }
    }

    /// With a VIP alone only the daemon can know; its own start passes the unit's question, nobody else's does.
    #[tokio::test]
    async fn without_a_witness_only_the_daemons_own_start_may() {
        let dir = tempfile::tempdir().expect("a directory");
        let config = config_in(dir.path());
        let ask = async || may_start(&config, &config.nodes[0]).await.expect("no fault of the configuration");
        let refused = ask().await.expect_err("nobody can confirm it");
        assert!(refused.contains("only the peer can confirm"), "{refused}");

        let boot = clock::boot_id().expect("a boot id");
        let order = dir.path().join("start-ordered");
        std::fs::write(&order, format!("{boot} {}", clock::now().as_nanos())).expect("written");
        assert_eq!(ask().await, Ok("the daemon itself has ordered this start".to_owned()));

        let minutes_ago = clock::now().as_nanos().saturating_sub(60_000_000_000);
        std::fs::write(&order, format!("{boot} {minutes_ago}")).expect("written");
        assert!(ask().await.is_err(), "what a killed daemon left behind still counts");
    }
}
