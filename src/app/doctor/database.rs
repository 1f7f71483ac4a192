//! PostgreSQL's settings, roles and databases: what would lose acknowledged writes (R4), and what a standby needs.

use super::gather::Facts;
use super::{Level, Report};
use crate::base::config::{Config, Node, ReplicationMode};
use crate::base::ids::NodeName;
use crate::io::postgres::{Survey, slot_name};
use crate::wire::marker::Marker;

/// One streams, one copies, one takes the WAL of the copy.
const LEAST_SENDERS: u32 = 3;

pub(super) fn check(config: &Config, node: &Node, facts: &Facts, report: &mut Report) {
    let survey = match &facts.survey {
        Ok(survey) => survey,
        Err(why) => {
            let text = format!("PostgreSQL here cannot be asked: {why}");
            report.find(Level::Critical, "pg.down", text, "start it, and run doctor as root or as the user it runs as");
            report.unchecked("PostgreSQL's settings, roles and databases", "PostgreSQL cannot be asked");
            return;
        }
    };
    settings(survey, report);
    connections(config, survey, report);
    slots(config, node, survey, report);
    if config.replication.mode == ReplicationMode::Synchronous {
        commits(survey, report);
        cancels(config, survey, report);
        let marker = facts
            .servers
            .iter()
            .flatten()
            .find_map(|server| server.answer.as_ref().ok()?.pair.marker.first()?.parse::<Marker>().ok());
        if let Some(marker) = marker {
            sync_list(&marker, &node.name, survey, report);
        }
    }
    for database in survey.databases.iter().filter(|database| database.unlogged > 0) {
        let text =
            format!("{} unlogged tables in {}: they are empty after a failover", database.unlogged, database.name);
        report.find(Level::Advice, "data.unlogged", text, "ALTER TABLE ... SET LOGGED for what must survive");
    }
    for (name, why) in &survey.unseen {
        report.unchecked(format!("database {name}"), why.clone());
    }
}

fn settings(survey: &Survey, report: &mut Report) {
    report.checked("PostgreSQL's settings");
    let restart = |line: &str| format!("in postgresql.conf, then restart PostgreSQL:\n{line}");
    let off = |name: &str| survey.setting(name) == "off";
    let number = |name: &str| survey.setting(name).parse::<u32>().unwrap_or_default();
    if survey.setting("wal_level") == "minimal" {
        let text = "wal_level is minimal: nothing can be replicated";
        report.find(Level::Critical, "pg.wal-level", text, restart("wal_level = replica"));
    }
    if off("hot_standby") {
        let text = "hot_standby is off: a standby here takes no sessions, so nobody can see whether it could take over";
        report.find(Level::Critical, "pg.hot-standby", text, restart("hot_standby = on"));
    }
    if number("max_wal_senders") < LEAST_SENDERS {
        let text = format!(
            "max_wal_senders is {}: a clone needs two beside the one that streams",
            survey.setting("max_wal_senders")
        );
        report.find(Level::Warning, "pg.senders", text, restart("max_wal_senders = 10"));
    }
    if off("wal_log_hints") && off("data_checksums") {
        let text =
            "neither wal_log_hints nor data checksums are on: pg_rewind cannot bring this node back, only a clone";
        report.find(Level::Warning, "rejoin.rewind", text, restart("wal_log_hints = on"));
    }
    for (name, what) in [("fsync", "a crash destroys the cluster"), ("full_page_writes", "a crash can tear pages")] {
        if off(name) {
            let text = format!("{name} is off: {what}");
            report.find(Level::Critical, "pg.fsync", text, format!("in postgresql.conf, then reload:\n{name} = on"));
        }
    }
    if off("restart_after_crash") {
        let text =
            "restart_after_crash is off: after a crash of one backend PostgreSQL stays down until a person starts it";
        report.find(
            Level::Advice,
            "pg.restart-after-crash",
            text,
            "in postgresql.conf, then reload:\nrestart_after_crash = on",
        );
    }
    for name in survey.pending_restart.iter().filter(|name| *name != "listen_addresses") {
        let text = format!("{name} was changed, and PostgreSQL was not restarted since: the old value is in force");
        report.find(Level::Advice, "pg.pending-restart", text, "restart PostgreSQL");
    }
}

/// One pool alone must fit; all together share what there is, and wait.
fn connections(config: &Config, survey: &Survey, report: &mut Report) {
    let number = |name: &str| survey.setting(name).parse::<u32>().unwrap_or_default();
    let most = number("max_connections");
    if most == 0 {
        return report.unchecked("pool.size against max_connections", "PostgreSQL does not say max_connections");
    }
    report.checked("pool.size against max_connections");
    let kept = number("superuser_reserved_connections").saturating_add(number("reserved_connections"));
    let (free, wanted) = (most.saturating_sub(kept), config.pool.size.saturating_add(config.pool.reserve));
    if wanted > free {
        let text = format!(
            "pool.size and pool.reserve are {wanted} together, but PostgreSQL takes {free} connections \
             (max_connections = {most} less {kept} reserved ones): one user of one database can take them all"
        );
        let remedy = format!(
            "lower pool.size, or in postgresql.conf, then restart PostgreSQL:\nmax_connections = {}",
            wanted.saturating_add(kept)
        );
        report.find(Level::Warning, "pg.connections", text, remedy);
    }
}

