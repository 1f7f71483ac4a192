//! What one node tells of itself, for another to hold beside its own. No secret is on it: of secret files there is a
//! fingerprint under the cluster key, of words of commands a hash.

use super::gather::Facts;
use crate::base::config::{Config, Node};
use crate::base::ids::NodeName;
use crate::engine::status::EventRow;
use crate::io::files;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Settings that a standby must not have below its primary's, or its replay stops (PostgreSQL, Hot Standby
/// Administration).
pub const LIMITS: [&str; 5] = [
    "max_connections",
    "max_worker_processes",
    "max_wal_senders",
    "max_prepared_transactions",
    "max_locks_per_transaction",
];
/// Newest bytes of an event log that are looked through.
const EVENTS_READ: u64 = 8 * 1024 * 1024;

/// One node's sheet.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Sheet {
    pub node: String,
    pub version: String,
    /// Of the file as it is now: key and value.
    pub config: BTreeMap<String, String>,
    /// Secret files by their keys.
    pub secrets: BTreeMap<String, String>,
    pub system_id: Option<String>,
    /// `server_version_num`.
    pub postgres: Option<u32>,
    pub in_recovery: Option<bool>,
    pub limits: BTreeMap<String, u32>,
    pub preload: Option<String>,
    /// Bytes of the cluster, and free beside it.
    pub bytes: Option<u64>,
    pub free: Option<u64>,
    pub role: Option<String>,
    pub last_drill: Option<EventRow>,
    /// The last time that this node was promoted.
    pub last_promotion: Option<EventRow>,
}

impl Sheet {
    /// This node's.
    pub fn of(config: &Config, node: &Node, facts: &Facts) -> Sheet {
        let (survey, fitness) = (facts.survey.as_ref().ok(), facts.fitness.as_ref().ok());
        let limits = LIMITS.iter().filter_map(|name| Some(((*name).to_owned(), survey?.setting(name).parse().ok()?)));
        let status = facts.status.as_ref().ok();
        let (drill, promotion) = past(&config.state_dir);
        let seen = |kind: &str| status?.events.iter().rev().find(|event| event.kind == kind).cloned();
        Sheet {
            node: node.name.to_string(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            config: config.sheet(),
            secrets: secrets(config),
            system_id: fitness.map(|fitness| fitness.system_id.clone()),
            postgres: fitness.map(|fitness| fitness.version),
            in_recovery: survey.map(|survey| survey.in_recovery),
            limits: limits.collect(),
            preload: survey.map(|survey| survey.setting("shared_preload_libraries").to_owned()),
            bytes: fitness.map(|fitness| fitness.bytes),
            free: facts.host.free,
            role: status.map(|status| status.role.as_str().to_owned()),
            last_drill: drill.or_else(|| seen("drill")),
            last_promotion: promotion.or_else(|| seen("promoted")),
        }
    }

    /// Whose it is.
    pub fn name(&self) -> Option<NodeName> {
        self.node.parse().ok()
    }
}

/// HMAC of each secret file under the cluster key, which both nodes have or they would not talk: nobody else can try
/// passwords against it.
fn secrets(config: &Config) -> BTreeMap<String, String> {
    let Ok(key) = files::cluster_key(&config.cluster.key_file) else { return BTreeMap::new() };
    let key = ring::hmac::Key::new(ring::hmac::HMAC_SHA256, key.expose());
    let tsig: Option<&PathBuf> = config.dns.as_ref().and_then(|dns| dns.tsig.as_ref()).map(|tsig| &tsig.key_file);
    let all = [("replication.password_file", Some(&config.replication.password_file)), ("dns.tsig_key_file", tsig)];
    let print = |(name, path): (&str, Option<&PathBuf>)| {
        let secret = zeroize::Zeroizing::new(std::fs::read(path?).ok()?);
        let mut words = zeroize::Zeroizing::new(format!("portcullis doctor {name}\n").into_bytes());
        words.extend_from_slice(secret.trim_ascii());
        let tag = ring::hmac::sign(&key, &words);
        Some((name.to_owned(), data_encoding::HEXLOWER.encode(tag.as_ref().get(..8)?)))
    };
    all.into_iter().filter_map(print).collect()
}

/// The last drill and the last promotion that the event log and the one before it hold.
fn past(state_dir: &Path) -> (Option<EventRow>, Option<EventRow>) {
    let (mut drill, mut promotion) = (None, None);
    for name in ["events.log.1", "events.log"] {
        let path = state_dir.join(name);
        if std::fs::metadata(&path).is_ok_and(|meta| meta.len() > EVENTS_READ) {
            continue;
        }
        let text = std::fs::read_to_string(path).unwrap_or_default();
        for line in text.lines().filter(|line| line.contains("\"drill\"") || line.contains("\"promoted\"")) {
            let Ok(event) = serde_json::from_str::<EventRow>(line) else { continue };
            match event.kind.as_str() {
                "drill" => drill = Some(event),
                "promoted" => promotion = Some(event),
                _ => {}
            }
        }
    }
    (drill, promotion)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_event_logs_remember_longer_than_the_daemon_shows() {
        let dir = tempfile::tempdir().expect("a directory");
        let row = |at: &str, kind: &str| format!("{{\"at\":\"{at}\",\"kind\":\"{kind}\",\"text\":\"x\"}}\n");
        assert_eq!(past(dir.path()), (None, None));
        std::fs::write(dir.path().join("events.log.1"), row("1", "drill") + &row("2", "promoted")).expect("written");
        std::fs::write(dir.path().join("events.log"), row("3", "promoted") + "torn\n" + &row("4", "gate_cut"))
            .expect("written");
        let (drill, promotion) = past(dir.path());
        assert_eq!((drill.expect("kept").at, promotion.expect("newer").at), ("1".to_owned(), "3".to_owned()));
    }

    #[test]
    fn a_sheet_of_another_version_is_read_and_no_secret_is_on_one() {
        let sheet: Sheet = serde_json::from_str(r#"{"node":"midna","colour":"blue"}"#).expect("read");
        assert_eq!((sheet.node.as_str(), sheet.bytes), ("midna", None));
        let dir = tempfile::tempdir().expect("a directory");
        let mut config = Config::parse(&Config::example(), Path::new("example")).expect("the example parses");
        config.cluster.key_file = dir.path().join("key");
        config.replication.password_file = dir.path().join("pass");
        config.fence.stonith = vec!["ipmi".into(), "hunter2".into()];
        let write = |name: &str, text: &str| files::create(&dir.path().join(name), text.as_bytes(), 0o600, None);
        write("key", &data_encoding::BASE64.encode(&[7; 32])).expect("written");
        write("pass", "hunter2\n").expect("written");
        let (prints, keys) = (secrets(&config), config.sheet());
        assert_eq!(prints.len(), 1, "{prints:?}");
        let all =
            serde_json::to_string(&Sheet { secrets: prints.clone(), config: keys, ..Sheet::default() }).expect("text");
        assert!(!all.contains("hunter2"), "{all}");
        std::fs::write(&config.replication.password_file, "hunter2").expect("written");
        assert_eq!(secrets(&config), prints, "the newline at its end is ignored");
        std::fs::write(&config.replication.password_file, "hunter3").expect("written");
        assert_ne!(secrets(&config), prints);
    }
}
