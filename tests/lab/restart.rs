//! A restart of the active node's daemon: how long clients are without the service, without a service manager and under
//! a real systemd, which keeps the gate's sockets meanwhile; and the commands for one database, and a reload, as people
//! type them.

use crate::claims::ON_THE_WIRE;
use crate::ensure;
use crate::harness::client::{Target, Writer, WriterLog, WriterOptions, lost};
use crate::harness::config::Options;
use crate::harness::node::Node;
use crate::harness::postgres::APP_PASSWORD;
use crate::harness::sys::{Fail, Outcome, in_netns, millis, ms, never, now, secs, wait_until};
use crate::{alone_in_lab, in_lab};
use rustix::process::Signal;
use serde_json::json;
use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::io::{ErrorKind, Write};
use std::net::{SocketAddr, TcpStream};

const ROUNDS: usize = 5;

#[test]
fn a_restart_is_over_soon_and_loses_nothing() {
    alone_in_lab(Options::new("restart"), |lab| {
        lab.start_pair()?;
        let (a, client) = (&lab.a, lab.client.ns());
        let gate = a.gate()?;
        let epoch = a.epoch()?;
        let options = WriterOptions { target: Target::Always(gate), ..WriterOptions::once(1, gate) };
        let writer = Writer::start_flowing(client, options)?;
        let mut told = Vec::new();
        for _ in 0..ROUNDS {
            writer.wait_acks(50, secs(60))?;
            let asked = now();
            a.stop_daemon()?;
            let ended = now();
            a.start_daemon()?;
            let back = writer.wait_ack_via(gate, ended, secs(60))?;
            let log = writer.log();
            let last = log.acks.iter().rev().find(|ack| ack.at < ended).map_or(asked, |ack| ack.at);
            told.push((ms(asked, ended), ms(ended, back), ms(last, back)));
            a.wait_in_sync(secs(60))?;
        }
        ensure!(a.epoch()? == epoch, "a restart changed the epoch");
        let log = writer.finish();
        let cut = log.errors.iter().filter(|(_, text)| text.contains("57P01")).count();
        ensure!(cut >= ROUNDS, "not every restart told the session: {:?}", log.errors);
        let missing = lost(&log, 1, &a.postgres)?;
        ensure!(missing.is_empty(), "acknowledged but missing: {missing:?}");
        eprintln!("restart: (SIGTERM to end, end to first commit, without commits) in ms: {told:?}");
        let worst = told.iter().map(|(_, _, without)| *without).max().unwrap_or_default();
        ensure!(worst < 20_000, "clients were without the service for {worst} ms");
        Ok(())
    });
}

/// Clients of the restart under systemd, and how often it is done.
const WRITERS: u32 = 10;
const POOL: &str = "[pool]\nmode = \"transaction\"\nsize = 4\n";
const SHIPPED: &str = include_str!("../../systemd/portcullis.service");
const UNIT: &str = "portcullis.service";

