//! The commands beside `promote`: pause and resume, fence and unfence, switchover, rejoin, a restart of the daemon, two
//! people at once; and a failover with the embedded witness, which dies in the middle.

use crate::audit::{a_signal_is_told, commands_are_told, measured, no_secret_is_told};
use crate::claims::ON_THE_WIRE;
use crate::ensure;
use crate::harness::Lab;
use crate::harness::client::{Target, Writer, WriterOptions, lost};
use crate::harness::config::Options;
use crate::harness::net::{VIP, connects};
use crate::harness::node::{GATE_PORT, Node, Said, text_at};
use crate::harness::postgres::APP_PASSWORD;
use crate::harness::sys::{Fail, Outcome, in_netns, millis, ms, never, now, secs, wait_until};
use crate::harness::watch::{never_two_active, roles};
use crate::harness::witness::Kind;
use crate::in_lab;

/// One session with an open transaction over a pause: the transaction goes on, what follows it waits for the resume.
fn pause_over_a_transaction(lab: &Lab) -> Outcome {
    let a = &lab.a;
    in_netns(lab.client.ns(), || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(async {
            let mut config = tokio_postgres::Config::new();
            config.host(a.address()).port(GATE_PORT).user("app").dbname("app").password(APP_PASSWORD);
            let (client, connection) = config.connect(tokio_postgres::NoTls).await?;
            let connection = tokio::spawn(connection);
            client.batch_execute("BEGIN; INSERT INTO acks VALUES (9, 1)").await?;
            a.cli(&["pause"])?.expect(0)?;
            a.wait_status(secs(60), "to say that it is paused", |status| text_at(status, "/gate/state") == "paused")?;
            let inside = client.batch_execute("INSERT INTO acks VALUES (9, 2); COMMIT");
            tokio::time::timeout(secs(10), inside).await.map_err(|_| "an open transaction was held")??;
            let next = client.batch_execute("INSERT INTO acks VALUES (9, 3)");
            tokio::pin!(next);
            let held = tokio::time::timeout(millis(700), &mut next).await;
            ensure!(held.is_err(), "a paused gate let a new transaction through: {held:?}");
            ensure!(a.postgres.numbers_of(9)?.len() == 2, "the held transaction reached PostgreSQL");
            a.cli(&["resume"])?.expect(0)?;
            tokio::time::timeout(secs(10), &mut next).await.map_err(|_| "not let go after resume")??;
            connection.abort();
            Ok(())
        })
    })
}