fn slots(config: &Config, node: &Node, survey: &Survey, report: &mut Report) {
    if !config.replication.slots {
        return;
    }
    report.checked("replication slots");
    let most = survey.setting("max_replication_slots").parse::<usize>().unwrap_or_default();
    let wanted: Vec<String> =
        config.nodes.iter().filter(|other| other.name != node.name).map(|other| slot_name(&other.name)).collect();
    let missing: Vec<&String> = wanted.iter().filter(|name| !survey.slots.contains(name)).collect();
    if most < wanted.len() || (!missing.is_empty() && survey.slots.len() >= most) {
        let text = format!("max_replication_slots is {most}: there is no room for {}", wanted.join(", "));
        let remedy = "in postgresql.conf, then restart PostgreSQL:\nmax_replication_slots = 10";
        report.find(Level::Critical, "pg.slots", text, remedy);
    } else if !survey.in_recovery
        && let Some(name) = missing.first()
    {
        let text = format!("the slot {name} is not there: WAL that a standby still needs may be removed");
        report.find(Level::Warning, "slot.missing", text, "start the daemon on both nodes; the active one makes it");
    }
}

/// Does a commit at this setting wait until the standby has flushed it?
fn waits(value: &str) -> bool {
    matches!(value.to_ascii_lowercase().as_str(), "on" | "true" | "yes" | "1" | "remote_apply")
}

fn commits(survey: &Survey, report: &mut Report) {
    report.checked("synchronous_commit of roles and databases");
    if let Some(value) = survey.synchronous_commit.as_deref().filter(|value| !waits(value)) {
        let text = format!("synchronous_commit is {value}: commits are acknowledged that the standby does not have");
        let remedy = "in postgresql.conf, then reload:\nsynchronous_commit = on";
        report.find(Level::Critical, "commit.off", text, remedy);
    }
    for lowered in survey.lowered.iter().filter(|lowered| !waits(&lowered.value)) {
        let (who, statement) = match (&lowered.role, &lowered.database) {
            (Some(role), Some(database)) => {
                (format!("role {role} in {database}"), format!("ALTER ROLE {role} IN DATABASE {database}"))
            }
            (Some(role), None) => (format!("role {role}"), format!("ALTER ROLE {role}")),
            (None, Some(database)) => (format!("database {database}"), format!("ALTER DATABASE {database}")),
            (None, None) => ("every role".to_owned(), "ALTER ROLE ALL".to_owned()),
        };
        let value = &lowered.value;
        let text =
            format!("{who} commits with synchronous_commit = {value}: a failover may lose what was acknowledged");
        report.find(Level::Warning, "commit.lowered", text, format!("{statement} RESET synchronous_commit;"));
    }
}

/// A cancel from the side turns a waiting commit into a success (protocol-review P7).
fn cancels(config: &Config, survey: &Survey, report: &mut Report) {
    report.checked("pg_cancel_backend, database by database");
    for database in &survey.databases {
        let own = [&config.postgres.admin_user, &config.replication.user];
        let roles: Vec<&str> =
            database.may_cancel.iter().filter(|role| !own.contains(role)).map(String::as_str).collect();
        if roles.is_empty() {
            continue;
        }
        let (name, who) = (&database.name, roles.join(", "));
        let text =
            format!("in {name}, {who} may execute pg_cancel_backend, which ends a commit's wait for the standby");
        let function = "EXECUTE ON FUNCTION pg_catalog.pg_cancel_backend(integer)";
        let remedy = format!(
            "on the primary, in {name} (and in template1, for databases to come):\nREVOKE {function} FROM PUBLIC;\n\
             REVOKE {function} FROM {who};"
        );
        report.find(Level::Warning, "commit.cancel", text, remedy);
    }
}

