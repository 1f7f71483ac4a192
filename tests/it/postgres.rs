//! `io::postgres` against real PostgreSQL 15: pairs on loopback, each test in a directory of its own.

#[path = "postgres/layouts.rs"]
mod layouts;
#[path = "postgres/mended.rs"]
mod mended;
#[path = "postgres/pair.rs"]
mod pair;
#[path = "postgres/rejoined.rs"]
mod rejoined;
#[path = "postgres/replayed.rs"]
mod replayed;
#[path = "postgres/target.rs"]
mod target;

use pair::{LIMIT, as_postgres, client, clone, peer, pid, postmaster, send, sql, until, wait_streaming};
use portcullis::engine::report::PgReport;
use portcullis::io::clock;
use portcullis::io::postgres::{Cluster, PgError, PgLost, StopHow, StopMode, Tick, Watcher, slot_name, watch};
use rustix::process::Signal;
use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

async fn look(node: &Arc<Cluster>) -> PgReport {
    Watcher::new(Arc::clone(node)).observe(LIMIT).await.expect("report")
}

#[test]
fn a_look_tells_primary_and_standby() {
    as_postgres("a_look_tells_primary_and_standby", |base| async move {
        let (alp, midna) = base.pair().await;
        let primary = look(&alp).await;
        assert!(!primary.in_recovery && !primary.streaming && !primary.read_only);
        assert_eq!((primary.start, primary.timeline.0, primary.sync_list.as_str()), (1, 1, ""));
        assert_eq!(primary.standbys.len(), 1, "{primary:?}");
        assert_eq!(primary.standbys[0].application_name, "midna");
        assert_eq!(primary.standbys[0].sync_state, "async");
        until("replayed", || async { look(&midna).await.replay_lsn >= Some(primary.lsn) }).await;
        let standby = look(&midna).await;
        assert!(standby.in_recovery && standby.streaming);
        assert_eq!((standby.timeline.0, standby.system_id), (1, primary.system_id));
        assert!(standby.lsn >= primary.lsn && standby.receive_lsn.is_some());
        assert_eq!(primary.system_id, alp.control_data().await.expect("control data").system_id);

        sql(&alp, "ALTER SYSTEM SET default_transaction_read_only = on; ").await;
        sql(&alp, "SELECT pg_reload_conf()").await;
        until("read only seen", || async { look(&alp).await.read_only }).await;

        // Promoted: the timeline is the new one at once, although pg_control_checkpoint() lags.
        midna.promote(LIMIT).await.expect("promote");
        let promoted = look(&midna).await;
        assert_eq!((promoted.in_recovery, promoted.timeline.0), (false, 2));
        midna.promote(LIMIT).await.expect("promoting a primary is fine");
    });
}

