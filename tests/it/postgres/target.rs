//! A standby that somebody gave a recovery target: a promote replays all that was received all the same.

use crate::pair::{LIMIT, as_postgres, sql, until};
use portcullis::io::postgres::StopMode;
use std::io::Write;

#[test]
fn a_recovery_target_loses_nothing_that_was_received() {
    as_postgres("target::a_recovery_target_loses_nothing_that_was_received", |base| async move {
        let (alp, midna) = base.pair().await;
        sql(&alp, "CREATE TABLE t (i int); INSERT INTO t VALUES (1)").await;
        let target = sql(&alp, "SELECT pg_current_wal_insert_lsn()").await;
        midna.stop(StopMode::Fast, LIMIT).await.expect("stop");
        // As an administrator would: not in the file that ALTER SYSTEM writes.
        let path = midna.settings.data_dir.join("postgresql.conf");
        let mut conf = std::fs::OpenOptions::new().append(true).open(path).expect("open");
        writeln!(conf, "recovery_target_lsn = '{target}'\nrecovery_target_action = 'pause'").expect("write");
        midna.start(LIMIT).await.expect("start");
        sql(&alp, "INSERT INTO t SELECT generate_series(2, 100)").await;
        let written = sql(&alp, "SELECT pg_current_wal_flush_lsn()").await;
        let paused = format!("SELECT pg_is_wal_replay_paused() AND pg_last_wal_receive_lsn() >= '{written}'");
        until("all received, and paused at the target", || async { sql(&midna, &paused).await == "t" }).await;
        assert_ne!(sql(&midna, "SELECT count(*) FROM t").await, "100", "the replay stands at the target");

        alp.stop(StopMode::Immediate, LIMIT).await.expect("the primary is gone");
        midna.promote(LIMIT).await.expect("promote");
        assert_eq!(sql(&midna, "SELECT count(*) FROM t").await, "100");
        sql(&midna, "INSERT INTO t VALUES (101)").await;
    });
}