/// The list in force on the active node is the record's (R4).
fn sync_list(marker: &Marker, me: &NodeName, survey: &Survey, report: &mut Report) {
    if marker.active != *me || survey.in_recovery {
        return;
    }
    report.checked("synchronous_standby_names against the record");
    let list = survey.setting("synchronous_standby_names").trim();
    let name = list.strip_prefix('"').and_then(|list| list.strip_suffix('"')).unwrap_or(list);
    let recorded = marker.sync.as_ref().map(NodeName::as_str).unwrap_or_default();
    if name == recorded {
        return;
    }
    // Commits wait for somebody, but the record says alone: it is how each re-arming begins.
    let level = if recorded.is_empty() { Level::Warning } else { Level::Critical };
    let says = if recorded.is_empty() { "none" } else { recorded };
    let text = format!("synchronous_standby_names is '{list}', while the record says sync={says}");
    let remedy = "leave the setting to the daemon (ALTER SYSTEM); take it out of postgresql.conf, and look again in a \
                  minute";
    report.find(level, "commit.list", text, remedy);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::postgres::{DatabaseFacts, Lowered};
    use std::path::Path;

    fn config() -> Config {
        Config::parse(&Config::example(), Path::new("example")).expect("the example parses")
    }

    fn survey(changes: &[(&str, &str)]) -> Survey {
        let mut survey = Survey { slots: vec!["portcullis_midna".into()], ..Survey::default() };
        let good = [
            ("wal_level", "replica"),
            ("hot_standby", "on"),
            ("max_wal_senders", "10"),
            ("max_replication_slots", "10"),
            ("wal_log_hints", "off"),
            ("data_checksums", "on"),
            ("fsync", "on"),
            ("full_page_writes", "on"),
            ("restart_after_crash", "on"),
            ("max_connections", "100"),
            ("superuser_reserved_connections", "3"),
        ];
        for (name, value) in good.iter().chain(changes) {
            survey.settings.insert((*name).into(), (*value).into());
        }
        survey
    }

    fn judged(survey: &Survey) -> Vec<(Level, String)> {
        let config = config();
        let mut report = Report::default();
        settings(survey, &mut report);
        connections(&config, survey, &mut report);
        slots(&config, &config.nodes[0], survey, &mut report);
        commits(survey, &mut report);
        cancels(&config, survey, &mut report);
        report.findings.into_iter().map(|finding| (finding.level, finding.text)).collect()
    }

    #[test]
    fn each_setting_that_stands_in_the_way_is_found_alone() {
        assert_eq!(judged(&survey(&[])), []);
        for (name, value, level) in [
            ("wal_level", "minimal", Level::Critical),
            ("hot_standby", "off", Level::Critical),
            ("max_wal_senders", "2", Level::Warning),
            ("max_replication_slots", "0", Level::Critical),
            ("data_checksums", "off", Level::Warning),
            ("fsync", "off", Level::Critical),
            ("full_page_writes", "off", Level::Critical),
            ("restart_after_crash", "off", Level::Advice),
            ("max_connections", "42", Level::Warning),
            ("superuser_reserved_connections", "61", Level::Warning),
        ] {
            let found = judged(&survey(&[(name, value)]));
            assert!(matches!(&found[..], [(found, _)] if *found == level), "{name}: {found:?}");
        }
        assert_eq!(judged(&survey(&[("data_checksums", "off"), ("wal_log_hints", "on")])), []);
    }

    #[test]
    fn a_primary_without_its_standbys_slot_is_told_and_a_standby_is_not() {
        let bare = Survey { slots: Vec::new(), ..survey(&[]) };
        assert!(matches!(&judged(&bare)[..], [(Level::Warning, text)] if text.contains("portcullis_midna")));
        assert_eq!(judged(&Survey { in_recovery: true, ..bare }), []);
    }

    #[test]
    fn commits_that_do_not_wait_are_found_wherever_it_is_written() {
        for value in ["off", "local", "remote_write", "false", "OFF"] {
            let lowered = Lowered { role: Some("app".into()), database: None, value: value.into() };
            let found = judged(&Survey { lowered: vec![lowered], ..survey(&[]) });
            assert!(matches!(&found[..], [(Level::Warning, text)] if text.contains("role app ")), "{value}: {found:?}");
            let found = judged(&Survey { synchronous_commit: Some(value.into()), ..survey(&[]) });
            assert!(matches!(&found[..], [(Level::Critical, _)]), "{value}: {found:?}");
        }
        for value in ["on", "remote_apply"] {
            assert_eq!(judged(&Survey { synchronous_commit: Some(value.into()), ..survey(&[]) }), []);
        }
    }

    #[test]
    fn roles_that_may_cancel_are_named_with_the_database() {
        let database = |roles: &[&str]| DatabaseFacts {
            name: "app".into(),
            may_cancel: roles.iter().map(ToString::to_string).collect(),
            ..DatabaseFacts::default()
        };
        let found = judged(&Survey { databases: vec![database(&["replicator", "writer"])], ..survey(&[]) });
        assert!(matches!(&found[..], [(Level::Warning, text)] if text.contains("in app, writer may")), "{found:?}");
        assert_eq!(judged(&Survey { databases: vec![database(&["replicator"])], ..survey(&[]) }), []);
    }

    #[test]
    fn the_list_is_compared_on_the_active_node_alone() {
        let marker: Marker = "v=1 epoch=7 seq=41 active=alp sync=midna timeline=3 lease=5000 sysid=7318 boot=5f1c \
                              since=2026-11-20T15:11:00Z"
            .parse()
            .expect("a marker");
        let list = |list: &str, in_recovery, me: &str| {
            let survey = Survey { in_recovery, ..survey(&[("synchronous_standby_names", list)]) };
            let mut report = Report::default();
            sync_list(&marker, &me.parse().expect("a name"), &survey, &mut report);
            report.findings.first().map(|finding| finding.level)
        };
        assert_eq!(list("\"midna\"", false, "alp"), None);
        assert_eq!(list("", false, "alp"), Some(Level::Critical));
        assert_eq!(list("ANY 1 (x, y)", false, "alp"), Some(Level::Critical));
        assert_eq!(list("", false, "midna"), None);
        assert_eq!(list("", true, "alp"), None);
    }
}
