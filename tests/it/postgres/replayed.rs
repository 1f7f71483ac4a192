//! What a standby without a walreceiver says of its timeline, and what a promotion that was cut short leaves.

use crate::pair::{LIMIT, as_postgres, peer, sql, until, wait_streaming};
use portcullis::engine::report::PgReport;
use portcullis::io::postgres::{Cluster, StopMode, Watcher, clear_cut_short, slot_name};
use std::sync::Arc;

async fn first_look(node: &Arc<Cluster>) -> PgReport {
    Watcher::new(Arc::clone(node)).observe(LIMIT).await.expect("report")
}

/// The control file names the last restart point's timeline; nobody who looks for the first time has seen another one.
#[test]
fn a_standby_without_its_primary_tells_the_timeline_that_it_replayed() {
    as_postgres("replayed::a_standby_without_its_primary_tells_the_timeline_that_it_replayed", |base| async move {
        let (alp, midna) = base.pair().await;
        // A page written out would take the control file along.
        sql(&alp, "ALTER SYSTEM SET bgwriter_lru_maxpages = 0").await;
        sql(&alp, "CREATE TABLE t (i int)").await;
        alp.demote(None, LIMIT, LIMIT).await.expect("demote");
        midna.promote(LIMIT).await.expect("promote");
        midna.ensure_slot(&slot_name(&alp.node), LIMIT).await.expect("slot");
        alp.follow(Some(&peer(&midna)), LIMIT).await.expect("follow");
        wait_streaming(&midna, "alp").await;
        sql(&midna, "INSERT INTO t SELECT generate_series(1, 1000)").await;
        let confirmed = sql(&midna, "SELECT pg_current_wal_flush_lsn()").await;
        let there = format!("SELECT pg_last_wal_replay_lsn() >= '{confirmed}'");
        until("replayed", || async { sql(&alp, &there).await == "t" }).await;
        midna.stop(StopMode::Immediate, LIMIT).await.expect("the primary is gone");
        until("no walreceiver", || async { sql(&alp, "SELECT count(*) FROM pg_stat_wal_receiver").await == "0" }).await;

        let control = "SELECT greatest((SELECT timeline_id FROM pg_control_checkpoint()), \
                       (SELECT min_recovery_end_timeline FROM pg_control_recovery()))";
        assert_eq!(sql(&alp, control).await, "1", "else this proves nothing");
        let confirmed = confirmed.parse().expect("LSN");
        let report = first_look(&alp).await;
        assert!(report.in_recovery && !report.streaming, "{report:?}");
        assert_eq!(report.timeline.0, 2, "{report:?}");
        assert!(report.lsn >= confirmed, "{report:?}, confirmed {confirmed}");

        // The same after a restart of PostgreSQL, which has received nothing in this life.
        alp.stop(StopMode::Immediate, LIMIT).await.expect("stop");
        alp.start(LIMIT).await.expect("start");
        until("the same again", || async {
            let report = first_look(&alp).await;
            report.timeline.0 == 2 && report.lsn >= confirmed
        })
        .await;

        // A promotion under way keeps what keeps numbers from being used; one that was cut short does not.
        let skipped = alp.settings.data_dir.join("pg_wal/00000009.history");
        std::fs::write(&skipped, "# portcullis: this number was used by another promotion\n").expect("written");
        clear_cut_short(&alp.settings.data_dir);
        assert!(skipped.exists(), "PostgreSQL runs");
        assert_eq!(first_look(&alp).await.timeline.0, 2, "it names no timeline");
        alp.stop(StopMode::Immediate, LIMIT).await.expect("stop");
        clear_cut_short(&alp.settings.data_dir);
        assert!(!skipped.exists());
    });
}
