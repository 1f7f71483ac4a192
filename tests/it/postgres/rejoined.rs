//! Rejoin by following, by pg_rewind and by a clone, as the histories of the two clusters ask for it.

use super::pair::{Base, LIMIT, as_postgres, clone, peer, sql, until, wait_streaming};
use portcullis::base::ids::TimelineId;
use portcullis::engine::report::{RejoinHow, SourceFacts};
use portcullis::io::postgres::{Cluster, PgError, Rejoined, StopMode, Tick, is_rewind_broken, slot_name};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::sync::Arc;

/// A streaming pair that pg_rewind can be used on, each side with a setting of its own.
pub async fn pair(base: &Base) -> (Arc<Cluster>, Arc<Cluster>) {
    let alp = base.primary("alp").await;
    sql(&alp, "ALTER SYSTEM SET wal_log_hints = on").await;
    sql(&alp, "ALTER SYSTEM SET cluster_name = 'of-alp'").await;
    sql(&alp, "ALTER SYSTEM SET wal_keep_size = '512MB'").await;
    alp.stop(StopMode::Fast, LIMIT).await.expect("stop");
    alp.start(LIMIT).await.expect("start");
    let midna = base.node("midna");
    clone(&midna, &alp).await;
    midna.start(LIMIT).await.expect("start");
    wait_streaming(&alp, "midna").await;
    sql(&midna, "ALTER SYSTEM SET cluster_name = 'of-midna'").await;
    sql(&alp, "CREATE TABLE t (i int)").await;
    (alp, midna)
}

pub async fn facts(source: &Cluster, target: &Cluster) -> SourceFacts {
    source.ensure_replication_role(LIMIT).await.expect("role");
    source.ensure_slot(&slot_name(&target.node), LIMIT).await.expect("slot");
    source.look_as_source(None, LIMIT).await.expect("facts")
}

/// Waits until `standby` has replayed all that `primary` has now.
pub async fn caught_up(standby: &Cluster, primary: &Cluster) {
    let lsn = sql(primary, "SELECT pg_current_wal_insert_lsn()").await;
    let text = format!("SELECT pg_last_wal_replay_lsn() >= '{lsn}'");
    until("caught up", || async { sql(standby, &text).await == "t" }).await;
}

/// midna is promoted while alp goes on: three transactions that only alp has, and one that only midna has.
pub async fn diverge(alp: &Cluster, midna: &Cluster) {
    caught_up(midna, alp).await;
    midna.promote(LIMIT).await.expect("promote");
    for i in [1, 2, 3] {
        sql(alp, &format!("INSERT INTO t VALUES ({i})")).await;
    }
    sql(midna, "INSERT INTO t VALUES (100)").await;
    sql(midna, "ALTER SYSTEM SET work_mem = '7MB'").await;
}

pub async fn rejoin(target: &Cluster, source: &Cluster, facts: &SourceFacts) -> (Rejoined, Vec<Tick>) {
    let mut ticks = Vec::new();
    let done = target.rejoin(&peer(source), facts, &mut |tick| ticks.push(tick)).await;
    (done.unwrap_or_else(|error| panic!("{error}: {ticks:?}")), ticks)
}

/// It follows, has the other's rows alone, and its own port, socket and name.
pub async fn is_standby_of(target: &Cluster, source: &Cluster, rows: &str) {
    target.start(LIMIT).await.expect("start");
    wait_streaming(source, target.node.as_str()).await;
    caught_up(target, source).await;
    assert_eq!(sql(target, "SELECT coalesce(string_agg(i::text, ',' ORDER BY i), '') FROM t").await, rows);
    assert_eq!(sql(target, "SHOW port").await, target.settings.port.to_string());
    let socket = target.settings.socket_dir.display().to_string();
    assert_eq!(sql(target, "SHOW unix_socket_directories").await, socket);
    assert_eq!(sql(target, "SHOW cluster_name").await, format!("of-{}", target.node));
    assert_eq!(sql(target, "SHOW synchronous_standby_names").await, "");
    assert_eq!(sql(target, "SHOW primary_slot_name").await, slot_name(&target.node));
    let mode = fs::metadata(&target.settings.data_dir).expect("meta").permissions().mode();
    assert_eq!(mode & 0o777, 0o700);
    assert!(!target.state_dir.join("rewind-under-way").exists());
}

