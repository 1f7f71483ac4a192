//! C11, no side door: in the recommended setting PostgreSQL lets nobody in but replication, whatever state the node is
//! in; and `doctor` finds each door that is opened.

use crate::ensure;
use crate::harness::Lab;
use crate::harness::config::Options;
use crate::harness::net::connects;
use crate::harness::node::{GATE_PORT, Node};
use crate::harness::postgres::{APP_PASSWORD, HBA, PORT, REPLICATION_PASSWORD};
use crate::harness::sys::{Fail, Outcome, in_netns, never, secs, wait_until};
use crate::harness::witness::Kind;
use crate::in_lab;
use serde_json::Value;

/// How one attempt to reach PostgreSQL without the gate ended.
#[derive(Debug, PartialEq, Eq)]
enum Attempt {
    /// The kernel refused.
    Refused,
    /// PostgreSQL refused before it asked for a password: no rule for this login, or it is stopping or starting.
    Rejected,
    /// Anything else.
    Open(String),
}

/// Attempts made in this process, so that "all of them" has a number.
#[derive(Debug, Default)]
struct Tally {
    tried: usize,
    refused: usize,
    rejected: usize,
}

fn attempt(ns: &str, target: (&str, u16), login: (&str, &str, &str)) -> Outcome<Attempt> {
    let (user, database, password) = login;
    in_netns(ns, || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(async {
            let mut config = tokio_postgres::Config::new();
            config.host(target.0).port(target.1).user(user).dbname(database).password(password);
            config.connect_timeout(secs(10));
            let error = match config.connect(tokio_postgres::NoTls).await {
                Ok(_) => return Ok(Attempt::Open("logged in".to_owned())),
                Err(error) => error,
            };
            if let Some(db) = error.as_db_error() {
                // 57P03: it is stopping or starting, and has not even looked who is there.
                let no_rule = db.code().code() == "28000" && db.message().contains("no pg_hba.conf entry");
                let rejected = no_rule || db.code().code() == "57P03";
                return Ok(if rejected { Attempt::Rejected } else { Attempt::Open(db.message().to_owned()) });
            }
            let cause = std::error::Error::source(&error).and_then(|cause| cause.downcast_ref::<std::io::Error>());
            match cause.map(std::io::Error::kind) {
                // A reset: its postmaster ended between the kernel's answer and its own.
                Some(std::io::ErrorKind::ConnectionRefused | std::io::ErrorKind::ConnectionReset) => {
                    Ok(Attempt::Refused)
                }
                _ => Ok(Attempt::Open(format!("{error}: {cause:?}"))),
            }
        })
    })
}

/// Every login that exists, right passwords included, at both PostgreSQL ports, from the client's host.
fn knock_everywhere(lab: &Lab, tally: &mut Tally, state: &str) -> Outcome {
    let logins = [
        ("app", "app", APP_PASSWORD),
        ("app", "postgres", APP_PASSWORD),
        ("postgres", "postgres", ""),
        ("replicator", "postgres", REPLICATION_PASSWORD),
        ("replicator", "app", REPLICATION_PASSWORD),
        ("nobody", "app", "x"),
    ];
    for node in lab.nodes() {
        for login in logins {
            tally.tried += 1;
            match attempt(lab.client.ns(), (node.address(), PORT), login)? {
                Attempt::Refused => tally.refused += 1,
                Attempt::Rejected => tally.rejected += 1,
                Attempt::Open(how) => {
                    return Err(Fail(format!("a side door on {} ({state}) for {login:?}: {how}", node.name())));
                }
            }
        }
    }
    Ok(())
}

/// What `doctor --json` said of this node: its exit code and its findings as "severity check: what".
fn doctor(node: &Node) -> Outcome<(i32, Vec<String>, Value)> {
    let said = node.cli(&["doctor", "--here", "--json"])?;
    let report: Value = serde_json::from_str(&said.out).map_err(|error| Fail(format!("{error}: {said:?}")))?;
    let word = |finding: &Value, key: &str| finding[key].as_str().unwrap_or_default().to_owned();
    let findings = report["findings"].as_array().cloned().unwrap_or_default();
    for finding in &findings {
        ensure!(!word(finding, "remedy").is_empty(), "a finding without a remedy: {finding}");
    }
    let lines = findings.iter().map(|f| format!("{} {}: {}", word(f, "severity"), word(f, "check"), word(f, "what")));
    Ok((said.code, lines.collect(), report))
}

