//! Switchover without an error: clients of the old node are held, and go on at the new one through the old host.

use crate::ensure;
use crate::harness::Lab;
use crate::harness::client::{Writer, WriterOptions, lost};
use crate::harness::config::Options;
use crate::harness::host::{continue_all, stop_all};
use crate::harness::node::{GATE_PORT, Node, text_at};
use crate::harness::postgres::{APP_PASSWORD, Template};
use crate::harness::sys::{Fail, Outcome, in_netns, secs, wait_until};
use crate::in_lab;
use serde_json::Value;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::mpsc;
use std::time::Duration;
use tokio::task::JoinHandle;

/// A backend for each client: pgbench prepares and waits for the answer, while others of its thread hold transactions.
const TRANSACTION: &str = "[pool]\nmode = \"transaction\"\nsize = 20\n";
const SESSION: &str = "[pool]\nmode = \"session\"\nsize = 40\n";
/// Clients of pgbench, as the issue wants them.
const CLIENTS: &str = "16";

/// One pgbench against one gate, to its end.
struct Bench<'a> {
    lab: &'a Lab,
    log: PathBuf,
}

/// What its own log says.
struct Benched {
    transactions: usize,
    /// Latencies, the longest last.
    latencies: Vec<Duration>,
}

impl Benched {
    fn longest(&self) -> Duration {
        self.latencies.last().copied().unwrap_or_default()
    }
}

fn words(gate: &Node, more: &[&str]) -> Outcome<Vec<String>> {
    let program = Template::once()?.bin_dir.join("pgbench").display().to_string();
    let password = format!("PGPASSWORD={APP_PASSWORD}");
    let port = GATE_PORT.to_string();
    let words = ["env", &password, &program, "-h", gate.address(), "-p", &port, "-U", "app"];
    Ok(words.iter().chain(more).map(|word| (*word).to_owned()).chain(["app".to_owned()]).collect())
}

fn run(lab: &Lab, words: &[String], limit: Duration) -> Outcome<String> {
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let output = lab.client.exec_within(limit, "", &words)?;
    let text = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    ensure!(output.status.success(), "{} ended with {}: {text}", words[3], output.status);
    Ok(text)
}