#[test]
fn a_lost_session_is_noticed_without_a_look_and_counted() {
    as_postgres("a_lost_session_is_noticed_without_a_look_and_counted", |base| async move {
        let alp = base.primary("alp").await;
        let mut watcher = Watcher::new(Arc::clone(&alp));
        assert_eq!(watcher.observe(LIMIT).await.expect("report").start, 1);
        assert_eq!(watcher.observe(LIMIT).await.expect("report").start, 1, "the session lasts");

        // A hang is silence, and no new start.
        let own = "SELECT pid FROM pg_stat_activity WHERE application_name = 'portcullis'";
        let backend = pid(&alp, own).await;
        send(backend, Signal::STOP);
        for _ in 0..3 {
            let lost = watcher.observe(Duration::from_millis(100)).await.expect_err("hung");
            assert!(matches!(lost, PgLost::Silent(_)), "{lost:?}");
        }
        send(backend, Signal::CONT);
        assert_eq!(watcher.observe(LIMIT).await.expect("report").start, 1);

        // Crash recovery inside a running postmaster: a new start.
        let before = postmaster(&alp);
        let holder = client(&alp).await;
        let victim = holder.query_one("SELECT pg_backend_pid()", &[]).await.expect("pid").get::<_, i32>(0);
        send(rustix::process::Pid::from_raw(victim).expect("pid"), Signal::KILL);
        assert!(matches!(watcher.lost().await, PgLost::Down(_)));
        until("recovered", || async { alp.start(LIMIT).await.is_ok() && client_works(&alp).await }).await;
        assert_eq!(watcher.observe(LIMIT).await.expect("report").start, 2);
        assert_eq!(postmaster(&alp), before);

        // The driver's loop hears of a dead postmaster at once, though it looks only every two minutes.
        let (out, mut heard) = tokio::sync::mpsc::unbounded_channel();
        let looks = tokio::spawn(watch(
            Arc::clone(&alp),
            || Duration::from_secs(120),
            LIMIT,
            move |at, answer| {
                let _ = out.send((at, answer));
            },
        ));
        assert!(heard.recv().await.expect("first look").1.is_ok());
        let killed = clock::now();
        send(before, Signal::KILL);
        let (at, answer) = heard.recv().await.expect("loss");
        assert!(matches!(answer, Err(PgLost::Down(_))), "{answer:?}");
        // By its next look it would have noticed after two minutes.
        println!("figure: a dead postmaster was noticed after {:?}", at.since(killed));
        assert!(at.since(killed) < Duration::from_secs(30), "noticed after {:?}", at.since(killed));
        let (_, answer) = heard.recv().await.expect("next look");
        assert!(matches!(answer, Err(PgLost::Down(_))), "{answer:?}");

        // The dead postmaster is a zombie of this process now: it neither counts as running nor blocks the start.
        until("dead", || async { !alp.is_running() }).await;
        alp.start(LIMIT).await.expect("start over a zombie's pid file");
        while let Some((_, answer)) = heard.recv().await {
            if let Ok(report) = answer {
                assert_eq!(report.start, 2);
                break;
            }
        }
        looks.abort();
    });
}

async fn client_works(node: &Cluster) -> bool {
    let mut config = tokio_postgres::Config::new();
    config.host_path(&node.settings.socket_dir).port(node.settings.port).user("postgres").dbname("postgres");
    config.connect(tokio_postgres::NoTls).await.is_ok()
}

