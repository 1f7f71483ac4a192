//! The active node's PostgreSQL is restarted, by a person or by a package, in transaction mode: whoever is between two
//! transactions, or comes meanwhile, waits and is told nothing (R1: nothing passes; the lease goes on).

use crate::ensure;
use crate::harness::Lab;
use crate::harness::config::Options;
use crate::harness::node::GATE_PORT;
use crate::harness::postgres::{APP_PASSWORD, Template};
use crate::harness::sys::{Outcome, ms, now, secs, wait_until};
use crate::in_lab;
use std::fs;
use std::path::Path;

const CLIENTS: usize = 5;

#[test]
fn a_restart_of_postgresql_is_a_pause_for_clients_between_transactions() {
    let extra = "[pool]\nmode = \"transaction\"\nsize = 4\n";
    in_lab(Options { extra, ..Options::new("away") }, |lab| {
        lab.start_pair()?;
        lab.a.postgres.sql("app", "create table kept (client int primary key); grant all on kept to app")?;
        for planned in [false, true] {
            restarted(lab, planned)?;
        }
        Ok(())
    });
}

/// Stops PostgreSQL while `CLIENTS` sessions are idle, lets all of them and a new one ask for something, and starts it
/// again. `planned`: after `portcullis pause`.
fn restarted(lab: &Lab, planned: bool) -> Outcome {
    let a = &lab.a;
    a.wait_in_sync(secs(30))?;
    a.postgres.sql("app", "truncate kept")?;
    let dir = a.dir.join(format!("away-{planned}"));
    fs::create_dir(&dir)?;
    let (epoch, cuts) = (a.epoch()?, counter(lab, "gate_cuts")?);
    std::thread::scope(|scope| {
        let clients: Vec<_> = (0..CLIENTS)
            .map(|id| {
                scope.spawn({
                    let dir = &dir;
                    move || client(lab, dir, id, true)
                })
            })
            .collect();
        wait_until(secs(20), "all sessions to be idle", || Ok(fs::read_dir(&dir)?.count() == CLIENTS))?;
        if planned {
            a.cli(&["pause"])?.expect(0)?;
        }
        let stopped = now();
        a.postgres.stop(&a.host, "fast")?;
        wait_until(secs(10), "the stop to be noticed", || Ok(counter(lab, "gate_suspensions")? > u64::from(planned)))?;
        ensure!(!a.gate_is_open()? && a.gate_state()? == "paused", "the gate is {}", a.gate_state()?);
        ensure!(a.role()? == "active", "a is {}", a.role()?);
        let said = a.cli(&["check"])?;
        ensure!(said.code == 2 && said.out.contains("PostgreSQL is down"), "check says {}", said.out);
        fs::write(dir.join("go"), "")?;
        let newcomer = scope.spawn({
            let dir = &dir;
            move || client(lab, dir, CLIENTS, false)
        });
        a.postgres.start(&a.host)?;
        if planned {
            a.cli(&["resume"])?.expect(0)?;
        }
        for client in clients.into_iter().chain([newcomer]) {
            client.join().map_err(|_| "a client's thread panicked".to_owned())??;
        }
        eprintln!(
            "figure: away: {} ms from PostgreSQL's stop to the last answer, planned: {planned}",
            ms(stopped, now())
        );
        Ok::<(), crate::harness::sys::Fail>(())
    })?;
    let kept = a.postgres.sql("app", "select count(*) from kept")?;
    ensure!(kept == (CLIENTS + 1).to_string(), "{kept} rows");
    ensure!(a.epoch()? == epoch && counter(lab, "gate_cuts")? == cuts, "the gate was cut");
    Ok(())
}

/// One psql: it asks once, waits for the word to go on where it is to be `idle`, and writes its row.
fn client(lab: &Lab, dir: &Path, id: usize, idle: bool) -> Outcome {
    let psql = Template::once()?.bin_dir.join("psql").display().to_string();
    let dsn = format!("host={} port={GATE_PORT} user=app dbname=app password={APP_PASSWORD}", lab.a.address());
    let dir = dir.display();
    let wait = format!("\\! : > {dir}/{id}; until [ -e {dir}/go ]; do sleep 0.05; done");
    let insert = format!("insert into kept values ({id})");
    let mut words = vec![psql.as_str(), "-XAtq", "-v", "ON_ERROR_STOP=1", dsn.as_str(), "-c", "select 1"];
    if idle {
        words.extend(["-c", wait.as_str()]);
    }
    words.extend(["-c", insert.as_str()]);
    lab.client.exec("", &words).map(drop)
}

fn counter(lab: &Lab, name: &str) -> Outcome<u64> {
    let status = lab.a.status()?;
    status["counters"][name].as_u64().ok_or_else(|| format!("no counter {name} in status").into())
}