#[test]
fn pause_restart_and_switchover() {
    in_lab(Options::with_vip("commands"), |lab| {
        lab.start_pair()?;
        let (a, b, client) = (&lab.a, &lab.b, lab.client.ns());
        let vip_gate = format!("{VIP}:{GATE_PORT}").parse()?;
        let writer = Writer::start_flowing(client, WriterOptions::once(1, vip_gate))?;
        a.cli(&["pause"])?.expect(0)?;
        let paused = now();
        never(millis(1500), "an acknowledgement while paused", || {
            Ok(!writer.log().acks_after(paused + ON_THE_WIRE).is_empty())
        })?;
        a.cli(&["resume"])?.expect(0)?;
        writer.wait_acks(20, secs(60))?;
        pause_over_a_transaction(lab)?;
        writer.wait_acks(20, secs(60))?;
        let log = writer.log();
        ensure!(log.errors.is_empty() && log.sessions.len() == 1, "the client noticed: {:?}", log.errors);

        // The daemon of the active node is restarted: told, unbound, and by itself back at the same epoch.
        let epoch = a.epoch()?;
        a.stop_daemon()?;
        let stopped = now();
        ensure!(!a.has_vip()?, "the daemon ended and left the VIP behind");
        let log = writer.finish();
        ensure!(log.errors.iter().any(|(_, text)| text.contains("57P01")), "the session was told {:?}", log.errors);
        let missing = lost(&log, 1, &a.postgres)?;
        ensure!(missing.is_empty(), "acknowledged but missing: {missing:?}");
        let options = WriterOptions { target: Target::Always(vip_gate), ..WriterOptions::once(2, vip_gate) };
        let writer = Writer::start(client, options)?;
        a.start_daemon()?;
        a.wait_active(secs(60))?;
        writer.wait_ack_via(vip_gate, stopped, secs(60))?;
        let back = ms(stopped, now());
        ensure!(a.epoch()? == epoch, "a restart changed the epoch from {epoch} to {}", a.epoch()?);
        a.wait_in_sync(secs(60))?;

        // Nobody can be made a standby of itself, and nobody switches over to a stopped PostgreSQL.
        a.cli(&["rejoin", "a"])?.expect(3)?;
        b.cli(&["rejoin", "a"])?.expect(3)?;
        b.postgres.stop(&b.host, "fast")?;
        b.wait_status(secs(60), "to miss its PostgreSQL", |s| s.pointer("/postgres/up") == Some(&false.into()))?;
        a.cli(&["switchover", "--to", "b"])?.expect(3)?;
        b.cli(&["switchover"])?.expect(3)?;
        ensure!(a.gate_is_open()? && a.epoch()? == epoch, "a refused switchover changed something");
        b.postgres.start(&b.host)?;
        a.wait_in_sync(secs(60))?;
        writer.wait_acks(20, secs(60))?;

        let said = a.cli(&["switchover", "--to", "b"])?.expect(0)?;
        b.wait_active(secs(60))?;
        writer.wait_acks(20, secs(60))?;
        ensure!(!a.has_vip()? && b.has_vip()?, "the VIP should be on b alone");
        b.wait_in_sync(secs(60))?;
        let log = writer.finish();
        for id in [1, 2] {
            let expected = if id == 2 { log.acks.len() } else { 20 };
            ensure!(b.postgres.numbers_of(id)?.len() >= expected, "writer {id} misses numbers on b");
        }
        let missing = lost(&log, 2, &b.postgres)?;
        ensure!(missing.is_empty(), "acknowledged but missing on b: {missing:?}");
        // Begun, refused and done alike; what was asked for on the other node says by whom there.
        let on_a = [": rejoin a: refused: ", ": switchover --to b: refused: ", ": switchover --to b: done: "];
        commands_are_told(a, &on_a)?;
        commands_are_told(
            b,
            &[": rejoin a: refused: ", ": switchover: refused: ", " on a: switchover --to b: runs here"],
        )?;
        a_signal_is_told(b)?;
        measured(b, a)?;
        no_secret_is_told(lab)?;
        eprintln!("commands: back {back} ms after SIGTERM; switchover from a took {} ms", ms(said.started, said.ended));
        Ok(())
    });
}

/// The same verb on both nodes at one moment.
fn on_both(lab: &Lab, words: &[&str]) -> Outcome<[Said; 2]> {
    std::thread::scope(|scope| {
        let [a, b] = lab.nodes().map(|node| scope.spawn(|| node.cli(words)));
        let joined = |thread: std::thread::ScopedJoinHandle<'_, Outcome<Said>>| {
            thread.join().unwrap_or_else(|_| Err(Fail("a thread of the lab panicked".to_owned())))
        };
        Ok([joined(a)?, joined(b)?])
    })
}

/// Exactly one gate is open, and stays the only one.
fn exactly_one_serves(lab: &Lab) -> Outcome<&Node> {
    let mut winner = None;
    wait_until(secs(60), "one gate to open", || {
        winner = lab.nodes().into_iter().find(|node| node.gate_is_open().unwrap_or(false));
        Ok(winner.is_some())
    })?;
    let winner = winner.ok_or("nobody serves")?;
    let other = if winner.name() == "a" { &lab.b } else { &lab.a };
    never(secs(2), "a second open gate", || other.gate_is_open())?;
    Ok(winner)
}