#[test]
fn commits_wait_after_the_barrier_and_are_released_by_an_empty_list() {
    as_postgres("commits_wait_after_the_barrier_and_are_released_by_an_empty_list", |base| async move {
        let (alp, midna) = base.pair().await;
        sql(&alp, "CREATE TABLE t (i int)").await;
        alp.set_sync_list(Some(&midna.node), LIMIT).await.expect("list");
        assert_eq!(sql(&alp, "SHOW synchronous_standby_names").await, "\"midna\"");
        assert_eq!(look(&alp).await.sync_list, "\"midna\"");
        let lsn = alp.rearm_barrier(LIMIT).await.expect("barrier");
        alp.set_sync_list(None, LIMIT).await.expect("empty list");
        alp.rearm_barrier(LIMIT).await.expect("barrier");

        // While the checkpointer hangs the list is in force for every eye, but commits do not wait: no barrier then.
        let checkpointer = pid(&alp, "SELECT pid FROM pg_stat_activity WHERE backend_type = 'checkpointer'").await;
        let receiver = pid(&midna, "SELECT pid FROM pg_stat_wal_receiver").await;
        send(checkpointer, Signal::STOP);
        send(receiver, Signal::STOP);
        alp.set_sync_list(Some(&midna.node), LIMIT).await.expect("list");
        sql(&alp, "INSERT INTO t VALUES (0)").await;
        let barrier = alp.rearm_barrier(Duration::from_millis(500)).await;
        assert!(matches!(barrier, Err(PgError::TimedOut(_))), "{barrier:?}");
        send(checkpointer, Signal::CONT);
        send(receiver, Signal::CONT);
        alp.rearm_barrier(LIMIT).await.expect("barrier");
        assert!(lsn <= look(&alp).await.lsn && lsn.0 > 0);
        assert_eq!(look(&alp).await.standbys[0].sync_state, "sync");

        send(receiver, Signal::STOP);
        let writer = client(&alp).await;
        let insert = tokio::spawn(async move { writer.simple_query("INSERT INTO t VALUES (1)").await.is_ok() });
        let waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep'";
        until("waits for the standby", || async { sql(&alp, waiting).await == "1" }).await;
        // What the daemon itself commits does not wait.
        alp.ensure_slot("portcullis_other", LIMIT).await.expect("slot");
        alp.drop_slot("portcullis_other", LIMIT).await.expect("drop");
        assert!(!insert.is_finished());
        alp.set_sync_list(None, LIMIT).await.expect("empty list");
        assert!(insert.await.expect("join"), "released as a success");
        assert_eq!(look(&alp).await.sync_list, "");
        send(receiver, Signal::CONT);

        // The same while stopped: the file, in the form ALTER SYSTEM writes.
        alp.set_sync_list(Some(&midna.node), LIMIT).await.expect("list");
        let auto = alp.settings.data_dir.join("postgresql.auto.conf");
        let written = fs::read_to_string(&auto).expect("auto.conf");
        alp.stop(StopMode::Immediate, LIMIT).await.expect("stop");
        alp.set_sync_list(None, LIMIT).await.expect("stopped");
        alp.set_sync_list(Some(&midna.node), LIMIT).await.expect("stopped");
        assert_eq!(fs::read_to_string(&auto).expect("auto.conf"), written);
        alp.start(LIMIT).await.expect("start");
        assert_eq!(look(&alp).await.sync_list, "\"midna\"");
    });
}

