//! `portcullis doctor` on a real pair: many things broken at once, on both nodes; each is found with its remedy from
//! either node, `--fix` mends what is harmless, and nothing dead holds it up.

use crate::ensure;
use crate::harness::config::Options;
use crate::harness::node::Node;
use crate::harness::postgres::HBA;
use crate::harness::sys::{Fail, Outcome, now, secs, wait_until};
use crate::in_lab;
use serde_json::Value;
use std::os::unix::fs::PermissionsExt;

/// Findings as "node severity check: what -> remedy".
struct Said {
    code: i32,
    findings: Vec<String>,
    report: Value,
}

impl Said {
    fn has(&self, parts: &[&str]) -> bool {
        self.findings.iter().any(|line| parts.iter().all(|part| line.contains(part)))
    }

    fn checks(&self) -> Vec<String> {
        let mut all: Vec<String> =
            self.findings.iter().filter_map(|line| Some(line.split_once(':')?.0.to_owned())).collect();
        all.sort();
        all
    }
}

fn doctor(node: &Node, words: &[&str]) -> Outcome<Said> {
    let said = node.cli(&[&["doctor", "--json"], words].concat())?;
    let report: Value = serde_json::from_str(&said.out).map_err(|error| Fail(format!("{error}: {said:?}")))?;
    let mut findings = Vec::new();
    for finding in report["findings"].as_array().into_iter().flatten() {
        let word = |key: &str| finding[key].as_str().unwrap_or_default();
        for key in ["node", "check", "severity", "what", "remedy", "why"] {
            ensure!(!word(key).is_empty(), "a finding without {key}: {finding}");
        }
        findings.push(format!(
            "{} {} {}: {} -> {}",
            word("node"),
            word("severity"),
            word("check"),
            word("what"),
            word("remedy")
        ));
    }
    Ok(Said { code: said.code, findings, report })
}

/// What a sound pair of the lab is advised: it was never drilled, and its sockets are PostgreSQL's default.
const SOUND: [&str; 3] = ["a advice door.socket", "a advice pair.drill", "b advice door.socket"];

/// As docs/operations.md recommends it, with the lines for pg_rewind, and for these two nodes alone.
fn sound_rules() -> String {
    let kept: String = HBA.lines().filter(|line| !line.contains("2001:")).map(|line| format!("{line}\n")).collect();
    let rewind = ["192.0.2.11", "192.0.2.12"].map(|ip| format!("host postgres replicator {ip}/32 scram-sha-256\n"));
    kept + &rewind.concat()
}

fn rules(node: &Node, text: &str) -> Outcome {
    std::fs::write(node.postgres.data_dir.join("pg_hba.conf"), text)?;
    node.postgres.sql("postgres", "SELECT pg_reload_conf()").map(drop)
}

fn is_sound(node: &Node) -> Outcome {
    let said = doctor(node, &[])?;
    ensure!(said.code == 0 && said.checks() == SOUND, "a sound pair has {}: {:#?}", said.code, said.findings);
    ensure!(said.report["nodes"].as_array().is_some_and(|nodes| nodes.len() == 2), "{}", said.report["nodes"]);
    let checked = said.report["checked"].to_string();
    for what in [
        "right to update",
        "by TCP",
        "a login of replicator at b",
        "the same for pg_rewind at b",
        "b: a login of replicator at a",
        "b's clock",
        "b: the right to update",
        "b: PostgreSQL's settings",
        "b: the daemon's capabilities",
        "what this node and b must have in common",
    ] {
        ensure!(checked.contains(what), "{what} was not checked: {checked}");
    }
    Ok(())
}

/// The updates' right is taken from the pair's key, or given back.
fn updates_of(lab: &crate::harness::Lab, who: &str) -> Outcome {
    let file = lab.dir.join("named/named.conf");
    let text = std::fs::read_to_string(&file)?;
    let (before, rest) = text.split_once("allow-update {").ok_or("no allow-update in named.conf")?;
    let (_, after) = rest.split_once("};").ok_or("no end of allow-update")?;
    std::fs::write(&file, format!("{before}allow-update {{ {who}; }};{after}"))?;
    // It reads its configuration again.
    lab.witness.allow_query("any")
}