impl<'a> Bench<'a> {
    fn new(lab: &'a Lab, name: &str) -> Bench<'a> {
        Bench { lab, log: lab.dir.join(format!("pgbench-{name}")) }
    }

    /// Runs `while_it_runs` once transactions flow; pgbench ends by itself.
    fn during(&self, gate: &Node, seconds: u64, while_it_runs: impl FnOnce() -> Outcome) -> Outcome<Benched> {
        let (seconds_text, log) = (seconds.to_string(), self.log.display().to_string());
        let more = ["-M", "prepared", "-n", "-c", CLIENTS, "-j", "2", "-T", &seconds_text, "-l", "--log-prefix", &log];
        let words = words(gate, &more)?;
        let (done, outcome) = mpsc::channel();
        let before = history(gate)?;
        std::thread::scope(|scope| -> Outcome {
            scope.spawn(move || done.send(run(self.lab, &words, secs(seconds + 60))));
            let flow = wait_until(secs(10), "transactions to flow", || {
                let there = history(gate)?;
                let doing = "select string_agg(state || ' ' || wait_event || ' ' || left(query, 40), '; ') \
                             from pg_stat_activity where usename = 'app'";
                ensure!(there > before + 100, "{there} rows, {before} before; {}", gate.postgres.sql("app", doing)?);
                Ok(true)
            });
            let acted = flow.and_then(|_| while_it_runs());
            let said = outcome.recv_timeout(secs(seconds + 60));
            acted?;
            let said = said.map_err(|_| Fail("pgbench vanished".to_owned()))??;
            ensure!(said.contains("number of failed transactions: 0 "), "pgbench: {said}");
            ensure!(!said.contains("aborted"), "pgbench: {said}");
            Ok(())
        })?;
        let mut latencies = self.latencies()?;
        latencies.sort_unstable();
        Ok(Benched { transactions: latencies.len(), latencies })
    }

    /// The third column, in microseconds. The client's machine has files of its own.
    fn latencies(&self) -> Outcome<Vec<Duration>> {
        let all = format!("cat {}.*", self.log.display());
        let text = self.lab.client.exec("", &["sh", "-c", &all])?;
        Ok(text.lines().filter_map(|line| line.split(' ').nth(2)?.parse().ok()).map(Duration::from_micros).collect())
    }
}

fn history(gate: &Node) -> Outcome<u64> {
    Ok(gate.postgres.sql("app", "select count(*) from pgbench_history")?.trim().parse()?)
}

/// The tables of pgbench, through the gate and at both nodes.
fn prepare(lab: &Lab) -> Outcome {
    run(lab, &words(&lab.a, &["-i", "-q", "-s", "2"])?, secs(120))?;
    lab.a.wait_in_sync(secs(60)).map(drop)
}

/// Once the other node is its standby again.
fn switch_over(old: &Node, new: &Node) -> Outcome {
    new.wait_status(secs(60), "to stream as a standby", |status| {
        text_at(status, "/role") == "passive" && status.pointer("/postgres/streaming") == Some(&Value::Bool(true))
    })?;
    old.wait_in_sync(secs(60))?;
    eprintln!("{}", new.cli(&["switchover", "--to", new.name()])?.expect(0)?.out);
    new.wait_active(secs(60)).map(drop)
}

/// All of them at a's gate throughout: they go to b and come back, and who connects anew for each transaction does so
/// there, whoever serves.
#[test]
fn sixteen_clients_of_pgbench_see_no_error_through_a_switchover_there_and_back() {
    let options = Options { extra: TRANSACTION, service: "passive = \"forward\"", ..Options::new("carried") };
    in_lab(options, |lab| {
        lab.start_pair()?;
        prepare(lab)?;
        let (a, b, client) = (&lab.a, &lab.b, lab.client.ns());
        // LAB_SWITCHOVERS=n: so many instead of there and back, for a distribution.
        let times: u32 = std::env::var("LAB_SWITCHOVERS").ok().and_then(|n| n.parse().ok()).unwrap_or(2);
        let seconds = 18 * u64::from(times);
        // One session that reports each acknowledgement: what it was told must be there.
        let writer = Writer::start_flowing(client, WriterOptions::once(1, a.gate()?))?;
        let bench = Bench::new(lab, "there-and-back");
        let text = seconds.to_string();
        let anew = words(a, &["-C", "-n", "-S", "-c", "4", "-j", "1", "-T", &text])?;
        let mut active = a;
        let benched = std::thread::scope(|scope| {
            let connecting = scope.spawn(|| run(lab, &anew, secs(seconds + 60)));
            let benched = bench.during(a, seconds, || {
                for (old, new) in (1..=times).zip([(a, b), (b, a)].into_iter().cycle()).map(|(_, pair)| pair) {
                    switch_over(old, new)?;
                    writer.wait_acks(50, secs(60))?;
                    active = new;
                }
                ensure!(!connecting.is_finished(), "the switchovers took longer than pgbench: nothing was seen");
                Ok(())
            });
            let said = connecting.join().map_err(|_| Fail("panicked".to_owned()))?;
            let benched = benched?;
            let said = said?;
            ensure!(said.contains("number of failed transactions: 0 "), "pgbench -C: {said}");
            ensure!(!said.contains("aborted"), "pgbench -C: {said}");
            Outcome::Ok(benched)
        })?;
        // Whose socket is at the active node is its own client again.
        let forwarded = active.status()?.pointer("/gate/forwarded").and_then(Value::as_u64);
        ensure!(forwarded == Some(0), "{forwarded:?} clients of {} are still forwarded", active.name());
        let log = writer.finish();
        ensure!(log.errors.is_empty(), "the writer had errors: {:?}", log.errors);
        let missing = lost(&log, 1, &active.postgres)?;
        ensure!(missing.is_empty(), "acknowledged but missing on {}: {missing:?}", active.name());
        let (gap, _) = log.longest_gap();
        eprintln!(
            "figure: carried: {times} switchovers: {} transactions, longest {} ms; the writer waited {} ms",
            benched.transactions,
            benched.longest().as_millis(),
            gap.as_millis()
        );
        Ok(())
    });
}

/// A session of its own to one gate, which answers or says why it ended.
async fn session(gate: SocketAddr, setup: &str) -> Outcome<(tokio_postgres::Client, JoinHandle<String>)> {
    let mut config = tokio_postgres::Config::new();
    config.host(gate.ip().to_string()).port(gate.port()).user("app").dbname("app").password(APP_PASSWORD);
    let (client, connection) = config.connect(tokio_postgres::NoTls).await?;
    let ended = tokio::spawn(async move {
        match connection.await {
            Ok(()) => "closed".to_owned(),
            Err(error) => match error.as_db_error() {
                Some(db) => format!("{}: {}", db.code().code(), db.message()),
                None => error.to_string(),
            },
        }
    });
    client.batch_execute(setup).await?;
    Ok((client, ended))
}

#[test]
fn in_session_pooling_plain_sessions_go_on_and_others_are_told_why_not() {
    in_lab(Options { extra: SESSION, ..Options::new("carried-session") }, |lab| {
        lab.start_pair()?;
        let (a, b) = (&lab.a, &lab.b);
        a.wait_in_sync(secs(60))?;
        let gate = a.gate()?;
        in_netns(lab.client.ns(), || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(async {
                let setup = "set search_path = pg_catalog, public; set my.tenant = 'x'";
                let (plain, _) = session(gate, "set my.tenant = 'x'").await?;
                plain.batch_execute("set search_path = pg_catalog, public").await?;
                let statement = plain.prepare("select current_setting('my.tenant'), $1::int + 1").await?;
                let (temp, temp_ended) = session(gate, "create temp table mine(n int)").await?;
                let (doubtful, doubt_ended) = session(gate, setup).await?;
                // Asked while it waits: a cli of its own thread moves the service meanwhile.
                let said = std::thread::scope(|scope| {
                    let switching = scope.spawn(|| b.cli(&["switchover", "--to", "b"]));
                    switching.join().map_err(|_| Fail("panicked".to_owned()))?
                })?;
                said.expect(0)?;
                let row = plain.query_one(&statement, &[&41_i32]).await?;
                ensure!(row.get::<_, i32>(1) == 42 && row.get::<_, String>(0) == "x", "another row: {row:?}");
                let row = plain.query_one("show search_path", &[]).await?;
                ensure!(row.get::<_, String>(0) == "pg_catalog, public", "the setting was lost");
                plain.batch_execute("insert into acks values (99, 1)").await?;
                // And back, with all that it had set and prepared.
                std::thread::scope(|scope| {
                    scope.spawn(|| switch_over(b, a)).join().map_err(|_| Fail("panicked".to_owned()))?
                })?;
                let row = plain.query_one(&statement, &[&42_i32]).await?;
                ensure!(row.get::<_, i32>(1) == 43 && row.get::<_, String>(0) == "x", "another row: {row:?}");
                let row = plain.query_one("show search_path", &[]).await?;
                ensure!(row.get::<_, String>(0) == "pg_catalog, public", "the setting was lost on the way back");
                let sessions = a.status()?.pointer("/gate/sessions").and_then(Value::as_u64);
                ensure!(sessions.is_some_and(|n| n > 0), "it is not a's own session: {sessions:?}");
                for (ended, word) in [(temp_ended, "a temporary table"), (doubt_ended, "set")] {
                    let text = tokio::time::timeout(secs(10), ended).await.map_err(|_| Fail("no end".to_owned()))?;
                    let text = text.map_err(|_| Fail("panicked".to_owned()))?;
                    ensure!(text.starts_with("57P01") && text.contains(word), "{word}: it ended with {text}");
                }
                drop((temp, doubtful));
                Ok(())
            })
        })?;
        ensure!(a.postgres.numbers_of(99)?.contains(&1), "the write is not at a");
        Ok(())
    });
}

/// The standby replays nothing: it is found out while nothing is stopped, and everybody goes on.
#[test]
fn a_standby_that_hangs_costs_held_clients_some_seconds_and_no_session() {
    in_lab(Options { extra: TRANSACTION, ..Options::new("carried-back") }, |lab| {
        lab.start_pair()?;
        prepare(lab)?;
        let (a, b) = (&lab.a, &lab.b);
        let bench = Bench::new(lab, "back");
        let benched = bench.during(a, 25, || {
            let replaying = b.host.titled("startup recovering")?;
            ensure!(!replaying.is_empty(), "no start-up process on b");
            stop_all(&replaying)?;
            let said = b.cli(&["switchover", "--to", "b"])?;
            continue_all(&replaying);
            eprintln!("{}{}", said.out, said.err);
            ensure!(said.code == 1, "it ended with {}: {}", said.code, said.out);
            a.wait_active(secs(30))?;
            ensure!(a.epoch()? == 1, "the epoch moved");
            Ok(())
        })?;
        eprintln!("figure: put back: clients waited {} ms", benched.longest().as_millis());
        Ok(())
    });
}
