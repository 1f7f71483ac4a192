//! Rejoin where something is in the way: what is refused or fails leaves the cluster as it was.

use super::pair::{LIMIT, as_postgres, sql, wait_streaming};
use super::rejoined::{caught_up, diverge, entries_like, facts, pair, rejoin};
use portcullis::engine::report::{RejoinHow, SourceFacts};
use portcullis::io::postgres::{PgError, StopMode, Tick};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

fn mode(dir: &Path) -> u32 {
    fs::metadata(dir).expect("meta").permissions().mode() & 0o777
}

fn set_mode(dir: &Path, mode: u32) {
    fs::set_permissions(dir, fs::Permissions::from_mode(mode)).expect("chmod");
}

#[test]
fn what_fails_before_pg_rewind_runs_is_undone() {
    as_postgres("mended::what_fails_before_pg_rewind_runs_is_undone", |base| async move {
        let (alp, midna) = pair(&base).await;
        diverge(&alp, &midna).await;
        alp.stop(StopMode::Fast, LIMIT).await.expect("stop");
        let data = &alp.settings.data_dir;
        set_mode(data, 0o750);
        fs::write(data.join("precious.pem"), "alp's").expect("write");
        // A folder that may not be written to cannot be moved into another one.
        fs::create_dir(data.join("locked")).expect("mkdir");
        set_mode(&data.join("locked"), 0o500);

        // A daemon that was killed while it moved: the next start has all of it again.
        let kept = base.dir.join("alp/data.diverged-killed");
        fs::create_dir_all(kept.join("own")).expect("mkdir");
        fs::rename(data.join("precious.pem"), kept.join("own/precious.pem")).expect("rename");
        set_mode(data, 0o701);
        let mark = alp.state_dir.join("rewind-under-way");
        fs::write(&mark, format!("moving 750 {}\n", kept.display())).expect("write");
        let facts = facts(&midna, &alp).await;
        let plan = alp.plan_rejoin(&facts).await.expect("plan");
        assert_eq!((plan.how, &plan.refusal), (RejoinHow::Rewind, &None), "{plan:?}");
        alp.start(LIMIT).await.expect("start");
        alp.stop(StopMode::Fast, LIMIT).await.expect("stop");
        assert!(data.join("precious.pem").exists() && mode(data) == 0o750 && !mark.exists());

        let (done, ticks) = rejoin(&alp, &midna, &facts).await;
        assert_eq!(done.how, RejoinHow::Clone, "{ticks:?}");
        let why = |tick: &Tick| matches!(tick, Tick::Words(text) if text.contains("locked cannot be moved"));
        assert!(ticks.iter().any(why), "{ticks:?}");
        let aside = done.aside.expect("set aside");
        assert_eq!(mode(&aside), 0o750, "it can be started as it was");
        assert_eq!(fs::read_to_string(aside.join("precious.pem")).expect("there"), "alp's");
        assert!(aside.join("locked").exists() && !mark.exists());
        // The copy is as open as what it replaces.
        assert_eq!(mode(data), 0o750);
        alp.start(LIMIT).await.expect("start");
        wait_streaming(&midna, "alp").await;
    });
}

#[test]
fn a_rewind_begins_only_where_a_clone_could_follow_it() {
    as_postgres("mended::a_rewind_begins_only_where_a_clone_could_follow_it", |base| async move {
        let (alp, midna) = pair(&base).await;
        diverge(&alp, &midna).await;
        alp.stop(StopMode::Fast, LIMIT).await.expect("stop");
        let data = &alp.settings.data_dir;
        set_mode(data, 0o750);
        let facts = facts(&midna, &alp).await;
        let huge = SourceFacts { bytes: u64::MAX / 4, ..facts.clone() };
        let plan = alp.plan_rejoin(&huge).await.expect("plan");
        let why = plan.refusal.expect("refused");
        assert!(plan.how == RejoinHow::Rewind && why.contains("MiB free") && why.contains("make room"), "{why}");
        let refused = super::pair::peer(&midna);
        let refused = alp.rejoin(&refused, &huge, &mut |_| {}).await;
        assert!(matches!(&refused, Err(PgError::Refused(why)) if why.contains("MiB free")), "{refused:?}");
        assert!(entries_like(&base, ".diverged-").is_empty() && mode(data) == 0o750);
        // A clone would put the WAL back into the data directory.
        let wal = base.dir.join("alp/wal");
        fs::rename(data.join("pg_wal"), &wal).expect("rename");
        std::os::unix::fs::symlink(&wal, data.join("pg_wal")).expect("symlink");
        let why = alp.plan_rejoin(&facts).await.expect("plan").refusal.expect("refused");
        assert!(why.contains("pg_wal is a symbolic link"), "{why}");
        fs::remove_file(data.join("pg_wal")).expect("remove");
        fs::rename(&wal, data.join("pg_wal")).expect("rename");

        let (done, ticks) = rejoin(&alp, &midna, &facts).await;
        assert_eq!(done.how, RejoinHow::Rewind, "{ticks:?}");
        assert_eq!(mode(data), 0o750, "the group reads on");
        alp.start(LIMIT).await.expect("start");
        wait_streaming(&midna, "alp").await;
    });
}

#[test]
fn a_standby_that_goes_on_receiving_is_not_ahead() {
    as_postgres("mended::a_standby_that_goes_on_receiving_is_not_ahead", |base| async move {
        let (alp, midna) = pair(&base).await;
        let before = facts(&alp, &midna).await;
        sql(&alp, "INSERT INTO t SELECT generate_series(1, 1000)").await;
        caught_up(&midna, &alp).await;
        // Asked before, looked after: what came between proves nothing.
        let plan = midna.plan_rejoin(&before).await.expect("plan");
        assert!(plan.how == RejoinHow::Follow && plan.tail.is_some(), "{plan:?}");
        let asked = alp.look_as_source(plan.tail.as_ref(), LIMIT).await.expect("facts");
        assert_eq!(asked.same_tail, Some(true));
        midna.stop(StopMode::Fast, LIMIT).await.expect("stop");
        // Stopped, it is ahead of what was told earlier; asked again it is not.
        assert_eq!(midna.plan_rejoin(&before).await.expect("plan").how, RejoinHow::Clone);
        let again = SourceFacts { same_tail: asked.same_tail, ..facts(&alp, &midna).await };
        let (done, ticks) = rejoin(&midna, &alp, &again).await;
        assert_eq!(done.how, RejoinHow::Follow, "{ticks:?}");
    });
}