fn is_healthy(node: &Node) -> Outcome {
    let (code, findings, report) = doctor(node)?;
    let bad: Vec<&String> = findings.iter().filter(|line| !line.starts_with("advice ")).collect();
    ensure!(code == 0 && bad.is_empty(), "doctor on {} ends with {code}: {bad:?}", node.name());
    let checked = report["checked"].to_string();
    for what in ["pg_hba.conf", "listen_addresses", "right to update", "clock", "5432 (here)", "pg_cancel_backend"] {
        ensure!(checked.contains(what), "doctor on {} did not check {what}: {checked}", node.name());
    }
    Ok(())
}

#[test]
fn no_side_door_in_any_state() {
    in_lab(Options::with_vip("sidedoors"), |lab| {
        lab.start_pair()?;
        let (a, b) = (&lab.a, &lab.b);
        let mut tally = Tally::default();
        is_healthy(a)?;
        is_healthy(b)?;
        knock_everywhere(lab, &mut tally, "a active, b passive")?;
        let at_vip = attempt(lab.client.ns(), (crate::harness::net::VIP, PORT), ("app", "app", APP_PASSWORD))?;
        ensure!(at_vip == Attempt::Refused, "PostgreSQL listens on the VIP: {at_vip:?}");
        tally.tried += 1;
        tally.refused += 1;

        // Neither the witness nor the peer: a lapses.
        lab.witness.host.isolate()?;
        lab.switch.cut_port_between(&a.host.plug, &b.host.plug, crate::harness::node::PEER_PORT)?;
        // The VIP's lifetime is in whole seconds and may run out before the lease: "shut" until then.
        let lapses = || Ok(a.gate_state()? == "lapsed" && a.status()?["gate"]["lease_remaining_ms"] == 0);
        wait_until(secs(60), "a to lapse", lapses)?;
        for _ in 0..5 {
            knock_everywhere(lab, &mut tally, "a lapsed")?;
        }
        ensure!(!a.gate_is_open()?, "a did not stay lapsed over the attempts");
        lab.switch.heal()?;
        lab.witness.host.rejoin_network()?;
        a.wait_active(secs(60))?;
        a.wait_in_sync(secs(60))?;

        a.cli(&["fence"])?.expect(0)?;
        a.wait_role("fenced", secs(60))?;
        // While it is demoted, too: before, between and after.
        never(secs(3), "a door", || knock_everywhere(lab, &mut tally, "a fenced").map(|()| false))?;
        wait_until(secs(60), "a demoted", || a.postgres.is_read_only())?;
        for _ in 0..5 {
            knock_everywhere(lab, &mut tally, "a fenced and demoted")?;
        }
        let (code, findings, _) = doctor(a)?;
        ensure!(code == 1 && findings.iter().any(|f| f.contains("fenced")), "doctor on a fenced node: {findings:?}");
        b.cli(&["promote", "--yes"])?.expect(0)?;
        b.wait_active(secs(60))?;
        for _ in 0..5 {
            knock_everywhere(lab, &mut tally, "b active, a fenced")?;
        }
        ensure!(tally.refused + tally.rejected == tally.tried, "{tally:?}");
        eprintln!(
            "figure: C11 {} attempts past the gate in 5 states: {} refused by the kernel, {} rejected by pg_hba, \
             0 open",
            tally.tried, tally.refused, tally.rejected
        );
        Ok(())
    });
}

const DROP_SLOT: &str = "SELECT pg_drop_replication_slot('portcullis_b')";

/// Opens one door, wants a finding that names it, and closes it again.
struct DoorTest<'a> {
    name: &'a str,
    open: &'a dyn Fn() -> Outcome,
    close: &'a dyn Fn() -> Outcome,
    /// Parts of one finding, its level first.
    finding: &'a [&'a str],
}