#[test]
fn a_clone_keeps_what_belongs_to_its_machine() {
    as_postgres("a_clone_keeps_what_belongs_to_its_machine", |base| async move {
        let alp = base.primary("alp").await;
        let midna = base.node("midna");
        let facts = alp.source_facts(LIMIT).await.expect("facts");
        alp.ensure_slot("portcullis_midna", LIMIT).await.expect("slot");
        alp.ensure_slot("portcullis_midna", LIMIT).await.expect("again");
        sql(&alp, "ALTER SYSTEM SET cluster_name = 'of-alp'").await;
        sql(&alp, "ALTER SYSTEM SET work_mem = '5MB'").await;
        alp.set_sync_list(Some(&midna.node), LIMIT).await.expect("list");

        // Nothing there before: port and socket come from our configuration. Nothing secret is to be seen meanwhile.
        let spy = Spy::start();
        let (mut ticks, mut total) = (0, None);
        let aside = Cluster::clone_from(&midna, &peer(&alp), &facts, &mut |tick| {
            let Tick::Bytes { done, total: all } = tick else { return };
            assert!(all.is_none_or(|all| done <= all + all / 10));
            (ticks, total) = (ticks + 1, all.or(total));
        })
        .await
        .expect("clone");
        let argv = spy.stop();
        assert!(argv.iter().any(|line| line.contains("pg_basebackup")), "the spy saw pg_basebackup");
        assert!(!argv.iter().any(|line| line.contains("s3cr")), "a password in an argument");
        // A copy under the standby's own name could acknowledge commits in its stead.
        let log = fs::read_to_string(alp.state_dir.join("postgresql-alp.log")).expect("log");
        assert!(log.contains("application_name=portcullis-clone") && !log.contains("application_name=midna"));
        assert!(aside.is_none() && ticks > 0 && total.is_some_and(|all| all > 1_000_000));
        midna.start(LIMIT).await.expect("start");
        wait_streaming(&alp, "midna").await;
        assert_eq!(sql(&midna, "SHOW port").await, midna.settings.port.to_string());
        assert_eq!(sql(&midna, "SHOW cluster_name").await, "", "the other machine's own");
        assert_eq!(sql(&midna, "SHOW work_mem").await, "5MB", "the cluster's");
        assert_eq!(sql(&midna, "SHOW synchronous_standby_names").await, "");
        assert_eq!(sql(&midna, "SHOW primary_slot_name").await, "portcullis_midna");
        let active = "SELECT count(*) FROM pg_replication_slots WHERE slot_name = 'portcullis_midna' AND active";
        assert_eq!(sql(&alp, active).await, "1");
        assert!(matches!(alp.drop_slot("portcullis_midna", LIMIT).await, Err(PgError::Failed(_))), "in use");
        let refused = Cluster::clone_from(&midna, &peer(&alp), &facts, &mut |_| {}).await;
        assert!(matches!(refused, Err(PgError::Refused(_))), "it runs: {refused:?}");

        // Now with settings of its own on each side, and an old directory.
        sql(&midna, "ALTER SYSTEM SET cluster_name = 'of-midna'").await;
        midna.stop(StopMode::Fast, LIMIT).await.expect("stop");
        let data = &midna.settings.data_dir;
        fs::write(data.join("precious"), "kept").expect("write");
        fs::write(data.join("pg_ident.conf"), "# midna's own\n").expect("write");
        fs::create_dir(data.join("conf.d")).expect("mkdir");
        fs::write(data.join("conf.d/own.conf"), "# own\n").expect("write");
        alp.set_sync_list(None, LIMIT).await.expect("alone");
        sql(&alp, "CREATE TABLE news AS SELECT 1 AS i").await;
        let aside = clone(&midna, &alp).await.expect("an old directory");
        let name = aside.file_name().expect("name").to_string_lossy().into_owned();
        assert!(name.starts_with("data.set-aside-20") && name.ends_with('Z'), "{name}");
        assert_eq!(fs::read_to_string(aside.join("precious")).expect("read"), "kept");
        assert!(aside.join("PG_VERSION").exists() && !data.join("precious").exists());
        assert_eq!(fs::read_to_string(data.join("pg_ident.conf")).expect("read"), "# midna's own\n");
        assert_eq!(fs::read_to_string(data.join("conf.d/own.conf")).expect("read"), "# own\n");
        assert!(!base.dir.join("midna/data.portcullis-new").exists());
        midna.start(LIMIT).await.expect("start");
        wait_streaming(&alp, "midna").await;
        assert_eq!(sql(&midna, "SHOW cluster_name").await, "of-midna");
        assert_eq!(sql(&midna, "SHOW port").await, midna.settings.port.to_string());
        assert_eq!(sql(&midna, "SELECT i FROM news").await, "1");

        no_secret_was_shown(&alp);
        let passfile = fs::read_to_string(midna.state_dir.join("replication.passfile")).expect("passfile");
        assert_eq!(passfile, "*:*:*:replicator:s3cr\\:et\\\\of-the-test\n");
        let mode = std::os::unix::fs::PermissionsExt::mode(
            &fs::metadata(midna.state_dir.join("replication.passfile")).expect("meta").permissions(),
        );
        assert_eq!(mode & 0o777, 0o600);
        let auto = fs::read_to_string(data.join("postgresql.auto.conf")).expect("auto.conf");
        assert!(!auto.contains("s3cr"), "{auto}");
    });
}

fn no_secret_was_shown(alp: &Cluster) {
    let log = fs::read_to_string(alp.state_dir.join("postgresql-alp.log")).expect("log");
    assert!(log.contains("statement: ") && log.contains("replication connection authorized"), "the log logs");
    assert!(!log.contains("s3cr") && !log.contains("SCRAM-SHA-256$"), "a secret in the server's log");
}

