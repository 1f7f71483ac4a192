//! Rejoin as a whole, on a node whose configuration lies apart from its data directory as Debian's does: made from
//! nothing, refused where it must be, rewound with a kill -9 at every line it says, and nothing lost by it.

use crate::ensure;
use crate::harness::Lab;
use crate::harness::config::Options;
use crate::harness::node::Node;
use crate::harness::postgres::{HBA, PORT, SYSTEM_USER, Template};
use crate::harness::sys::{Fail, Outcome, ms, secs};
use crate::in_lab;
use rustix::process::Signal;
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};

/// For pg_rewind, which reads files by SQL (docs/operations.md).
const REWIND_HBA: &str = "\
host    postgres      replicator   192.0.2.11/32  scram-sha-256
host    postgres      replicator   192.0.2.12/32  scram-sha-256
";
/// More lines than any rejoin says.
const LINES_MAX: usize = 80;

/// `/etc/postgresql/VERSION/main` of this node alone, with what lay in its data directory.
fn debian_etc(lab: &Lab, node: &Node) -> Outcome<PathBuf> {
    let data = &node.postgres.data_dir;
    let version = fs::read_to_string(data.join("PG_VERSION"))?.trim().to_owned();
    let etc = lab.dir.join(format!("{}-etc", node.name()));
    let main = etc.join(&version).join("main");
    fs::create_dir_all(&main)?;
    let conf = fs::read_to_string(data.join("postgresql.conf"))?;
    let own = format!(
        "{conf}data_directory = '{}'\nhba_file = '{main}/pg_hba.conf'\nident_file = '{main}/pg_ident.conf'\n",
        data.display(),
        main = main_inside(&version)
    );
    fs::write(main.join("postgresql.conf"), own)?;
    fs::write(main.join("pg_hba.conf"), format!("{REWIND_HBA}{HBA}"))?;
    fs::write(main.join("pg_ident.conf"), "")?;
    Ok(etc)
}

fn main_inside(version: &str) -> String {
    format!("/etc/postgresql/{version}/main")
}

/// Until the machine loses power.
fn mount_etc(node: &Node, etc: &Path) -> Outcome {
    node.host.exec("", &["mount", "--bind", &etc.display().to_string(), "/etc/postgresql"]).map(drop)
}

/// Everything beside the data directory whose name goes on with `infix`.
fn beside(node: &Node, infix: &str) -> Vec<PathBuf> {
    let entries = fs::read_dir(node.dir.join("pg")).into_iter().flatten().flatten();
    let mut found: Vec<PathBuf> = entries.map(|entry| entry.path()).collect();
    found.retain(|path| path.to_string_lossy().contains(infix));
    found
}

fn json_lines(text: &str) -> Vec<Value> {
    text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
}

#[test]
fn a_node_is_made_from_nothing_refused_rewound_and_killed_at_every_line() {
    in_lab(Options::new("rejoined"), |lab| {
        let (a, b) = (&lab.a, &lab.b);
        lab.start_servers()?;
        a.postgres.prepend("pg_hba.conf", REWIND_HBA)?;
        a.postgres.sql("postgres", "SELECT pg_reload_conf()")?;
        a.postgres.sql("app", "CREATE TABLE lonely (i int)")?;
        b.postgres.stop(&b.host, "fast")?;
        let etc = debian_etc(lab, b)?;
        mount_etc(b, &etc)?;
        fs::remove_dir_all(&b.postgres.data_dir)?;
        b.start_daemon()?;
        a.start_daemon()?;
        a.wait_active(secs(60))?;
        made_from_nothing(lab)?;
        refused(lab)?;
        diverged(lab, &etc)?;
        rewound_at_last(lab)
    });
}

