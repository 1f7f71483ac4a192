//! What a standby, a clone and a rewind need: the role and its real login, slots, tools, libraries, room on the disk.

use super::gather::{Facts, LoginFacts};
use super::side_doors::line_for;
use super::{Level, Report};
use crate::base::config::{Config, Node};
use crate::io::postgres::{Fitness, Login, RoleFacts, Survey, Tool, slot_name};

/// Megabytes of WAL that a busy primary writes in minutes.
const LITTLE_WAL: i64 = 1024;
/// A copy beside the data needs its size and something for WAL.
const ROOM_PERCENT: u64 = 105;

pub(super) fn check(config: &Config, node: &Node, facts: &Facts, report: &mut Report) {
    match (&facts.survey, &facts.fitness) {
        (Ok(survey), Ok(fitness)) => {
            role(config, fitness.role.as_ref(), report);
            slots(config, node, survey, fitness, report);
            kept(config, survey, report);
            libraries(fitness, report);
            collations(fitness, report);
            tools(node, &facts.tools, Some(fitness.version / 10_000), report);
            room(node, Some(fitness.bytes), facts.host.free, report);
        }
        (_, Err(why)) | (Err(why), _) => {
            tools(node, &facts.tools, None, report);
            report.unchecked("the replication role, slots, libraries and collations", why.clone());
        }
    }
    let own = facts.fitness.as_ref().ok().map(|fitness| fitness.system_id.as_str());
    facts.logins.iter().for_each(|login| logins(config, node, own, login, report));
}

fn role(config: &Config, role: Option<&RoleFacts>, report: &mut Report) {
    let user = &config.replication.user;
    report.checked(format!("the replication role {user}, and what pg_rewind needs"));
    let Some(role) = role else {
        let text = format!("there is no role {user}: nothing can follow this node");
        let remedy = "portcullis doctor --fix on the active node makes it, as its daemon does with the next rejoin";
        return report.find(Level::Critical, "repl.role", text, remedy);
    };
    let may = |has: bool, word: &str| if has { None } else { Some(word.to_owned()) };
    let missing: Vec<String> = [may(role.login, "LOGIN"), may(role.replication || role.superuser, "REPLICATION")]
        .into_iter()
        .flatten()
        .collect();
    if !missing.is_empty() {
        let words = missing.join(" ");
        let text = format!("the role {user} lacks {words}: no standby can log in with it");
        report.find(Level::Critical, "repl.role", text, format!("on the active node:\nALTER ROLE \"{user}\" {words};"));
    }
    if role.expired {
        let text = format!("the password of the role {user} is past its VALID UNTIL: no standby can log in with it");
        let remedy = format!("on the active node:\nALTER ROLE \"{user}\" VALID UNTIL 'infinity';");
        report.find(Level::Critical, "repl.role", text, remedy);
    }
    if !role.lacks.is_empty() {
        let text =
            format!("the role {user} may not execute {}: pg_rewind cannot run, a rejoin clones", role.lacks.join(", "));
        let grants = role.lacks.iter().map(|f| format!("\nGRANT EXECUTE ON FUNCTION {f} TO \"{user}\";"));
        let remedy = format!(
            "portcullis doctor --fix on the active node, or there, in the database postgres:{}",
            grants.collect::<String>()
        );
        report.find(Level::Warning, "rejoin.grants", text, remedy);
    }
}

fn logins(config: &Config, node: &Node, own: Option<&str>, facts: &LoginFacts, report: &mut Report) {
    let (at, user) = (&facts.at, &config.replication.user);
    let what = format!("a login of {user} at {at}'s PostgreSQL with replication.password_file");
    match &facts.replication {
        Login::Untried(why) => return report.unchecked(what, why.clone()),
        Login::Done(theirs) => {
            report.checked(what);
            if let Some(own) = own.filter(|own| own != theirs) {
                let text = format!(
                    "{at}'s PostgreSQL has the system identifier {theirs}, this node's {own}: they are no pair"
                );
                let remedy = "find out which data is the right one; then portcullis rejoin on the node of the other";
                report.find(Level::Critical, "pg.identity", text, remedy);
            }
        }
        Login::Failed(why) => {
            let text = format!("{user} cannot log in at {at}'s PostgreSQL for replication: {why}");
            let (level, remedy) = refusal(config, node, facts, why, "replication");
            match level {
                Some(level) => report.find(level, "repl.login", text, remedy),
                None => report.unchecked(what, why.clone()),
            }
            return;
        }
    }
    match &facts.rewind {
        Login::Failed(why) => {
            let text =
                format!("{user} cannot log in to the database postgres at {at}: a rejoin from there clones ({why})");
            if let (Some(_), remedy) = refusal(config, node, facts, why, "postgres") {
                report.find(Level::Advice, "rejoin.login", text, remedy);
            }
        }
        Login::Done(_) => report.checked(format!("the same for pg_rewind at {at}")),
        Login::Untried(why) => report.unchecked(format!("a login for pg_rewind at {at}"), why.clone()),
    }
}