/// Reads all command lines over and over.
struct Spy {
    stop: Arc<AtomicBool>,
    thread: std::thread::JoinHandle<Vec<String>>,
}
impl Spy {
    fn start() -> Spy {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            let mut seen = std::collections::BTreeSet::new();
            while !stopped.load(Ordering::Relaxed) {
                for entry in fs::read_dir("/proc").expect("proc").flatten() {
                    if let Ok(bytes) = fs::read(entry.path().join("cmdline")) {
                        seen.insert(String::from_utf8_lossy(&bytes).into_owned());
                    }
                }
            }
            seen.into_iter().collect()
        });
        Spy { stop, thread }
    }
    fn stop(self) -> Vec<String> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().expect("spy")
    }
}

#[test]
fn a_clone_that_fails_or_was_cut_short_loses_nothing() {
    as_postgres("a_clone_that_fails_or_was_cut_short_loses_nothing", |base| async move {
        let (alp, midna) = base.pair().await;
        midna.stop(StopMode::Fast, LIMIT).await.expect("stop");
        let data = &midna.settings.data_dir;
        let facts = alp.source_facts(LIMIT).await.expect("facts");
        fs::write(data.join("precious"), "kept").expect("write");

        let mut wrong = facts.clone();
        wrong.bytes = u64::MAX / 2;
        let error = Cluster::clone_from(&midna, &peer(&alp), &wrong, &mut |_| {}).await.expect_err("no space");
        assert!(matches!(&error, PgError::Refused(text) if text.contains("the copy needs")), "{error}");
        wrong = facts.clone();
        wrong.tablespaces = 1;
        assert!(matches!(
            Cluster::clone_from(&midna, &peer(&alp), &wrong, &mut |_| {}).await,
            Err(PgError::Refused(_))
        ));
        wrong = facts.clone();
        wrong.system_id.0 += 1;
        let error = Cluster::clone_from(&midna, &peer(&alp), &wrong, &mut |_| {}).await.expect_err("another cluster");
        assert!(error.to_string().contains("another cluster"), "{error}");
        let mut nobody = peer(&alp);
        nobody.port = 1;
        let error = Cluster::clone_from(&midna, &nobody, &facts, &mut |_| {}).await.expect_err("nobody there");
        assert!(error.to_string().contains("Connection refused"), "{error}");
        assert_eq!(fs::read_to_string(data.join("precious")).expect("read"), "kept");
        assert!(!base.dir.join("midna/data.portcullis-new/data").exists(), "a failed copy takes no room");
        midna.start(LIMIT).await.expect("the old directory still starts");
        sql(&midna, "ALTER SYSTEM SET cluster_name = 'of-midna'").await;
        midna.stop(StopMode::Fast, LIMIT).await.expect("stop");

        // A crash between the two renames: the old directory is aside, and a copy beside the empty place.
        let fresh = base.dir.join("midna/data.portcullis-new");
        let marker = fs::read_to_string(fresh.join("PORTCULLIS-CLONE")).expect("left by the failed clones");
        let aside = base.dir.join("midna/data.set-aside-20260101T000000Z");
        fs::rename(data, &aside).expect("rename");
        let told = marker.replace(&data.display().to_string(), &aside.display().to_string());
        assert_ne!(told, marker);
        fs::write(fresh.join("PORTCULLIS-CLONE"), told).expect("write");
        fs::create_dir_all(fresh.join("data/base")).expect("mkdir");
        assert_eq!(clone(&midna, &alp).await.as_ref(), Some(&aside), "told where it is since the crash");
        assert_eq!(fs::read_to_string(aside.join("precious")).expect("read"), "kept");
        midna.start(LIMIT).await.expect("start");
        wait_streaming(&alp, "midna").await;
        assert_eq!(sql(&midna, "SHOW cluster_name").await, "of-midna", "taken from the directory set aside");
    });
}