/// The active node is fenced by hand, then both are promoted at one moment: exactly one wins a new epoch.
fn race_of_two_shut_nodes<'a>(lab: &'a Lab, active: &Node) -> Outcome<(&'a Node, [Said; 2])> {
    let epoch = active.epoch()?;
    active.cli(&["fence"])?.expect(0)?;
    active.wait_status(secs(60), "to run as a fenced standby", |status| {
        status.pointer("/postgres/up") == Some(&true.into()) && text_at(status, "/postgres/role") == "standby"
    })?;
    let said = on_both(lab, &["promote", "--yes"])?;
    let show = |said: &Said| format!("{}: {}{}", said.code, said.out, said.err);
    let winner = exactly_one_serves(lab)
        .map_err(|error| Fail(format!("{error}\na said {}\nb said {}", show(&said[0]), show(&said[1]))))?;
    let [won, beaten] = if winner.name() == "a" { [&said[0], &said[1]] } else { [&said[1], &said[0]] };
    ensure!(won.code == 0, "{} serves, but its promote ended with {}", winner.name(), show(won));
    ensure!(beaten.code != 0, "the beaten promote ended with {}", show(beaten));
    ensure!(winner.epoch()? > epoch, "no new epoch");
    Ok((winner, said))
}

#[test]
fn fence_unfence_and_two_promotes_at_once() {
    in_lab(Options::new("fencing"), |lab| {
        lab.start_pair()?;
        let (a, b, client) = (&lab.a, &lab.b, lab.client.ns());
        let (roles_a, roles_b) = (roles(a.ns(), a.address())?, roles(b.ns(), b.address())?);
        let epoch = a.epoch()?;
        let writer = Writer::start_flowing(client, WriterOptions::once(1, a.gate()?))?;
        let said = a.cli(&["fence", "--reason", "smoke in the rack"])?.expect(0)?;
        a.wait_role("fenced", secs(60))?;
        let log = writer.finish();
        let last = log.last_ack().ok_or("no acknowledgement")?.at;
        ensure!(last <= said.ended + ON_THE_WIRE, "an acknowledgement {} ms after the fence", ms(said.ended, last));
        wait_until(secs(60), "PostgreSQL on a read-only", || a.postgres.is_read_only())?;
        a.stop_daemon()?;
        a.start_daemon()?;
        never(secs(2), "the fence lifted by a restart", || Ok(a.role()? != "fenced"))?;
        let reason = text_at(&a.status()?, "/gate/reason");
        ensure!(reason.contains("smoke in the rack"), "the reason is lost: {reason}");
        ensure!(!connects(client, a.address(), GATE_PORT)?, "a fenced gate accepts connections");

        lab.witness.kill()?;
        a.cli(&["unfence"])?.expect(3)?;
        lab.witness.start()?;
        lab.witness.move_record_to(b.address())?;
        a.cli(&["unfence"])?.expect(3)?;
        ensure!(a.role()? == "fenced", "a refused unfence left the role {}", a.role()?);
        lab.witness.move_record_to(a.address())?;
        a.cli(&["unfence"])?.expect(0)?;
        a.wait_active(secs(60))?;
        ensure!(a.epoch()? > epoch, "unfence took no new epoch: {epoch}, {}", a.epoch()?);
        let missing = lost(&log, 1, &a.postgres)?;
        ensure!(missing.is_empty(), "acknowledged but missing: {missing:?}");
        a.wait_in_sync(secs(60))?;
        Writer::start_flowing(client, WriterOptions::once(2, a.gate()?))?;

        // Two people at once while a serves and the nodes see each other.
        let alive = on_both(lab, &["promote", "--yes"])?;
        let winner = exactly_one_serves(lab)?;
        let won = if winner.name() == "a" { &alive[0] } else { &alive[1] };
        ensure!(won.code == 0, "{} serves, but its promote ended with {}: {}", winner.name(), won.code, won.err);
        winner.wait_in_sync(secs(60))?;

        // While nobody serves: each asks for the other's consent, and one of them gets it.
        let (winner, asked) = race_of_two_shut_nodes(lab, winner)?;
        // And while the nodes do not see each other either: the record alone decides, for exactly one.
        lab.switch.cut_port_between(&a.host.plug, &b.host.plug, crate::harness::node::PEER_PORT)?;
        let (_, apart) = race_of_two_shut_nodes(lab, winner)?;
        lab.switch.heal()?;
        never(secs(2), "two gates", || Ok(a.gate_is_open()? == b.gate_is_open()?))?;
        let looks = roles_a.finish().into_iter().zip(roles_b.finish()).filter(|(one, other)| {
            let active = |look: &crate::harness::watch::Look<Option<String>>| look.seen.as_deref() == Some("active");
            active(one) && active(other) && one.asked <= other.answered && other.asked <= one.answered
        });
        ensure!(looks.count() == 0, "both were seen active");
        let codes = |said: &[Said; 2]| [said[0].code, said[1].code];
        eprintln!("fencing: at once {:?}, shut {:?}, apart {:?}", codes(&alive), codes(&asked), codes(&apart));
        Ok(())
    });
}