pub fn entries_like(base: &Base, infix: &str) -> Vec<PathBuf> {
    let dir = fs::read_dir(base.dir.join("alp")).expect("dir").flatten().map(|entry| entry.path());
    dir.filter(|path| path.to_string_lossy().contains(infix)).collect()
}

#[test]
fn a_diverged_node_is_rewound_and_what_it_had_alone_is_kept() {
    as_postgres("rejoined::a_diverged_node_is_rewound_and_what_it_had_alone_is_kept", |base| async move {
        let (alp, midna) = pair(&base).await;
        diverge(&alp, &midna).await;
        sql(&alp, "ALTER SYSTEM SET work_mem = '6MB'").await;
        let facts = facts(&midna, &alp).await;
        assert_eq!((facts.timeline, facts.control_timeline, facts.history.len()), (TimelineId(2), TimelineId(2), 1));
        let plan = alp.plan_rejoin(&facts).await.expect("a plan while it runs");
        assert_eq!((plan.how, &plan.refusal), (RejoinHow::Rewind, &None), "{plan:?}");
        assert!(plan.why.starts_with("3 transactions were committed here alone since "), "{}", plan.why);
        let running = alp.rejoin(&peer(&midna), &facts, &mut |_| {}).await;
        assert!(matches!(running, Err(PgError::Refused(_))), "{running:?}");

        alp.stop(StopMode::Fast, LIMIT).await.expect("stop");
        // What neither PostgreSQL nor the source knows; a folder of that name the source has, too.
        let data = &alp.settings.data_dir;
        fs::write(data.join("precious.pem"), "alp's").expect("write");
        for (node, name) in [(&alp, "alp.log"), (&midna, "midna.log")] {
            fs::create_dir(node.settings.data_dir.join("log")).expect("mkdir");
            fs::write(node.settings.data_dir.join("log").join(name), name).expect("write");
        }
        let (done, ticks) = rejoin(&alp, &midna, &facts).await;
        assert_eq!(done.how, RejoinHow::Rewind, "{ticks:?}");
        assert_eq!(fs::read_to_string(data.join("precious.pem")).expect("kept"), "alp's");
        assert!(data.join("log/alp.log").exists() && !data.join("log/midna.log").exists());
        assert!(ticks.iter().any(|tick| matches!(tick, Tick::Diverged { transactions: 3, .. })), "{ticks:?}");
        assert!(ticks.iter().any(|tick| matches!(tick, Tick::Bytes { .. })), "{ticks:?}");
        is_standby_of(&alp, &midna, "100").await;
        assert_eq!(sql(&alp, "SHOW work_mem").await, "7MB", "the cluster's");

        // What only alp had can still be read.
        let kept = done.aside.expect("kept");
        assert!(entries_like(&base, ".diverged-").iter().eq([&kept]));
        let report: serde_json::Value =
            serde_json::from_slice(&fs::read(kept.join("report.json")).expect("report")).expect("JSON");
        assert_eq!(report["diverged_transactions"], 3);
        let at = report["diverged_at"].as_str().expect("LSN").to_owned();
        let dump = std::process::Command::new(format!("{}/pg_waldump", super::pair::BIN))
            .args(["--rmgr=Transaction", "-t", "1", "-s", &at, "-p"])
            .arg(kept.join("wal"))
            .output()
            .expect("pg_waldump");
        let dump = String::from_utf8_lossy(&dump.stdout).into_owned();
        assert_eq!(dump.lines().filter(|line| line.contains("desc: COMMIT")).count(), 3, "{dump}");
        assert!(kept.join("pg_control").exists() && kept.join("own/postgresql.auto.conf").exists());

        // On a later timeline, too, the report's own command shows them.
        diverge(&midna, &alp).await;
        midna.stop(StopMode::Fast, LIMIT).await.expect("stop");
        let back = self::facts(&alp, &midna).await;
        let (done, ticks) = rejoin(&midna, &alp, &back).await;
        assert_eq!(done.how, RejoinHow::Rewind, "{ticks:?}");
        let report = fs::read(done.aside.expect("kept").join("report.json")).expect("report");
        let report: serde_json::Value = serde_json::from_slice(&report).expect("JSON");
        let look = report["look"].as_str().expect("a command");
        assert!(look.contains(" -t 2 "), "{look}");
        let dump = std::process::Command::new("sh").args(["-c", look]).output().expect("sh");
        let dump = String::from_utf8_lossy(&dump.stdout).into_owned();
        assert_eq!(dump.lines().filter(|line| line.contains("desc: COMMIT")).count(), 3, "{look}: {dump}");

        // No superuser is used over the network, and no password shown.
        let log = fs::read_to_string(midna.state_dir.join("postgresql-midna.log")).expect("log");
        assert!(log.contains("application_name=portcullis-rewind") && !log.contains("s3cr"));
        assert!(!log.lines().any(|line| line.contains("portcullis-rewind") && !line.contains("user=replicator")));
    });
}