/// How bad a refused login is (`None`: it says nothing), and what helps.
fn refusal(config: &Config, node: &Node, facts: &LoginFacts, why: &str, database: &str) -> (Option<Level>, String) {
    let (at, user) = (&facts.at, &config.replication.user);
    let has = |words: &[&str]| words.iter().any(|word| why.contains(word));
    if has(&["starting up", "shutting down", "recovery mode", "not yet accepting"]) {
        return (None, String::new());
    }
    if has(&["no pg_hba.conf entry", "pg_hba.conf rejects"]) {
        let remedy = format!(
            "in {at}'s pg_hba.conf, before lines that reject, then reload:\n{}",
            line_for(&node.postgres.host, database, user)
        );
        return (Some(Level::Critical), remedy);
    }
    if has(&["password authentication failed", "no password supplied", "fe_sendauth"]) {
        let remedy = format!(
            "make {} the same on all nodes, and on the active node give the role that password:\n\\password {user}",
            config.replication.password_file.display()
        );
        return (Some(Level::Critical), remedy);
    }
    if has(&["does not exist"]) {
        return (Some(Level::Critical), "portcullis doctor --fix on the active node makes the role".to_owned());
    }
    if has(&["SSL", "certificate"]) {
        return (
            Some(Level::Critical),
            "compare replication.conninfo with the server's certificate and its pg_hba.conf".to_owned(),
        );
    }
    let port = config.node(at).map_or(5432, |node| node.postgres.port);
    (
        Some(Level::Warning),
        format!("start {at}'s PostgreSQL; let TCP port {port} pass both ways; see listen_addresses there"),
    )
}

fn slots(config: &Config, node: &Node, survey: &Survey, fitness: &Fitness, report: &mut Report) {
    if survey.in_recovery {
        return;
    }
    report.checked("replication slots in use");
    let unlimited = survey.setting("max_slot_wal_keep_size") == "-1";
    let until = if unlimited { "until the disk is full" } else { "up to max_slot_wal_keep_size" };
    for slot in &fitness.slots {
        let name = &slot.name;
        let Some(other) = config.nodes.iter().find(|other| other.name != node.name && slot_name(&other.name) == *name)
        else {
            if !slot.active {
                let text = format!("the slot {name} is nobody's here and not in use; it keeps WAL {until}");
                let remedy = format!("if nobody needs it:\nSELECT pg_drop_replication_slot('{name}');");
                report.find(Level::Advice, "slot.idle", text, remedy);
            }
            continue;
        };
        let standby = &other.name;
        if matches!(slot.wal_status.as_str(), "lost" | "unreserved") {
            let text =
                format!("the slot {name} is {}: WAL that {standby} needs is gone, or soon will be", slot.wal_status);
            let remedy = format!("portcullis rejoin {standby}\nand raise max_slot_wal_keep_size");
            report.find(Level::Critical, "slot.lost", text, remedy);
        } else if !slot.active && config.replication.slots {
            let text = format!("{standby} does not stream over its slot {name}; WAL is kept for it {until}");
            let remedy = format!("start {standby}'s PostgreSQL and daemon, or: portcullis rejoin {standby}");
            report.find(Level::Warning, "slot.idle", text, remedy);
        }
    }
}

fn kept(config: &Config, survey: &Survey, report: &mut Report) {
    report.checked("WAL kept for a standby that is away");
    if !config.replication.slots && survey.setting("wal_keep_size") == "0" && survey.setting("archive_mode") == "off" {
        let text = "neither slots, nor wal_keep_size, nor an archive keep WAL: a standby that was away needs a clone";
        let remedy = "replication.slots = true, or in postgresql.conf, then reload:\nwal_keep_size = 4GB";
        report.find(Level::Warning, "repl.wal", text, remedy);
    }
    let most = survey.setting("max_slot_wal_keep_size").parse::<i64>().unwrap_or(-1);
    if config.replication.slots && (0..LITTLE_WAL).contains(&most) {
        let text = format!("max_slot_wal_keep_size is {most} MB: a standby that was away for more needs a clone");
        let remedy = "in postgresql.conf, then reload, as large as the disk allows:\nmax_slot_wal_keep_size = 20GB";
        report.find(Level::Advice, "repl.wal", text, remedy);
    }
}

fn libraries(fitness: &Fitness, report: &mut Report) {
    report.checked("libraries of settings and functions");
    for (name, file) in &fitness.missing_libraries {
        let text =
            format!("the library {name} is not on this machine ({}): PostgreSQL or its functions fail", file.display());
        let remedy = "install the package that the other node has it from: dpkg -S FILE says which";
        report.find(Level::Critical, "pg.library", text, remedy);
    }
}