/// The first standby: one PostgreSQL, two configurations, one command.
fn made_from_nothing(lab: &Lab) -> Outcome {
    let (a, b) = (&lab.a, &lab.b);
    b.wait_peer()?;
    let rehearsed = b.cli(&["rejoin", "b", "--dry-run"])?.expect(0)?;
    ensure!(rehearsed.out.contains("would clone a: there is no cluster in "), "dry run: {}", rehearsed.out);
    ensure!(!b.postgres.data_dir.exists(), "a dry run made something");
    let said = b.cli(&["rejoin", "b", "--json"])?.expect(0)?;
    let lines = json_lines(&said.out);
    let figures: Vec<&Value> = lines.iter().filter(|line| line["data"]["total_bytes"].as_u64() > Some(0)).collect();
    ensure!(!figures.is_empty(), "no progress as JSON: {}", said.out);
    for key in ["done_bytes", "total_bytes", "rate_bytes_per_s"] {
        ensure!(figures.iter().all(|line| line["data"][key].is_u64()), "{key} is missing: {}", said.out);
    }
    ensure!(figures.iter().all(|line| line["data"].get("left_s").is_some()), "left_s is missing: {}", said.out);
    ensure!(!said.out.contains("100 %"), "all of it, before the end: {}", said.out);
    ensure!(lines.last().is_some_and(|line| line["exit"] == 0), "the last line: {:?}", lines.last());
    a.wait_in_sync(secs(60))?;
    let version = fs::read_to_string(b.postgres.data_dir.join("PG_VERSION"))?.trim().to_owned();
    let config = b.postgres.sql("postgres", "SHOW config_file")?;
    ensure!(config == format!("{}/postgresql.conf", main_inside(&version)), "it runs with {config}");
    Ok(())
}

/// Refused before anything is touched, the record included.
fn refused(lab: &Lab) -> Outcome {
    let (a, b) = (&lab.a, &lab.b);
    let wrong = b.cli(&["rejoin", "a"])?.expect(3)?;
    for (node, words) in [("a", "the wrong direction"), ("nobody", "there is no node named nobody; the nodes are a, b")]
    {
        for side in [a, b] {
            let refused = side.cli(&["rejoin", node])?.expect(3)?;
            let said = refused.err.trim();
            ensure!(said.contains(words) && said.lines().count() == 1, "{} said: {said}", side.name());
        }
    }
    b.postgres.stop(&b.host, "fast")?;
    let (data, mine) = (&b.postgres.data_dir, b.dir.join("pg/mine"));
    fs::rename(data, &mine)?;
    let initdb = Template::once()?.bin_dir.join("initdb").display().to_string();
    b.host.exec(SYSTEM_USER, &[&initdb, "--no-sync", "-D", &data.display().to_string()])?;
    // The loss of its standby has been recorded.
    a.wait_status(secs(60), "to serve alone", |status| {
        status.pointer("/replication/in_sync") == Some(&Value::Bool(false))
    })?;
    let marker = lab.witness.marker()?;
    let foreign = a.cli(&["rejoin", "b"])?.expect(3)?;
    ensure!(format!("{}{}", foreign.out, foreign.err).contains("another cluster"), "{}{}", foreign.out, foreign.err);
    ensure!(lab.witness.marker()? == marker, "a refused rejoin changed the record");
    ensure!(data.join("PG_VERSION").exists() && beside(b, ".set-aside-").is_empty(), "it touched the cluster");
    fs::remove_dir_all(data)?;
    fs::rename(&mine, data)?;
    // A disk that is too small, where nothing is yet.
    let disk = b.dir.join("pg").display().to_string();
    b.host.exec("", &["mount", "-t", "tmpfs", "-o", "size=64m,mode=777", "none", &disk])?;
    for arguments in [&["rejoin", "b", "--dry-run"][..], &["rejoin", "b"]] {
        let small = b.cli(arguments)?.expect(3)?;
        let said = format!("{}{}", small.out, small.err);
        ensure!(said.contains(" has 64 MiB free, beside the old directory the copy needs "), "too small: {said}");
    }
    b.host.exec("", &["umount", &disk])?;
    ensure!(lab.witness.marker()? == marker, "a rejoin without room changed the record");
    let followed = b.cli(&["rejoin", "b"])?.expect(0)?;
    ensure!(followed.out.contains("no rewind needed"), "it had only been stopped: {}", followed.out);
    ensure!(beside(b, ".set-aside-").is_empty(), "it was cloned");
    a.wait_in_sync(secs(60))?;
    eprintln!("rejoined: wrong direction: {}; foreign: {}", wrong.err.trim(), foreign.err.trim());
    Ok(())
}