/// The same rejoin again and again, broken off at the first thing it says, then at the second, ...; how it ended, and
/// whether it ever left a half-rewound directory.
pub async fn broken_off_everywhere(alp: &Cluster, midna: &Cluster, facts: &SourceFacts) -> (Rejoined, bool) {
    let data = &alp.settings.data_dir;
    let (mut half, mut broken) = (false, 0_u32);
    let last = loop {
        let (mut seen, enough) = (0_u32, tokio::sync::Notify::new());
        let mut tell = |_| {
            seen += 1;
            if seen > broken {
                enough.notify_one();
            }
        };
        let peer = peer(midna);
        let done = tokio::select! {
            biased;
            () = enough.notified() => None,
            done = alp.rejoin(&peer, facts, &mut tell) => Some(done),
        };
        if let Some(done) = done {
            break done.expect("at last");
        }
        broken += 1;
        assert!(broken < 1000, "it never ends");
        // What a person or a unit would do now: it starts as what it was, or not at all.
        let mode = fs::metadata(data).map(|meta| meta.permissions().mode() & 0o777);
        if matches!(mode, Ok(0o701)) {
            half = true;
            let refused = alp.start(LIMIT).await;
            assert!(matches!(&refused, Err(PgError::Refused(why)) if why.contains("rejoin")), "{refused:?}");
            let demoted = alp.demote(None, LIMIT, LIMIT).await;
            assert!(matches!(&demoted, Err(PgError::Refused(why)) if why.contains("rejoin")), "{demoted:?}");
            let said = std::process::Command::new(format!("{}/postgres", super::pair::BIN))
                .arg("-D")
                .arg(data)
                .output()
                .expect("postgres");
            let said = String::from_utf8_lossy(&said.stderr).into_owned();
            assert!(said.contains("invalid permissions"), "{said}");
            // A person reads that, and obeys.
            fs::set_permissions(data, fs::Permissions::from_mode(0o700)).expect("chmod");
            assert!(is_rewind_broken(&alp.state_dir, data), "the unit is told");
            let refused = alp.start(LIMIT).await;
            assert!(matches!(&refused, Err(PgError::Refused(why)) if why.contains("rejoin")), "{refused:?}");
            let plan = alp.plan_rejoin(facts).await.expect("a plan");
            assert!(plan.refusal.is_none() && plan.why.starts_with("a rewind was "), "{plan:?}");
        } else if alp.is_running() {
            alp.stop(StopMode::Fast, LIMIT).await.expect("stop");
        }
    };
    println!("broken off {broken} times, half-rewound: {half}; ended as {:?}", last.how);
    assert!(broken > 3, "broken off {broken} times");
    (last, half)
}

/// Rows that both had, changed on both sides since: by blocks, by whole files, and by what only one side did.
pub async fn diverge_much(alp: &Cluster, midna: &Cluster) {
    sql(alp, "CREATE TABLE big AS SELECT i, repeat('x', 100) AS t FROM generate_series(1, 60000) AS i").await;
    sql(alp, "ALTER TABLE big ADD PRIMARY KEY (i)").await;
    sql(alp, "CREATE TABLE gone_here AS SELECT * FROM big").await;
    sql(alp, "CREATE TABLE cut_here AS SELECT * FROM big").await;
    sql(alp, "CHECKPOINT").await;
    diverge(alp, midna).await;
    sql(alp, "UPDATE big SET t = 'alp' WHERE i % 7 = 0").await;
    sql(alp, "DROP TABLE gone_here").await;
    sql(alp, "DELETE FROM cut_here WHERE i > 100").await;
    sql(alp, "VACUUM cut_here").await;
    sql(alp, "CREATE TABLE only_here AS SELECT * FROM big").await;
    sql(alp, "CHECKPOINT").await;
    sql(midna, "UPDATE big SET t = 'midna' WHERE i % 5 = 0").await;
    sql(midna, "CREATE TABLE only_there AS SELECT * FROM big").await;
    sql(midna, "CHECKPOINT").await;
}