#[test]
fn a_primary_is_demoted_under_its_clients_and_follows_the_new_one() {
    as_postgres("a_primary_is_demoted_under_its_clients_and_follows_the_new_one", |base| async move {
        let (alp, midna) = base.pair().await;
        sql(&alp, "CREATE TABLE t (i int)").await;
        let busy = client(&alp).await;
        let sleeper = tokio::spawn(async move { busy.simple_query("SELECT pg_sleep(600)").await });
        let sleeping = "SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'SELECT pg_sleep%'";
        until("busy", || async { sql(&alp, sleeping).await == "1" }).await;

        let stopped = alp.demote(None, LIMIT, LIMIT).await.expect("demote");
        assert_eq!(stopped.how, StopHow::Fast);
        assert!(sleeper.await.expect("join").is_err(), "the client was cut");
        let report = look(&alp).await;
        assert!(report.in_recovery && !report.streaming);
        let refused = client(&alp).await.simple_query("INSERT INTO t VALUES (1)").await;
        assert_eq!(refused.expect_err("read-only").code().expect("code").code(), "25006");
        alp.demote(None, LIMIT, LIMIT).await.expect("again");

        // The switched-over standby has everything up to the shutdown checkpoint, and becomes the primary, although
        // somebody had paused its replay.
        sql(&midna, "SELECT pg_wal_replay_pause()").await;
        let begun = clock::now();
        midna.promote(LIMIT).await.expect("promote");
        println!("promoted after {:?}", clock::now().since(begun));
        sql(&midna, "INSERT INTO t VALUES (2)").await;

        midna.ensure_replication_role(LIMIT).await.expect("role is there");
        midna.ensure_slot(&slot_name(&alp.node), LIMIT).await.expect("slot");
        alp.follow(Some(&peer(&midna)), LIMIT).await.expect("follow");
        wait_streaming(&midna, "alp").await;
        until("replayed", || async { sql(&alp, "SELECT count(*) FROM t").await == "1" }).await;
        until("timeline", || async { look(&alp).await.timeline.0 == 2 }).await;
        assert_eq!(sql(&alp, "SELECT count(*) FROM pg_replication_slots").await, "0", "its old slot holds no WAL");
        alp.follow(None, LIMIT).await.expect("nobody");
        until("no longer streaming", || async { !look(&alp).await.streaming }).await;

        let guest = client(&midna).await;
        midna.terminate_clients(LIMIT).await.expect("terminate");
        until("ended", || async { guest.is_closed() }).await;
        midna.checkpoint(LIMIT).await.expect("checkpoint");
    });
}