#[test]
fn embedded_witness_killed_during_a_failover_and_every_rejoin() {
    in_lab(Options { witness: Kind::Embedded, ..Options::new("rejoins") }, |lab| {
        lab.start_pair()?;
        let (a, b, client) = (&lab.a, &lab.b, lab.client.ns());
        let (roles_a, roles_b) = (roles(a.ns(), a.address())?, roles(b.ns(), b.address())?);
        let writer = Writer::start_flowing(client, WriterOptions::service(1, lab.witness.address()))?;
        a.power_off()?;
        // The witness dies right after it has acknowledged the new record, and comes back from its disk.
        let mut restarted = None;
        let said = b.cli_live(&["promote", "--yes"], |line| {
            if restarted.is_none() && line.contains("the record moved") {
                restarted = Some(lab.witness.kill().and_then(|()| lab.witness.start()));
            }
        })?;
        let said = said.expect(0)?;
        restarted.ok_or_else(|| Fail(format!("no line says that the record moved: {}", said.out)))??;
        b.wait_active(secs(60))?;
        let first = writer.wait_ack_via(b.gate()?, said.started, secs(60))?;
        let marker = lab.witness.marker()?.unwrap_or_default();
        ensure!(marker.contains("active=b"), "the witness came back with another marker: {marker}");
        writer.wait_acks(20, secs(60))?;

        // a comes back with a crashed PostgreSQL that was not started: rejoin asked for on b.
        a.host.power_on()?;
        a.start_daemon()?;
        a.wait_role("fenced", secs(60))?;
        let crashed = b.rejoin("a")?;
        b.wait_in_sync(secs(60))?;
        // Its PostgreSQL stopped: asked for on a itself.
        a.postgres.stop(&a.host, "immediate")?;
        let stopped = a.rejoin("a")?;
        b.wait_in_sync(secs(60))?;
        // Its data directory gone: on a, and once more on b.
        let mut absent = Vec::new();
        for (index, asked) in [a, b].into_iter().enumerate() {
            a.postgres.stop(&a.host, "fast")?;
            std::fs::rename(&a.postgres.data_dir, a.dir.join(format!("pg/moved-{index}")))?;
            let said = asked.rejoin("a")?;
            b.wait_in_sync(secs(60))?;
            ensure!(a.postgres.is_read_only()?, "the clone is writable");
            absent.push(ms(said.started, said.ended));
        }
        writer.wait_acks(20, secs(60))?;
        let log = writer.finish();
        for node in lab.nodes() {
            wait_until(secs(60), "every acknowledged number on both nodes", || {
                let missing = lost(&log, 1, &node.postgres)?;
                if missing.is_empty() {
                    Ok(true)
                } else {
                    Err(Fail(format!("missing on {}: {missing:?}", node.name())))
                }
            })?;
        }
        never_two_active(&roles_a.finish(), &roles_b.finish())?;
        eprintln!(
            "rejoins: first write {} ms after Enter; crashed {} ms, stopped {} ms, absent {absent:?} ms; {} acks",
            ms(said.started, first),
            ms(crashed.started, crashed.ended),
            ms(stopped.started, stopped.ended),
            log.acks.len()
        );
        Ok(())
    });
}