/// All of it is read, by way of the index as well.
pub async fn has_all_of(alp: &Cluster, midna: &Cluster) {
    for text in [
        "SELECT md5(string_agg(t::text, ',' ORDER BY i)) FROM big t",
        "SELECT md5(string_agg(t::text, ',' ORDER BY i)) FROM gone_here t",
        "SELECT md5(string_agg(t::text, ',' ORDER BY i)) FROM cut_here t",
        "SELECT md5(string_agg(t::text, ',' ORDER BY i)) FROM only_there t",
        "SET enable_seqscan = off; SELECT count(*) || ' ' || sum(i) FROM big WHERE i > 0",
        "SELECT coalesce(to_regclass('only_here')::text, 'none')",
    ] {
        assert_eq!(sql(alp, text).await, sql(midna, text).await, "{text}");
    }
}

#[test]
fn a_rewind_that_is_broken_off_anywhere_is_done_again() {
    as_postgres("rejoined::a_rewind_that_is_broken_off_anywhere_is_done_again", |base| async move {
        let (alp, midna) = pair(&base).await;
        diverge_much(&alp, &midna).await;
        // Crashed: recovered without ever being writable, first.
        alp.stop(StopMode::Immediate, LIMIT).await.expect("stop");
        let facts = facts(&midna, &alp).await;
        let data = &alp.settings.data_dir;
        fs::write(data.join("precious.pem"), "alp's").expect("write");
        let (last, half) = broken_off_everywhere(&alp, &midna, &facts).await;
        assert!(half, "it never was half-rewound");
        assert_eq!(last.how, RejoinHow::Rewind);
        assert_eq!(fs::read_to_string(data.join("precious.pem")).expect("kept"), "alp's");
        // One end is kept, however often it was begun.
        assert!(entries_like(&base, ".set-aside-").is_empty());
        let kept = last.aside.expect("kept");
        assert!(kept.join("wal").exists() && entries_like(&base, ".diverged-").contains(&kept));
        is_standby_of(&alp, &midna, "100").await;
        has_all_of(&alp, &midna).await;
    });
}

#[test]
fn a_rewind_that_cannot_be_done_again_is_followed_by_a_clone() {
    as_postgres("rejoined::a_rewind_that_cannot_be_done_again_is_followed_by_a_clone", |base| async move {
        let (alp, midna) = pair(&base).await;
        diverge(&alp, &midna).await;
        alp.stop(StopMode::Fast, LIMIT).await.expect("stop");
        let facts = facts(&midna, &alp).await;
        let half = loop_until_half(&alp, &midna, &facts).await;
        // As after a boot: what was never synced may be gone.
        let begun = half.join("begun.json");
        let text = fs::read_to_string(&begun).expect("begun");
        let boot = portcullis::io::clock::boot_id().expect("boot");
        fs::write(&begun, text.replace(&boot, "another")).expect("write");
        let plan = alp.plan_rejoin(&facts).await.expect("plan");
        assert!(plan.how == RejoinHow::Clone && plan.why.contains("this machine has booted since"), "{plan:?}");
        let (done, ticks) = rejoin(&alp, &midna, &facts).await;
        assert_eq!(done.how, RejoinHow::Clone, "{ticks:?}");
        let aside = done.aside.expect("set aside");
        assert!(aside.join("PG_VERSION").exists());
        let mode = fs::metadata(&aside).expect("meta").permissions().mode();
        assert_eq!(mode & 0o777, 0o701, "nobody starts the half-rewound one");
        is_standby_of(&alp, &midna, "100").await;
    });
}

/// Broken off when `pg_rewind` moves bytes; gives what is kept.
pub async fn loop_until_half(alp: &Cluster, midna: &Cluster, facts: &SourceFacts) -> PathBuf {
    let enough = tokio::sync::Notify::new();
    let mut tell = |tick| {
        if matches!(tick, Tick::Bytes { done, .. } if done > 0) {
            enough.notify_one();
        }
    };
    let peer = peer(midna);
    tokio::select! {
        biased;
        () = enough.notified() => {}
        done = alp.rejoin(&peer, facts, &mut tell) => panic!("it ended: {done:?}"),
    }
    let mark = fs::read_to_string(alp.state_dir.join("rewind-under-way")).expect("a mark");
    PathBuf::from(mark.trim_end().strip_prefix("rewinding 700 ").expect("rewinding"))
}