fn collations(fitness: &Fitness, report: &mut Report) {
    report.checked("collation versions");
    for (database, recorded, actual) in &fitness.collations {
        let text = format!(
            "the database {database} has indexes of collation version {recorded}, this machine sorts by {actual}: \
             indexes on text may answer wrongly here"
        );
        let remedy = format!(
            "bring both machines to one release of libc (or ICU), then on the active node:\nREINDEX DATABASE \
             \"{database}\";\nALTER DATABASE \"{database}\" REFRESH COLLATION VERSION;"
        );
        report.find(Level::Warning, "pg.collation", text, remedy);
    }
}

fn tools(node: &Node, tools: &[Tool], major: Option<u32>, report: &mut Report) {
    report.checked("the tools of bin_dir");
    let mut lacking = Vec::new();
    for (name, said) in tools {
        match said {
            Err(why) => lacking.push(format!("{name} ({why})")),
            Ok(version) => {
                let theirs = major_of(version);
                if let (Some(theirs), Some(major)) = (theirs, major)
                    && theirs != major
                {
                    let text = format!("{name} of bin_dir is of PostgreSQL {theirs}, the cluster of {major}");
                    let remedy = format!("set bin_dir of {} to the folder of PostgreSQL {major}'s programs", node.name);
                    report.find(Level::Critical, "pg.tools", text, remedy);
                }
            }
        }
    }
    if !lacking.is_empty() {
        let text = format!("bin_dir lacks {}", lacking.join(", "));
        let remedy = format!("install PostgreSQL's server and client packages, or correct bin_dir of {}", node.name);
        report.find(Level::Critical, "pg.tools", text, remedy);
    }
}

/// `pg_ctl (PostgreSQL) 15.6 (Debian 15.6-0)`
fn major_of(version: &str) -> Option<u32> {
    let number = version.split_once("(PostgreSQL) ")?.1;
    number.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
}

/// A clone is made beside the old data, which is set aside and kept.
pub(super) fn room(node: &Node, needed: Option<u64>, free: Option<u64>, report: &mut Report) {
    let (Some(needed), Some(free)) = (needed, free) else {
        return report.unchecked("room for a clone", "the size of the data, or what is free, is not known");
    };
    report.checked("room for a clone");
    let wanted = needed / 100 * ROOM_PERCENT;
    if free < wanted {
        let text = format!(
            "{} has {} free at its data directory, a clone needs {}: a rejoin that must clone is refused",
            node.name,
            human(free),
            human(wanted)
        );
        let remedy = format!(
            "make room in the file system of {}; `*.set-aside-*` and `*.diverged-*` beside it are yours to delete",
            node.postgres.data_dir.display()
        );
        report.find(Level::Warning, "rejoin.disk", text, remedy);
    }
}