/// b becomes active, commits three transactions that nobody else gets, and loses power; a is promoted.
fn diverged(lab: &Lab, etc: &Path) -> Outcome {
    let (a, b) = (&lab.a, &lab.b);
    b.cli(&["promote", "--yes"])?.expect(0)?;
    b.wait_active(secs(60))?;
    b.wait_in_sync(secs(60))?;
    fs::write(b.postgres.data_dir.join("precious.txt"), "b's own")?;
    lab.switch.cut_port_between(&a.host.plug, &b.host.plug, PORT)?;
    for i in [1, 2, 3] {
        b.postgres.sql("app", &format!("SET synchronous_commit = local; INSERT INTO lonely VALUES ({i})"))?;
    }
    b.power_off()?;
    lab.switch.heal()?;
    a.cli(&["promote", "--yes", "--accept-data-loss"])?.expect(0)?;
    a.wait_active(secs(60))?;
    a.postgres.sql("app", "INSERT INTO lonely VALUES (100)")?;
    b.host.power_on()?;
    mount_etc(b, etc)?;
    b.start_daemon()?;
    b.wait_role("fenced", secs(60)).map(drop)
}

/// The same command again and again, its daemon killed at the first line it says, then at the second, ...; every other
/// time the tool at work as well.
fn rewound_at_last(lab: &Lab) -> Outcome {
    let (a, b) = (&lab.a, &lab.b);
    let mut said_by_then = Vec::new();
    for victim in 0..LINES_MAX {
        b.wait_peer()?;
        let (mut lines, mut killed) = (0, None);
        let said = b.cli_live(&["rejoin", "b"], |_| {
            if lines == victim {
                killed = Some(b.kill_daemon(Signal::KILL).map(drop).and_then(|()| {
                    let tools = ["pg_rewind", "pg_basebackup"].map(|tool| b.host.named(tool));
                    for pid in tools.into_iter().filter(|_| victim % 2 == 1).collect::<Outcome<Vec<_>>>()?.concat() {
                        let _ended_meanwhile = crate::harness::host::send(pid, Signal::KILL);
                    }
                    Ok(())
                }));
            }
            lines += 1;
        })?;
        said_by_then.extend(said.out.lines().map(|line| format!("{victim}: {line}")));
        let whole = |dir: &Path| dir.join("PG_VERSION").exists() && dir.join("global/pg_control").exists();
        let alive = beside(b, "data").iter().any(|dir| whole(dir));
        ensure!(alive, "killed at line {victim}: no data directory is left: {said_by_then:#?}");
        match killed {
            Some(done) => done?,
            None => {
                said.expect(0)?;
                a.wait_in_sync(secs(60))?;
                return nothing_is_lost(lab, victim, &said_by_then);
            }
        }
        b.start_daemon()?;
        ensure!(!b.gate_is_open()?, "it serves after line {victim}");
    }
    Err(Fail(format!("it never ends: {said_by_then:#?}")))
}

fn nothing_is_lost(lab: &Lab, killed: usize, said: &[String]) -> Outcome {
    let (a, b) = (&lab.a, &lab.b);
    let rows = |node: &Node| node.postgres.sql("app", "SELECT string_agg(i::text, ',' ORDER BY i) FROM lonely");
    ensure!(rows(a)? == "100" && rows(b)? == "100", "rows: {} and {}", rows(a)?, rows(b)?);
    ensure!(killed >= 8, "killed only {killed} times: {said:#?}");
    let kept = beside(b, ".diverged-");
    ensure!(!kept.is_empty(), "nothing was kept of what b had alone: {said:#?}");
    let report: Value = serde_json::from_slice(&fs::read(kept[0].join("report.json"))?)?;
    ensure!(report["diverged_transactions"] == 3, "the report: {report}");
    let words = "3 transactions were committed here alone since ";
    ensure!(said.iter().any(|line| line.contains(words)), "nobody was told: {said:#?}");
    let events = b.cli(&["events", "--json"])?.expect(0)?;
    ensure!(events.out.contains(words), "no event tells of it: {}", events.out);
    let data = b.postgres.data_dir.clone();
    let homes = kept.iter().map(|dir| dir.join("own")).chain(beside(b, ".set-aside-")).chain([data]);
    let precious = homes.filter(|dir| dir.join("precious.txt").exists()).count();
    ensure!(precious > 0, "a file of b's own is gone: {said:#?}");
    // Once more, whole: it has nothing to do but to follow.
    let begun = crate::harness::sys::now();
    b.rejoin("b")?;
    a.wait_in_sync(secs(60))?;
    eprintln!(
        "rejoined: killed at each of {killed} lines; {} directories set aside, {} kept ends; again: {} ms",
        beside(b, ".set-aside-").len(),
        kept.len(),
        ms(begun, crate::harness::sys::now())
    );
    Ok(())
}