#[test]
fn missing_wal_is_fetched_and_a_crashed_node_is_rewound() {
    as_postgres("rejoined::missing_wal_is_fetched_and_a_crashed_node_is_rewound", |base| async move {
        let (alp, midna) = pair(&base).await;
        sql(&alp, "CHECKPOINT").await;
        let segment = sql(&alp, "SELECT pg_walfile_name(pg_switch_wal())").await;
        sql(&alp, "INSERT INTO t VALUES (0)").await;
        let needed = sql(&alp, "SELECT pg_walfile_name(pg_switch_wal())").await;
        assert_ne!(segment, needed);
        sql(&alp, "INSERT INTO t VALUES (0)").await;
        diverge(&alp, &midna).await;
        alp.stop(StopMode::Immediate, LIMIT).await.expect("stop");
        // Recovered by its own start, so that its last checkpoint is after the fork.
        alp.start(LIMIT).await.expect("start");
        alp.stop(StopMode::Immediate, LIMIT).await.expect("stop");
        fs::remove_file(alp.settings.data_dir.join("pg_wal").join(&needed)).expect("remove");
        let (done, ticks) = rejoin(&alp, &midna, &facts(&midna, &alp).await).await;
        let fetched = |tick: &Tick| matches!(tick, Tick::Words(text) if text.contains(&needed));
        assert!(done.how == RejoinHow::Rewind && ticks.iter().any(fetched), "{ticks:?}");
        is_standby_of(&alp, &midna, "0,0,100").await;
    });
}

#[test]
fn who_never_left_the_history_only_follows() {
    as_postgres("rejoined::who_never_left_the_history_only_follows", |base| async move {
        let (alp, midna) = pair(&base).await;
        sql(&alp, "INSERT INTO t VALUES (1)").await;
        alp.stop(StopMode::Fast, LIMIT).await.expect("stop");
        midna.promote(LIMIT).await.expect("promote");
        sql(&midna, "INSERT INTO t VALUES (2)").await;
        let source = facts(&midna, &alp).await;
        let plan = alp.plan_rejoin(&source).await.expect("plan");
        assert_eq!(plan.how, RejoinHow::Follow, "{plan:?}");
        let asked = midna.look_as_source(plan.tail.as_ref(), LIMIT).await.expect("facts");
        assert_ne!(asked.same_tail, Some(false), "{plan:?}");
        let (done, _) = rejoin(&alp, &midna, &asked).await;
        assert_eq!((done.how, done.aside), (RejoinHow::Follow, None));
        is_standby_of(&alp, &midna, "1,2").await;

        // On one timeline; the end of its WAL is proven to be the same.
        alp.stop(StopMode::Immediate, LIMIT).await.expect("stop");
        sql(&midna, "INSERT INTO t VALUES (3)").await;
        let plan = alp.plan_rejoin(&facts(&midna, &alp).await).await.expect("plan");
        let asked = midna.look_as_source(plan.tail.as_ref(), LIMIT).await.expect("facts");
        assert_eq!((plan.how, asked.same_tail), (RejoinHow::Follow, Some(true)), "{plan:?}");
        assert_eq!(rejoin(&alp, &midna, &asked).await.0.how, RejoinHow::Follow);
        is_standby_of(&alp, &midna, "1,2,3").await;

        // Another cluster is not touched; nothing at all is cloned.
        let mut foreign = asked.clone();
        foreign.system_id.0 += 1;
        let refusal = alp.plan_rejoin(&foreign).await.expect("plan").refusal.expect("refused");
        assert!(refusal.contains("another cluster") && refusal.contains("mv "), "{refusal}");
        let plan = base.node("none").plan_rejoin(&asked).await.expect("plan");
        assert!(plan.how == RejoinHow::Clone && plan.why.contains("there is no cluster"), "{plan:?}");
        let huge = SourceFacts { bytes: u64::MAX / 4, ..asked };
        let refusal = base.node("none").plan_rejoin(&huge).await.expect("plan").refusal.expect("refused");
        assert!(refusal.contains(" free, beside the old directory the copy needs "), "{refusal}");
    });
}