#[test]
fn doctor_finds_each_side_door() {
    // The embedded witness here, BIND in the test above: both answer the update that must fail as they should.
    in_lab(Options { witness: Kind::Embedded, ..Options::new("doctor") }, |lab| {
        lab.start_pair()?;
        let (a, b) = (&lab.a, &lab.b);
        is_healthy(a)?;
        let hba = a.postgres.data_dir.join("pg_hba.conf");
        let sql = |text: &str| a.postgres.sql("app", text).map(drop);
        let rules = |lines: &str| -> Outcome {
            std::fs::write(&hba, format!("{HBA}{lines}\n"))?;
            sql("SELECT pg_reload_conf()")
        };
        let no_rules = || rules("");
        let on = |value: &str| sql(&format!("ALTER SYSTEM SET {value}")).and_then(|()| sql("SELECT pg_reload_conf()"));
        let reset = |name: &str| on(&format!("{name} TO DEFAULT"));
        let key = lab.dir.join("cluster.key");
        let mode = |bits: u32| -> Outcome {
            Ok(std::fs::set_permissions(&key, std::os::unix::fs::PermissionsExt::from_mode(bits))?)
        };
        let tsig = lab.dir.join("tsig.key");
        let tests = [
            DoorTest {
                name: "everybody from everywhere",
                open: &|| rules("host all all 0.0.0.0/0 scram-sha-256"),
                close: &no_rules,
                finding: &["critical", "lets all into all from everywhere", "past the gate"],
            },
            DoorTest {
                name: "one role from one network",
                open: &|| rules("host app app 192.0.2.0/24 scram-sha-256"),
                close: &no_rules,
                finding: &["critical", "lets app into app from 192.0.2.0/24"],
            },
            DoorTest {
                name: "the same, found by knocking",
                open: &|| rules("host app app 192.0.2.0/24 scram-sha-256"),
                close: &no_rules,
                finding: &["critical", "PostgreSQL lets app log in to app at 192.0.2.11:5432"],
            },
            DoorTest {
                name: "replication for everybody",
                open: &|| rules("host replication all 0.0.0.0/0 trust"),
                close: &no_rules,
                finding: &["critical", "without a password"],
            },
            DoorTest {
                name: "a file that was not reloaded",
                open: &|| {
                    std::fs::write(&hba, format!("{HBA}host all all all md5\n"))?;
                    // PostgreSQL tells whole seconds: within the second of the last reload nobody could see it.
                    let later = std::time::SystemTime::now() + secs(2);
                    Ok(std::fs::File::options().write(true).open(&hba)?.set_modified(later)?)
                },
                close: &no_rules,
                finding: &["warning", "was changed after PostgreSQL read it last"],
            },
            DoorTest {
                name: "a role that may cancel",
                open: &|| sql("GRANT EXECUTE ON FUNCTION pg_cancel_backend(integer) TO app"),
                close: &|| sql("REVOKE EXECUTE ON FUNCTION pg_cancel_backend(integer) FROM app"),
                finding: &["warning", "in app, app may execute pg_cancel_backend"],
            },
            DoorTest {
                name: "a role that does not wait",
                open: &|| sql("ALTER ROLE app SET synchronous_commit = off"),
                close: &|| sql("ALTER ROLE app RESET synchronous_commit"),
                finding: &["warning", "role app commits with synchronous_commit = off"],
            },
            DoorTest {
                name: "a role that waits for less, in one database",
                open: &|| sql("ALTER ROLE app IN DATABASE app SET synchronous_commit = remote_write"),
                close: &|| sql("ALTER ROLE app IN DATABASE app RESET synchronous_commit"),
                finding: &["warning", "role app in app commits with synchronous_commit = remote_write"],
            },
            DoorTest {
                name: "nobody waits",
                open: &|| on("synchronous_commit = local"),
                close: &|| reset("synchronous_commit"),
                finding: &["critical", "synchronous_commit is local"],
            },
            DoorTest {
                name: "an unlogged table",
                open: &|| sql("CREATE UNLOGGED TABLE scratch (n int)"),
                close: &|| sql("DROP TABLE scratch"),
                finding: &["advice", "1 unlogged tables in app"],
            },
            DoorTest {
                name: "a secret open to others",
                open: &|| mode(0o644),
                close: &|| mode(0o600),
                finding: &["critical", "cluster.key"],
            },
            DoorTest {
                name: "a lost witness",
                open: &|| lab.witness.host.isolate().map(drop),
                close: &|| lab.witness.host.rejoin_network(),
                finding: &["critical", "192.0.2.53:53"],
            },
            DoorTest {
                name: "another key than the witness has",
                open: &|| Ok(std::fs::write(&tsig, "d3Jvbmcgd3Jvbmcgd3Jvbmcgd3Jvbmcgd3Jvbmc=\n")?),
                close: &|| Ok(std::fs::write(&tsig, format!("{}\n", lab.witness.key()))?),
                finding: &["critical dns.key", "192.0.2.53:53"],
            },
            DoorTest {
                name: "a slot that is gone",
                open: &|| {
                    b.postgres.stop(&b.host, "fast")?;
                    wait_until(secs(60), "the slot free", || sql(DROP_SLOT).map(|()| true)).map(drop)
                },
                close: &|| {
                    sql("SELECT pg_create_physical_replication_slot('portcullis_b', true)")?;
                    b.postgres.start(&b.host)?;
                    a.wait_in_sync(secs(60)).map(drop)
                },
                finding: &["warning", "the slot portcullis_b is not there"],
            },
        ];
        for DoorTest { name, open, close, finding } in &tests {
            open()?;
            let (code, findings, _) = doctor(a)?;
            close()?;
            let found = findings.iter().any(|line| finding.iter().all(|part| line.contains(part)));
            ensure!(found, "{name}: doctor did not find it, but {findings:?}");
            let expected = i32::from(finding[0] != "advice");
            ensure!(code == expected, "{name}: exit code {code}, not {expected}: {findings:?}");
        }
        wait_until(secs(60), "doctor content again", || is_healthy(a).map(|()| true))?;

        // Something else stands where clients of the passive node would knock.
        let gate = GATE_PORT.to_string();
        let squatter = b.host.spawn(&lab.dir.join("squatter.log"), &[], &["python3", "-m", "http.server", &gate])?;
        wait_until(secs(60), "something on the gate's port", || connects(lab.client.ns(), b.address(), GATE_PORT))?;
        let (code, findings, _) = doctor(b)?;
        let found = findings.iter().any(|f| f.starts_with("critical") && f.contains("something takes connections"));
        ensure!(code == 1 && found, "doctor does not see what holds the gate's port: {findings:?}");
        crate::harness::host::send(squatter, rustix::process::Signal::KILL)?;

        // From b, a door of a: only knocking shows it.
        rules("host all all 192.0.2.12/32 scram-sha-256")?;
        let (_, findings, _) = doctor(b)?;
        ensure!(
            findings.iter().any(|f| f.starts_with("critical") && f.contains("a's PostgreSQL lets")),
            "doctor on b does not see a's door: {findings:?}"
        );
        no_rules()?;

        // The two nodes are not configured alike.
        b.stop_daemon()?;
        let text = std::fs::read_to_string(&b.config)?;
        std::fs::write(&b.config, text.replace("margin = \"200ms\"", "margin = \"300ms\""))?;
        b.start_daemon()?;
        wait_until(secs(60), "the difference to be found", || {
            let found = doctor(a)?.1;
            let found = found.iter().any(|f| f.starts_with("critical") && f.contains("b runs another configuration"));
            Ok(found)
        })?;
        b.stop_daemon()?;
        std::fs::write(&b.config, text)?;
        b.start_daemon()?;
        wait_until(secs(60), "doctor content with both nodes alike", || is_healthy(a).map(|()| true))?;

        // Wide listening is in force only after a restart; the lines to write are in the report.
        on("listen_addresses = '*'")?;
        let (_, findings, _) = doctor(a)?;
        ensure!(findings.iter().any(|f| f.contains("the old value is in force")), "{findings:?}");
        rules("host all all all scram-sha-256")?;
        a.postgres.stop(&a.host, "fast")?;
        a.postgres.start(&a.host)?;
        a.wait_active(secs(60))?;
        let said = a.cli(&["doctor", "--here"])?.expect(1)?.out;
        for part in ["listens on every address", "listen_addresses = 'localhost, 192.0.2.11'", "lets all into all"] {
            ensure!(said.contains(part), "{part} is missing in:\n{said}");
        }
        let line = "host  replication  replicator  192.0.2.12/32  scram-sha-256";
        ensure!(said.lines().any(|shown| shown.trim() == line), "the line to write is missing in:\n{said}");
        no_rules()?;

        // Without a daemon it does what it can and says what it could not.
        a.stop_daemon()?;
        let (code, findings, report) = doctor(a)?;
        ensure!(code == 1 && findings.iter().any(|f| f.starts_with("critical daemon")), "{code}: {findings:?}");
        ensure!(findings.iter().any(|f| f.contains("listens on every address")), "{findings:?}");
        ensure!(report["unchecked"].to_string().contains("peer"), "{report}");
        let started = crate::harness::sys::now();
        a.postgres.stop(&a.host, "fast")?;
        let (code, findings, _) = doctor(a)?;
        ensure!(code == 1 && findings.iter().any(|f| f.contains("cannot be asked")), "{code}: {findings:?}");
        ensure!(crate::harness::sys::now().since(started) < secs(60), "doctor without anything took too long");
        Ok(())
    });
}