#[test]
fn a_stop_gets_harder_until_nothing_is_left() {
    as_postgres("a_stop_gets_harder_until_nothing_is_left", |base| async move {
        let (alp, midna) = base.pair().await;
        alp.start(LIMIT).await.expect("starting what runs is fine");

        // Frozen: nobody waits for the checkpoint's minutes to find out. Thawed, and stopped the clean way.
        assert_eq!(alp.reach(LIMIT).await, Ok(()));
        send(postmaster(&alp), Signal::STOP);
        assert!(alp.is_running());
        let silent = alp.reach(Duration::from_millis(500)).await;
        assert!(matches!(&silent, Err(PgLost::Silent(_))), "{silent:?}");
        let stopped = alp.stop(StopMode::Fast, LIMIT).await.expect("stop");
        assert_eq!(stopped.how, StopHow::Fast);
        assert_eq!(alp.control_data().await.expect("control data").state, "shut down");
        assert_eq!(alp.stop(StopMode::Fast, LIMIT).await.expect("again").how, StopHow::AlreadyDown);
        assert!(!alp.is_running());
        assert!(matches!(Watcher::new(Arc::clone(&alp)).observe(LIMIT).await, Err(PgLost::Down(_))));
        assert!(matches!(alp.checkpoint(LIMIT).await, Err(PgError::Down(_))));
        assert!(matches!(alp.reach(LIMIT).await, Err(PgLost::Down(_))));
        alp.start(LIMIT).await.expect("start");
        wait_streaming(&alp, "midna").await;

        // Out of descriptors nothing can be looked at: that is no "already down", and nobody may touch the directory.
        {
            use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
            let limit = getrlimit(Resource::Nofile);
            setrlimit(Resource::Nofile, Rlimit { current: Some(3), maximum: limit.maximum }).expect("lowered");
            let (blind, running) = (alp.stop(StopMode::Fast, LIMIT).await, alp.is_running());
            let standby = alp.make_standby(None);
            setrlimit(Resource::Nofile, limit).expect("raised again");
            assert!(matches!(&blind, Err(PgError::Failed(why)) if why.contains("descriptors")), "{blind:?}");
            assert!(running && matches!(standby, Err(PgError::Refused(_))), "{standby:?}");
            assert_eq!(sql(&alp, "SELECT pg_is_in_recovery()").await, "f", "it ran all the while");
        }

        // A standby that does not take the last WAL holds up a fast stop: immediate after the limit.
        send(pid(&midna, "SELECT pid FROM pg_stat_wal_receiver").await, Signal::STOP);
        let stopped = alp.stop(StopMode::Fast, Duration::from_millis(500)).await.expect("stop");
        assert_eq!(stopped.how, StopHow::Immediate);
        println!("figure: a fast stop that hung, then immediate: {:?}", stopped.took);
        alp.start(LIMIT).await.expect("recovers");

        // A backend that outlives its postmaster (frozen, so that it cannot notice) is killed, and a start does so too.
        for start in [false, true] {
            let holder = client(&alp).await;
            let backend = holder.query_one("SELECT pg_backend_pid()", &[]).await.expect("pid").get::<_, i32>(0);
            let backend = rustix::process::Pid::from_raw(backend).expect("pid");
            send(backend, Signal::STOP);
            send(postmaster(&alp), Signal::KILL);
            until("postmaster dead", || async { !alp.is_running() }).await;
            if start {
                alp.start(LIMIT).await.expect("start");
            } else {
                assert_eq!(alp.stop(StopMode::Fast, LIMIT).await.expect("stop").how, StopHow::Killed);
                alp.start(LIMIT).await.expect("start");
            }
            assert_eq!(sql(&alp, "SELECT 1").await, "1");
        }
    });
}

#[test]
fn a_start_that_fails_says_why() {
    as_postgres("a_start_that_fails_says_why", |base| async move {
        let alp = base.primary("alp").await;
        assert!(matches!(alp.make_standby(None), Err(PgError::Refused(_))), "it runs");
        alp.stop(StopMode::Fast, LIMIT).await.expect("stop");
        let auto = alp.settings.data_dir.join("postgresql.auto.conf");
        fs::write(&auto, "shared_preload_libraries = 'not_there'\n").expect("write");
        let error = alp.start(LIMIT).await.expect_err("bad library");
        assert!(
            matches!(&error, PgError::Failed(text) if text.contains("could not access file \"not_there\"")),
            "{error}"
        );
        fs::remove_file(&auto).expect("remove");

        // A configured start and stop command: its output is a file, so that PostgreSQL hangs on no pipe of ours.
        let list = |words: &str| words.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
        let mut own = Cluster::clone(&alp);
        let data = alp.settings.data_dir.display();
        own.settings.start = Some(list(&format!("{}/pg_ctl start -w -D {data}", pair::BIN)));
        own.settings.stop = Some(list(&format!("{}/pg_ctl stop -m fast -D {data}", pair::BIN)));
        own.start(LIMIT).await.expect("start by command");
        let out = fs::read_link(format!("/proc/{}/fd/2", postmaster(&own).as_raw_nonzero())).expect("fd");
        assert!(out.starts_with(&own.state_dir), "{}", out.display());
        assert_eq!(own.stop(StopMode::Fast, LIMIT).await.expect("stop by command").how, StopHow::Fast);
        own.settings.start = Some(list("/bin/false"));
        assert!(matches!(own.start(LIMIT).await, Err(PgError::Failed(_))));
        assert!(matches!(base.node("none").start(LIMIT).await, Err(PgError::Refused(_))), "no cluster there");
    });
}