/// The same folder of the machine's disk under one name on both nodes, as two machines have it.
fn mount_spaces(lab: &Lab, node: &Node) -> Outcome<PathBuf> {
    let (own, shared) = (node.dir.join("spaces"), lab.dir.join("spaces"));
    for dir in [&own, &shared] {
        fs::create_dir_all(dir)?;
        Template::once()?.give(dir, 0o755)?;
    }
    node.host.exec("", &["mount", "--bind", &own.display().to_string(), &shared.display().to_string()])?;
    Ok(own)
}

#[test]
fn tablespaces_are_cloned_to_their_places_and_old_ones_set_aside() {
    in_lab(Options::new("spaces"), |lab| {
        let (a, b) = (&lab.a, &lab.b);
        lab.start_servers()?;
        b.postgres.stop(&b.host, "fast")?;
        fs::remove_dir_all(&b.postgres.data_dir)?;
        let own = mount_spaces(lab, b)?;
        let on_a = mount_spaces(lab, a)?;
        a.postgres.stop(&a.host, "fast")?;
        a.postgres.start(&a.host)?;
        let place = lab.dir.join("spaces/one");
        a.host.exec(SYSTEM_USER, &["mkdir", &place.display().to_string()])?;
        a.postgres.sql("app", &format!("CREATE TABLESPACE one LOCATION '{}'", place.display()))?;
        a.postgres.sql("app", "CREATE TABLE far (i int) TABLESPACE one")?;
        a.postgres.sql("app", "INSERT INTO far VALUES (1)")?;
        b.start_daemon()?;
        a.start_daemon()?;
        a.wait_active(secs(60))?;
        b.rejoin("b")?;
        a.wait_in_sync(secs(60))?;
        ensure!(on_a.join("one").exists() && own.join("one").exists(), "both nodes have their own");
        ensure!(b.postgres.sql("app", "SELECT i FROM far")? == "1", "the row in the tablespace");

        // Nothing but a clone can help here; the old tablespace stays with the directory that it belongs to.
        b.postgres.stop(&b.host, "fast")?;
        fs::remove_file(b.postgres.data_dir.join("global/pg_control"))?;
        a.postgres.sql("app", "SET synchronous_commit = local; INSERT INTO far VALUES (2)")?;
        let said = b.rejoin("b")?;
        a.wait_in_sync(secs(60))?;
        ensure!(said.out.contains("will clone a: "), "{}", said.out);
        ensure!(b.postgres.sql("app", "SELECT sum(i) FROM far")? == "3", "the rows in the tablespace");
        let aside = beside(b, ".set-aside-");
        ensure!(aside.len() == 1, "set aside: {aside:?}");
        let mut links = fs::read_dir(aside[0].join("pg_tblspc"))?.flatten();
        let link = fs::read_link(links.next().ok_or("no link")?.path())?;
        let name = link.file_name().unwrap_or_default().to_string_lossy().into_owned();
        ensure!(name.starts_with("one.set-aside-") && own.join(&name).exists(), "its link leads to {}", link.display());
        let link = fs::read_dir(b.postgres.data_dir.join("pg_tblspc"))?.flatten().next().ok_or("no link")?;
        ensure!(fs::read_link(link.path())? == place, "the clone's link leads elsewhere");
        Ok(())
    });
}