#[test]
fn doctor_finds_what_is_broken_on_either_node() {
    in_lab(Options::new("doctor-pair"), |lab| {
        lab.start_pair()?;
        let (a, b) = (&lab.a, &lab.b);
        let sql = |text: &str| a.postgres.sql("postgres", text).map(drop);
        // Its role may not log in to the database that pg_rewind reads from, and its rules name strangers.
        let said = doctor(a, &[])?;
        ensure!(said.code == 0, "advice alone: {:#?}", said.findings);
        ensure!(
            said.has(&["a advice rejoin.login", "host  postgres  replicator  192.0.2.11/32"]),
            "{:#?}",
            said.findings
        );
        ensure!(said.has(&["b advice door.hba", "2001:db8:2::11/128"]), "{:#?}", said.findings);
        for node in [a, b] {
            rules(node, &sound_rules())?;
        }
        wait_until(secs(60), "a sound pair", || is_sound(a).map(|()| true))?;
        let fixed = a.cli(&["doctor", "--fix"])?.expect(0)?;
        ensure!(fixed.err.contains("nothing to fix here"), "it fixed: {}", fixed.err);

        updates_of(lab, "none")?;
        let password = lab.dir.join("replication.pass");
        std::fs::set_permissions(&password, PermissionsExt::from_mode(0o644))?;
        sql("REVOKE EXECUTE ON FUNCTION pg_ls_dir(text, boolean, boolean) FROM replicator")?;
        sql("ALTER ROLE app SET synchronous_commit = off")?;
        let config = std::fs::read_to_string(&b.config)?;
        b.reconfigure("[status]", "[pool]\nsize = 7\n\n[status]")?;
        b.cli(&["maintenance", "on"])?.expect(0)?;
        b.postgres.stop(&b.host, "fast")?;
        b.postgres.append("postgresql.conf", "full_page_writes = off\nmax_wal_senders = 20\n")?;
        b.postgres.start(&b.host)?;
        rules(b, &format!("{}host all all 192.0.2.0/24 md5\n", sound_rules()))?;
        a.wait_in_sync(secs(60))?;

        let broken: [&[&str]; 11] = [
            &["a critical dns.update", "REFUSED", "grant portcullis name db.example.org A AAAA"],
            &["b critical dns.update", "REFUSED", "update-policy"],
            &["a critical secret.mode", "replication.pass", "chmod o-rwx"],
            &["a warning rejoin.grants", "pg_ls_dir", "GRANT EXECUTE ON FUNCTION"],
            &["a warning commit.lowered", "role app", "RESET synchronous_commit"],
            &["warning config.differs", "1 key differs: pool.size", "reload"],
            &["b warning node.maintenance", "maintenance off"],
            &["b critical pg.fsync", "full_page_writes = on"],
            &["warning pg.standby-limits", "max_wal_senders is 10 on a and 20 on b", "max_wal_senders = 20"],
            &["b critical door.hba", "192.0.2.0/24", "take the line out"],
            &["b critical door.knock", "PostgreSQL lets"],
        ];
        for node in [a, b] {
            let mut last = None;
            // BIND reads its configuration when it comes to it.
            wait_until(secs(60), "BIND to refuse", || {
                let said = doctor(node, &[])?;
                let refused = said.has(&["dns.update"]);
                last = Some(said);
                Ok(refused)
            })?;
            let said = last.ok_or("doctor said nothing")?;
            ensure!(said.code == 1, "exit code {}", said.code);
            for parts in broken {
                ensure!(said.has(parts), "on {}: {parts:?} is not among {:#?}", node.name(), said.findings);
            }
            let grants = said.findings.iter().filter(|line| line.contains("rejoin.grants")).count();
            ensure!(grants == 1, "what is in the catalogs of both is told {grants} times");
            let summary = said.report["summary"].as_str().unwrap_or_default();
            for words in ["a failover now might not work (dns.update", "may lose", "past the gate"] {
                ensure!(summary.contains(words), "{words:?} is not in {summary:?}");
            }
        }
        let shown = a.cli(&["doctor"])?.expect(1)?;
        ensure!(shown.out.contains("\nCRITICAL\n") && shown.out.contains("  b door.hba: "), "{}", shown.out);

        // Without a terminal nothing is changed unless it was said beforehand; then only what is harmless.
        let refused = a.cli(&["doctor", "--fix"])?.expect(1)?;
        ensure!(refused.err.contains("nothing was changed"), "{}", refused.err);
        let fixed = a.cli(&["doctor", "--fix", "--yes"])?.expect(1)?;
        for words in ["replication.pass has mode 0640 now", "fixed: the role replicator"] {
            ensure!(fixed.err.contains(words), "{words:?} is not in: {}", fixed.err);
        }
        let left = doctor(a, &[])?;
        ensure!(!left.has(&["secret.mode"]) && !left.has(&["rejoin.grants"]), "not fixed: {:#?}", left.findings);
        ensure!(left.has(&["b critical door.hba"]) && left.has(&["a warning commit.lowered"]), "{:#?}", left.findings);

        updates_of(lab, "key \"portcullis\"")?;
        sql("ALTER ROLE app RESET synchronous_commit")?;
        std::fs::write(&b.config, config)?;
        b.postgres.stop(&b.host, "fast")?;
        b.postgres.append("postgresql.conf", "full_page_writes = on\nmax_wal_senders = 10\n")?;
        b.postgres.start(&b.host)?;
        rules(b, &sound_rules())?;
        b.cli(&["maintenance", "off"])?.expect(0)?;
        a.wait_in_sync(secs(60))?;
        wait_until(secs(60), "a sound pair", || is_sound(a).map(|()| true))?;

        // Without this node's daemon the other one is looked at all the same.
        b.stop_daemon()?;
        let said = doctor(b, &[])?;
        ensure!(said.has(&["b critical daemon.down", "systemctl start portcullis"]), "{:#?}", said.findings);
        ensure!(said.report["checked"].to_string().contains("a: PostgreSQL's settings"), "{}", said.report["checked"]);
        // And from a: b could not be asked, which is said; and it is quick.
        b.host.freeze()?;
        let began = now();
        let said = doctor(a, &[])?;
        let took = now().since(began);
        b.host.thaw()?;
        eprintln!("figure: doctor with a frozen node took {} ms", took.as_millis());
        ensure!(took < secs(30), "doctor took {took:?} with a node that is dead");
        ensure!(said.code == 1 && said.report["unchecked"].to_string().contains("all of b"), "{}", said.report);
        ensure!(said.has(&["peer.un", "b"]), "{:#?}", said.findings);
        Ok(())
    });
}