/// alp, stopped, becomes a primary on a timeline of its own, as after a promote.
async fn promote_too(alp: &Cluster, above: u32) {
    alp.make_standby(None).expect("standby");
    alp.start(LIMIT).await.expect("start");
    alp.promote_above(TimelineId(above), LIMIT).await.expect("promote");
}

#[test]
fn p14_one_timeline_number_with_two_histories_is_cloned() {
    as_postgres("rejoined::p14_one_timeline_number_with_two_histories_is_cloned", |base| async move {
        let (alp, midna) = pair(&base).await;
        diverge(&alp, &midna).await;
        alp.stop(StopMode::Fast, LIMIT).await.expect("stop");
        promote_too(&alp, 0).await;
        sql(&alp, "INSERT INTO t VALUES (4)").await;
        alp.stop(StopMode::Fast, LIMIT).await.expect("stop");
        let facts = facts(&midna, &alp).await;
        let plan = alp.plan_rejoin(&facts).await.expect("plan");
        assert!(plan.how == RejoinHow::Clone && plan.why.contains("timeline 2 exists twice"), "{plan:?}");
        let (done, ticks) = rejoin(&alp, &midna, &facts).await;
        assert_eq!(done.how, RejoinHow::Clone);
        assert!(ticks.iter().any(|tick| matches!(tick, Tick::Diverged { transactions: 4, .. })), "{ticks:?}");
        is_standby_of(&alp, &midna, "100").await;
    });
}

#[test]
fn p14_a_number_used_twice_at_the_same_place_is_seen_in_the_wal() {
    as_postgres("rejoined::p14_a_number_used_twice_at_the_same_place_is_seen_in_the_wal", |base| async move {
        let (alp, midna) = pair(&base).await;
        caught_up(&midna, &alp).await;
        alp.stop(StopMode::Fast, LIMIT).await.expect("stop");
        midna.promote(LIMIT).await.expect("promote");
        sql(&midna, "INSERT INTO t VALUES (1)").await;
        promote_too(&alp, 0).await;
        alp.stop(StopMode::Immediate, LIMIT).await.expect("stop");
        let source = facts(&midna, &alp).await;
        let plan = alp.plan_rejoin(&source).await.expect("plan");
        assert_eq!(plan.how, RejoinHow::Follow, "equal histories as far as files tell: {plan:?}");
        let asked = midna.look_as_source(plan.tail.as_ref(), LIMIT).await.expect("facts");
        assert_eq!(asked.same_tail, Some(false), "{plan:?}");
        assert_eq!(rejoin(&alp, &midna, &asked).await.0.how, RejoinHow::Clone);
        is_standby_of(&alp, &midna, "1").await;
    });
}

#[test]
fn p14_a_promotion_skips_the_numbers_that_somebody_used() {
    as_postgres("rejoined::p14_a_promotion_skips_the_numbers_that_somebody_used", |base| async move {
        let (alp, midna) = pair(&base).await;
        diverge(&alp, &midna).await;
        alp.stop(StopMode::Fast, LIMIT).await.expect("stop");
        promote_too(&alp, 4).await;
        let timeline = "SELECT substr(pg_walfile_name(pg_current_wal_insert_lsn()), 1, 8)";
        assert_eq!(sql(&alp, timeline).await, "00000005");
        let wal = alp.settings.data_dir.join("pg_wal");
        for skipped in ["00000002.history", "00000003.history", "00000004.history"] {
            assert!(wal.join(skipped).exists(), "a standby asks for {skipped} on its way to the fifth");
        }
        let history = fs::read_to_string(wal.join("00000005.history")).expect("history");
        assert_eq!(history.lines().filter(|line| !line.is_empty()).count(), 1, "{history}");

        // Killed between the files and the promotion: they keep no standby from starting.
        midna.stop(StopMode::Fast, LIMIT).await.expect("stop");
        midna.make_standby(None).expect("standby");
        let left = midna.settings.data_dir.join("pg_wal/00000003.history");
        fs::write(&left, "# portcullis: this number was used by another promotion\n").expect("write");
        midna.start(LIMIT).await.expect("start");
        assert!(!left.exists());

        // The other way round: midna on 2 is rewound to alp on 5.
        midna.stop(StopMode::Fast, LIMIT).await.expect("stop");
        let (done, ticks) = rejoin(&midna, &alp, &facts(&alp, &midna).await).await;
        assert_eq!(done.how, RejoinHow::Rewind, "{ticks:?}");
        is_standby_of(&midna, &alp, "1,2,3").await;
    });
}