/// A unit with those lines of the shipped one that are about its user, its end and its sockets. Without capabilities,
/// which a container does not have to give and a pair without a VIP does not need.
fn write_unit(node: &Node) -> Outcome {
    let line = node.command_line(&["daemon"]).join(" ");
    let words = [
        "StartLimitIntervalSec=",
        "Type=",
        "User=",
        "Group=",
        "KillMode=",
        "TimeoutStopSec=",
        "FileDescriptorStoreMax=",
    ];
    let kept: Vec<&str> = SHIPPED.lines().filter(|line| words.iter().any(|word| line.starts_with(word))).collect();
    ensure!(kept.len() == words.len(), "the shipped unit has lost a line: {kept:?}");
    // One of the section before the other.
    let (limit, service) = kept.split_at(1);
    let (log, limit, service) = (node.log.display(), limit.join("\n"), service.join("\n"));
    let unit = format!("[Unit]\n{limit}\n[Service]\nExecStart={line}\nStandardError=append:{log}\n{service}\n");
    let path = format!("/etc/systemd/system/{UNIT}");
    node.host.exec("", &["sh", "-c", r#"printf %s "$2" >"$1""#, "write", &path, &unit])?;
    node.host.exec("", &["systemctl", "daemon-reload"]).map(drop)
}

fn systemctl(node: &Node, verb: &str) -> Outcome {
    node.host.exec("", &["systemctl", verb, UNIT]).map(drop)
}

/// Whether the kernel refuses a connection, tried from where the clients are.
fn is_refused(client: &str, gate: SocketAddr) -> Outcome<bool> {
    in_netns(client, || match TcpStream::connect_timeout(&gate, secs(2)) {
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => Ok(true),
        Err(error) => Err(Fail(error.to_string())),
        Ok(_) => Ok(false),
    })
}

/// What clients heard, and how often: the words of the gate without what differs, or of the library.
fn heard(logs: &[WriterLog]) -> BTreeMap<String, usize> {
    let mut heard = BTreeMap::new();
    for (_, text) in logs.iter().flat_map(|log| &log.errors) {
        *heard.entry(text.clone()).or_default() += 1;
    }
    heard
}

#[test]
fn under_systemd_a_restart_refuses_nobody_and_a_stop_refuses_at_once() {
    alone_in_lab(Options { systemd: true, extra: POOL, ..Options::new("restartsystemd") }, |lab| {
        lab.start_servers()?;
        let (a, b, client) = (&lab.a, &lab.b, lab.client.ns());
        // What is measured shall not be ten clients of a debug build that reckon their proofs at once.
        std::fs::write(lab.dir.join("hba.conf"), "host all app all trust\n")?;
        let rules = a.postgres.data_dir.join("pg_hba.conf");
        let text = std::fs::read_to_string(&rules)?;
        std::fs::write(&rules, format!("local all app trust\n{text}"))?;
        a.postgres.sql("postgres", "SELECT pg_reload_conf()")?;
        write_unit(a)?;
        b.start_daemon()?;
        systemctl(a, "start")?;
        a.wait_active(secs(20))?;
        a.wait_in_sync(secs(20))?;
        let gate = a.gate()?;
        let start = |id| {
            let options = WriterOptions { target: Target::Always(gate), ..WriterOptions::once(id, gate) };
            Writer::start_flowing(client, options)
        };
        let writers = (1..=WRITERS).map(start).collect::<Result<Vec<_>, _>>()?;
        let mut told = Vec::new();
        for _ in 0..ROUNDS {
            for writer in &writers {
                writer.wait_acks(30, secs(20))?;
            }
            let asked = now();
            systemctl(a, "restart")?;
            let ended = now();
            let mut longest = 0;
            for writer in &writers {
                writer.wait_ack_via(gate, ended, secs(20))?;
                let log = writer.log();
                let acks: Vec<_> = log.acks.iter().map(|ack| ack.at).filter(|at| *at + secs(5) > asked).collect();
                let gaps = acks.windows(2).filter(|pair| pair[1] > asked).map(|pair| ms(pair[0], pair[1]));
                longest = longest.max(gaps.max().unwrap_or_default());
            }
            // All clients together: when did nobody commit?
            let mut all: Vec<_> = writers.iter().flat_map(|writer| writer.log().acks).map(|ack| ack.at).collect();
            all.sort_unstable();
            let nobody = all.windows(2).filter(|pair| pair[1] > asked).map(|pair| ms(pair[0], pair[1])).max();
            told.push((ms(asked, ended), nobody.unwrap_or_default(), longest));
            a.wait_in_sync(secs(20))?;
            let kept = a.host.exec("", &["systemctl", "show", "--value", "--property=NFileDescriptorStore", UNIT])?;
            ensure!(kept.trim() == "0", "systemd holds {} sockets of a daemon that runs", kept.trim());
        }
        let logs: Vec<_> = writers.iter().map(Writer::log).collect();
        let heard = heard(&logs);
        eprintln!("figure: systemd: (systemctl restart, nobody commits, longest of a client) ms: {told:?}");
        eprintln!("restart under systemd: what {WRITERS} clients heard in {ROUNDS} restarts: {heard:#?}");
        // The gate's own words, or a client's patience on a slow machine; never a connection not made, or broken.
        let fine =
            |text: &String| ["57P01", "57P03", "no session at", "no answer"].iter().any(|word| text.contains(word));
        ensure!(heard.keys().all(fine), "connections were refused or broken: {heard:?}");
        let worst = told.iter().map(|(.., longest)| *longest).max().unwrap_or_default();
        ensure!(worst < 5000, "a client was without the service for {worst} ms");

        // A gate that is cut refuses, although its socket came from systemd.
        a.cli(&["fence"])?.expect(0)?;
        wait_until(secs(2), "a fenced gate to refuse", || is_refused(client, gate))?;
        a.cli(&["unfence"])?.expect(0)?;
        for writer in &writers {
            writer.wait_ack_via(gate, now(), secs(20))?;
        }

        // Who does not end its transaction is ended after a while; who does, has its answer.
        let psql = |sql: &str| {
            let address = format!("host={} port={} user=app dbname=app", gate.ip(), gate.port());
            let line = format!("PGPASSWORD={APP_PASSWORD} exec psql -XAtq '{address}' -c \"{sql}\" 2>&1");
            lab.client.exec_live(secs(20), &["sh", "-c", &line], |_| {})
        };
        let short = "INSERT INTO acks VALUES (99, 1); SELECT pg_sleep(0.4); SELECT 'done'";
        let ended = std::thread::scope(|scope| -> Outcome<_> {
            let short = scope.spawn(|| psql(short));
            let long = scope.spawn(|| psql("SELECT pg_sleep(15)"));
            wait_until(secs(5), "both to be under way", || {
                let sql = "SELECT count(*) FROM pg_stat_activity WHERE query LIKE '%pg_sleep%' AND state = 'active'";
                Ok(a.postgres.sql("postgres", sql)?.trim() == "3")
            })?;
            let asked = now();
            systemctl(a, "restart")?;
            let took = ms(asked, now());
            let both = (short.join().map_err(|_| "panicked")??, long.join().map_err(|_| "panicked")??);
            ensure!(both.0.0 == 0 && both.0.1.contains("done"), "a short transaction was cut: {:?}", both.0);
            ensure!(both.1.0 != 0 && both.1.1.contains("shutting down"), "the long one was not told: {:?}", both.1);
            Ok(took)
        })?;
        eprintln!("figure: restart under systemd with a transaction that does not end: {ended} ms");
        a.wait_active(secs(20))?;
        for writer in &writers {
            writer.wait_ack_via(gate, now(), secs(20))?;
        }

        systemctl(a, "stop")?;
        wait_until(secs(2), "a stopped daemon's clients to be refused", || is_refused(client, gate))?;
        systemctl(a, "start")?;
        for writer in writers {
            writer.wait_ack_via(gate, now(), secs(20))?;
            let (id, log) = (writer.id, writer.finish());
            let missing = lost(&log, id, &a.postgres)?;
            ensure!(missing.is_empty(), "acknowledged but missing: {missing:?}");
        }
        Ok(())
    });
}

#[test]
fn one_database_is_paused_killed_and_resumed_and_a_reload_says_what_it_did() {
    in_lab(Options::new("pools"), |lab| {
        lab.start_pair()?;
        let (a, client) = (&lab.a, lab.client.ns());
        let said = a.cli(&["pause", "nosuch"])?.expect(1)?;
        ensure!(said.err.contains("database nosuch"), "{}", said.err);
        let gate = a.gate()?;
        let options = WriterOptions { target: Target::Always(gate), ..WriterOptions::once(1, gate) };
        let writer = Writer::start_flowing(client, options)?;
        let said = a.cli(&["pause", "nosuch"])?.expect(1)?;
        ensure!(said.err.contains("name app"), "{}", said.err);
        a.cli(&["kill"])?.expect(2)?;
        a.cli(&["pause", "app"])?.expect(0)?;
        let paused = now();
        never(millis(1500), "an acknowledgement while paused", || {
            Ok(!writer.log().acks_after(paused + ON_THE_WIRE).is_empty())
        })?;
        let (code, text) = a.http("/metrics")?;
        ensure!(code == 200 && text.contains("portcullis_pool_database_paused{database=\"app\"} 1.0"), "{text}");
        wait_until(secs(5), "the pause to be shown", || Ok(a.status()?["paused_databases"] == json!(["app"])))?;
        let said = a.cli(&["status"])?.expect(0)?;
        ensure!(said.out.contains("by name: app"), "{}", said.out);
        let said = a.cli(&["check"])?.expect(1)?;
        ensure!(said.out.contains("clients of app wait"), "{}", said.out);
        ensure!(writer.log().errors.is_empty(), "the client noticed: {:?}", writer.log().errors);
        a.cli(&["kill", "app"])?.expect(0)?;
        a.cli(&["resume", "app"])?.expect(0)?;
        writer.wait_acks(20, secs(60))?;
        let errors = writer.log().errors;
        ensure!(errors.iter().any(|(_, text)| text.contains("57P01") && text.contains("kill")), "{errors:?}");
        a.cli(&["reconnect", "app"])?.expect(0)?;
        writer.wait_acks(20, secs(60))?;

        OpenOptions::new().append(true).open(&a.config)?.write_all(b"\n[pool]\nsize = 7\nthreads = 3\n")?;
        let said = a.cli(&["reload"])?.expect(0)?;
        ensure!(said.out.contains("and pool.size; needs a restart: pool.threads"), "{}", said.out);
        let said = a.cli(&["reload"])?.expect(0)?;
        ensure!(!said.out.contains("pool.size") && said.out.contains("needs a restart: pool.threads"), "{}", said.out);
        // A file with an error changes nothing; the verb itself would not even read it, so SIGHUP.
        a.reconfigure("size = 7", "size = 0")?;
        a.kill_daemon(Signal::HUP)?;
        wait_until(secs(60), "the daemon to say that nothing was reloaded", || {
            Ok(std::fs::read_to_string(&a.log)?.contains("nothing was reloaded"))
        })?;
        a.reconfigure("size = 0", "size = 7")?;
        let said = a.cli(&["reload"])?.expect(0)?;
        ensure!(!said.out.contains("pool.size"), "the broken file was in force: {}", said.out);
        writer.wait_acks(20, secs(60))?;
        drop(writer.finish());
        Ok(())
    });
}