fn human(bytes: u64) -> String {
    match bytes {
        0..=0x3fff_ffff => format!("{} MiB", bytes >> 20),
        _ => format!("{}.{} GiB", bytes >> 30, (bytes >> 20) % 1024 * 10 / 1024),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::postgres::SlotFacts;
    use std::path::Path;

    fn config() -> Config {
        Config::parse(&Config::example(), Path::new("example")).expect("the example parses")
    }

    fn good() -> Fitness {
        let slot =
            SlotFacts { name: "portcullis_midna".into(), active: true, wal_status: "reserved".into(), physical: true };
        let role = RoleFacts { login: true, replication: true, ..RoleFacts::default() };
        Fitness {
            system_id: "7".into(),
            version: 150_006,
            bytes: 1 << 30,
            slots: vec![slot],
            role: Some(role),
            ..Fitness::default()
        }
    }

    fn judged(fitness: &Fitness) -> Vec<(Level, String)> {
        let config = config();
        let mut report = Report::default();
        let survey = Survey::default();
        role(&config, fitness.role.as_ref(), &mut report);
        slots(&config, &config.nodes[0], &survey, fitness, &mut report);
        libraries(fitness, &mut report);
        collations(fitness, &mut report);
        found(report)
    }

    fn found(report: Report) -> Vec<(Level, String)> {
        assert!(report.findings.iter().all(|finding| !finding.remedy.is_empty()), "{report:?}");
        report.findings.into_iter().map(|finding| (finding.level, finding.check)).collect()
    }

    #[test]
    fn each_fault_of_role_and_slots_is_found_alone() {
        assert_eq!(judged(&good()), []);
        type Break = fn(&mut Fitness);
        fn role(fitness: &mut Fitness) -> &mut RoleFacts {
            fitness.role.as_mut().expect("a role")
        }
        let rows: [(Level, &str, Break); 9] = [
            (Level::Critical, "repl.role", |f| f.role = None),
            (Level::Critical, "repl.role", |f| role(f).login = false),
            (Level::Critical, "repl.role", |f| role(f).expired = true),
            (Level::Warning, "rejoin.grants", |f| role(f).lacks.push("pg_ls_dir(text, boolean, boolean)".into())),
            (Level::Warning, "slot.idle", |f| f.slots[0].active = false),
            (Level::Critical, "slot.lost", |f| f.slots[0].wal_status = "lost".into()),
            (Level::Advice, "slot.idle", |f| f.slots.push(SlotFacts { name: "old".into(), ..SlotFacts::default() })),
            (Level::Critical, "pg.library", |f| f.missing_libraries.push(("x".into(), "/x.so".into()))),
            (Level::Warning, "pg.collation", |f| f.collations.push(("app".into(), "2.31".into(), "2.36".into()))),
        ];
        for (level, check, break_it) in rows {
            let mut fitness = good();
            break_it(&mut fitness);
            assert_eq!(judged(&fitness), [(level, check.to_owned())], "{check}");
        }
    }

    #[test]
    fn a_refused_login_is_interpreted() {
        let at = |replication: Login, rewind: Login| {
            let mut report = Report::default();
            let facts = LoginFacts { at: "midna".parse().expect("a name"), replication, rewind };
            let config = config();
            logins(&config, &config.nodes[0], Some("7"), &facts, &mut report);
            let words = report.findings.first().map(|finding| finding.remedy.clone()).unwrap_or_default();
            (found(report), words)
        };
        let (done, failed) = (|| Login::Done("7".into()), |why: &str| Login::Failed(why.into()));
        assert_eq!(at(done(), done()).0, []);
        assert_eq!(at(Login::Done("8".into()), done()).0, [(Level::Critical, "pg.identity".to_owned())]);
        for (why, level, words) in [
            (
                "FATAL:  password authentication failed for user \"replicator\"",
                Level::Critical,
                "\\password replicator",
            ),
            (
                "FATAL:  no pg_hba.conf entry for replication connection",
                Level::Critical,
                "host  replication  replicator",
            ),
            (
                "connection to server at \"192.0.2.12\", port 5432 failed: Connection refused",
                Level::Warning,
                "port 5432",
            ),
        ] {
            let (found, remedy) = at(failed(why), done());
            assert!(found == [(level, "repl.login".to_owned())] && remedy.contains(words), "{why}: {found:?} {remedy}");
        }
        assert_eq!(at(failed("FATAL:  the database system is starting up"), done()).0, []);
        let (found, remedy) = at(done(), failed("FATAL:  no pg_hba.conf entry for host"));
        assert!(found == [(Level::Advice, "rejoin.login".to_owned())] && remedy.contains("host  postgres"), "{remedy}");
    }

    #[test]
    fn wal_for_a_standby_that_is_away_is_kept_somehow() {
        let check = |slots: bool, settings: &[(&str, &str)]| {
            let mut config = config();
            config.replication.slots = slots;
            let mut survey = Survey::default();
            for (name, value) in settings {
                survey.settings.insert((*name).into(), (*value).into());
            }
            let mut report = Report::default();
            kept(&config, &survey, &mut report);
            found(report)
        };
        let none = [("wal_keep_size", "0"), ("archive_mode", "off"), ("max_slot_wal_keep_size", "-1")];
        assert_eq!(check(true, &none), []);
        assert_eq!(check(false, &none), [(Level::Warning, "repl.wal".to_owned())]);
        assert_eq!(check(false, &[("wal_keep_size", "512"), none[1]]), []);
        assert_eq!(check(true, &[("max_slot_wal_keep_size", "64")]), [(Level::Advice, "repl.wal".to_owned())]);
    }

    #[test]
    fn tools_and_room_are_measured() {
        let config = config();
        let tool = |line: &str| vec![("pg_ctl", Ok(line.to_owned()))];
        let check = |all: &[Tool]| {
            let mut report = Report::default();
            tools(&config.nodes[0], all, Some(15), &mut report);
            found(report)
        };
        assert_eq!(check(&tool("pg_ctl (PostgreSQL) 15.6 (Debian 15.6-0+deb12u1)")), []);
        assert_eq!(check(&tool("pg_ctl (PostgreSQL) 16beta1")), [(Level::Critical, "pg.tools".to_owned())]);
        assert_eq!(check(&[("pg_rewind", Err("not there".into()))]), [(Level::Critical, "pg.tools".to_owned())]);
        let space = |free| {
            let mut report = Report::default();
            room(&config.nodes[0], Some(10 << 30), Some(free), &mut report);
            found(report)
        };
        assert_eq!(space(11 << 30), []);
        assert_eq!(space(10 << 30), [(Level::Warning, "rejoin.disk".to_owned())]);
    }
}
