//! Rejoin where a cluster is not all in one plain directory: its WAL elsewhere, tablespaces, a data directory that is a
//! link or a mount point, WAL that only an archive has.

use super::pair::{Base, LIMIT, PASSWORD, as_postgres, as_postgres_on, peer, sql, until, wait_streaming};
use super::rejoined::{
    broken_off_everywhere, diverge, diverge_much, facts, has_all_of, is_standby_of, loop_until_half, pair, rejoin,
};
use portcullis::engine::report::{RejoinHow, SourceFacts};
use portcullis::io::postgres::{Cluster, PgError, StopMode, Tick};
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

fn beside(path: &Path, infix: &str) -> Vec<PathBuf> {
    let begin = format!("{}{infix}", path.display());
    let entries = fs::read_dir(path.parent().expect("parent")).expect("dir").flatten().map(|entry| entry.path());
    entries.filter(|path| path.to_string_lossy().starts_with(&begin)).collect()
}

fn is_link(path: &Path) -> bool {
    fs::symlink_metadata(path).expect("there").is_symlink()
}

/// Nothing but a clone can help the stopped cluster any more.
fn lose_control(node: &Cluster) {
    fs::remove_file(node.settings.data_dir.join("global/pg_control")).expect("remove");
}

#[test]
fn wal_elsewhere_and_a_linked_data_directory_stay_so() {
    as_postgres("layouts::wal_elsewhere_and_a_linked_data_directory_stay_so", |base| async move {
        let (alp, midna) = pair(&base).await;
        alp.stop(StopMode::Fast, LIMIT).await.expect("stop");
        let (data, real, wal) = (&alp.settings.data_dir, base.dir.join("alp/real/data"), base.dir.join("alp/wal/main"));
        for dir in [&real, &wal] {
            fs::create_dir_all(dir.parent().expect("parent")).expect("mkdir");
        }
        fs::rename(data, &real).expect("rename");
        symlink("real/data", data).expect("symlink");
        fs::rename(real.join("pg_wal"), &wal).expect("rename");
        symlink("../../wal/main", real.join("pg_wal")).expect("symlink");
        alp.start(LIMIT).await.expect("start");
        wait_streaming(&alp, "midna").await;
        diverge_much(&alp, &midna).await;
        alp.stop(StopMode::Fast, LIMIT).await.expect("stop");

        let facts_then = facts(&midna, &alp).await;
        let plan = alp.plan_rejoin(&facts_then).await.expect("plan");
        assert_eq!((plan.how, &plan.refusal), (RejoinHow::Rewind, &None), "{plan:?}");
        let (last, half) = broken_off_everywhere(&alp, &midna, &facts_then).await;
        assert!(half && last.how == RejoinHow::Rewind, "{last:?}");
        assert_eq!(fs::read_link(real.join("pg_wal")).expect("link"), Path::new("../../wal/main"));
        assert!(is_link(data) && beside(&real, ".diverged-").contains(&last.aside.expect("kept")));
        is_standby_of(&alp, &midna, "100").await;
        has_all_of(&alp, &midna).await;

        alp.stop(StopMode::Fast, LIMIT).await.expect("stop");
        lose_control(&alp);
        let facts_now = facts(&midna, &alp).await;
        let (last, _) = broken_off_everywhere(&alp, &midna, &facts_now).await;
        assert_eq!(last.how, RejoinHow::Clone);
        let aside = last.aside.clone().expect("set aside");
        assert_eq!(beside(&real, ".set-aside-"), std::slice::from_ref(&aside), "beside the directory itself");
        assert!(is_link(data) && !is_link(&real) && real.join("PG_VERSION").exists());
        assert_eq!(fs::read_link(real.join("pg_wal")).expect("link"), wal);
        let old_wal = fs::read_link(aside.join("pg_wal")).expect("link");
        assert_eq!(beside(&wal, ".set-aside-"), std::slice::from_ref(&old_wal));
        assert!(fs::read_dir(&old_wal).expect("old WAL").count() > 1, "the old WAL is with the old directory");
        let told = last.set_aside().expect("told");
        assert!(told.contains(&aside.display().to_string()) && told.contains(&old_wal.display().to_string()), "{told}");
        assert!(beside(&real, ".portcullis-new").is_empty() && beside(&wal, ".portcullis-new").is_empty());
        is_standby_of(&alp, &midna, "100").await;

        // Where nothing can be put beside the WAL it is said before anything is touched; a rewind would do.
        alp.stop(StopMode::Fast, LIMIT).await.expect("stop");
        lose_control(&alp);
        let mode = |mode| {
            fs::set_permissions(wal.parent().expect("parent"), std::os::unix::fs::PermissionsExt::from_mode(mode))
        };
        mode(0o500).expect("chmod");
        let refused = alp.plan_rejoin(&facts_now).await.expect("plan").refusal.expect("refused");
        assert!(refused.contains("pg_wal leads to") && refused.contains("chown"), "{refused}");
        let refused = alp.rejoin(&peer(&midna), &facts_now, &mut |_| {}).await;
        assert!(matches!(&refused, Err(PgError::Refused(why)) if why.contains("a clone is refused")), "{refused:?}");
        mode(0o700).expect("chmod");
        assert_eq!(beside(&real, ".set-aside-").len() + beside(&wal, ".set-aside-").len(), 2);
    });
}

#[test]
fn a_mount_point_is_rewound_and_never_replaced() {
    let mounts = [("alp/data", "1200m")];
    as_postgres_on("layouts::a_mount_point_is_rewound_and_never_replaced", &mounts, |base| async move {
        let (alp, midna) = pair(&base).await;
        diverge_much(&alp, &midna).await;
        alp.stop(StopMode::Fast, LIMIT).await.expect("stop");
        let data = &alp.settings.data_dir;
        fs::create_dir(data.join("pg_log")).expect("mkdir");
        fs::write(data.join("pg_log/alp.log"), "alp's").expect("write");
        let source = facts(&midna, &alp).await;
        let plan = alp.plan_rejoin(&source).await.expect("plan");
        assert_eq!((plan.how, &plan.refusal), (RejoinHow::Rewind, &None), "{plan:?}");
        let words = "only a clone helps, which as things stand is refused: ";
        assert!(plan.why.contains(words) && plan.why.contains("is a mount point"), "{}", plan.why);

        // More than the mount has room for: said before anything is touched.
        let large = SourceFacts { bytes: source.bytes + (2 << 30), ..source.clone() };
        let refused = alp.plan_rejoin(&large).await.expect("plan").refusal.expect("refused");
        assert!(refused.starts_with(&format!("{} has ", data.display())), "{refused}");

        let (last, half) = broken_off_everywhere(&alp, &midna, &source).await;
        assert!(half && last.how == RejoinHow::Rewind, "{last:?}");
        assert!(last.aside.is_some_and(|kept| kept.starts_with(&alp.state_dir)), "kept elsewhere");
        assert_eq!(fs::read_to_string(data.join("pg_log/alp.log")).expect("there"), "alp's");
        is_standby_of(&alp, &midna, "100").await;
        has_all_of(&alp, &midna).await;

        // A clone is refused, and nothing was touched.
        alp.stop(StopMode::Fast, LIMIT).await.expect("stop");
        lose_control(&alp);
        let refused = alp.rejoin(&peer(&midna), &source, &mut |_| {}).await;
        let told = |why: &str| why.contains("cannot be read") && why.contains("is a mount point");
        assert!(matches!(&refused, Err(PgError::Refused(why)) if told(why)), "{refused:?}");
        assert!(data.join("PG_VERSION").exists() && data.join("pg_log/alp.log").exists());
    });
}

/// alp archives its WAL by plain cp, and fetches it back so.
async fn archive(base: &Base, alp: &Cluster) -> PathBuf {
    let archive = base.dir.join("archive");
    fs::create_dir(&archive).expect("mkdir");
    let conf = alp.settings.data_dir.join("postgresql.conf");
    let mut text = fs::read_to_string(&conf).expect("conf");
    // The second line is in a file of its own, as Debian's conf.d has it.
    text += &format!(
        "archive_mode = on\narchive_command = 'cp %p {dir}/%f'\ninclude_dir = 'conf.d'\n",
        dir = archive.display()
    );
    fs::write(&conf, text).expect("conf");
    fs::create_dir(alp.settings.data_dir.join("conf.d")).expect("mkdir");
    let restore = format!("restore_command = 'cp {}/%f %p'\n", archive.display());
    fs::write(alp.settings.data_dir.join("conf.d/archive.conf"), restore).expect("conf");
    alp.stop(StopMode::Fast, LIMIT).await.expect("stop");
    alp.start(LIMIT).await.expect("start");
    archive
}

/// A segment is filled with a row or two and archived; its name.
async fn archived(node: &Cluster, archive: &Path, row: i32) -> String {
    sql(node, &format!("INSERT INTO t VALUES ({row})")).await;
    let name = sql(node, "SELECT pg_walfile_name(pg_switch_wal())").await;
    until("archived", || async { archive.join(&name).exists() }).await;
    name
}

#[test]
fn wal_that_only_the_archive_has_is_restored_for_a_rewind() {
    as_postgres("layouts::wal_that_only_the_archive_has_is_restored_for_a_rewind", |base| async move {
        let (alp, midna) = pair(&base).await;
        let archive = archive(&base, &alp).await;
        wait_streaming(&alp, "midna").await;
        sql(&alp, "CHECKPOINT").await;
        // Between the last common checkpoint and the fork, then after the fork.
        let before = archived(&alp, &archive, 0).await;
        diverge(&alp, &midna).await;
        let after = archived(&alp, &archive, 4).await;
        sql(&alp, "INSERT INTO t VALUES (5)").await;
        alp.stop(StopMode::Fast, LIMIT).await.expect("stop");
        let source = facts(&midna, &alp).await;
        let wal = |node: &Cluster, name: &str| node.settings.data_dir.join("pg_wal").join(name);
        for (node, name) in [(&alp, &before), (&midna, &before), (&alp, &after)] {
            fs::remove_file(wal(node, name)).expect("remove");
        }
        let plan = alp.plan_rejoin(&source).await.expect("plan");
        assert_eq!((plan.how, &plan.refusal), (RejoinHow::Rewind, &None), "{plan:?}");
        assert!(plan.why.starts_with("at least "), "some of it is not here yet: {}", plan.why);

        // Interrupted: what pg_rewind removed is there for the second pass, also without the archive.
        let kept = loop_until_half(&alp, &midna, &source).await;
        let away = base.dir.join("away");
        fs::rename(&archive, &away).expect("rename");
        let (done, ticks) = rejoin(&alp, &midna, &source).await;
        fs::rename(&away, &archive).expect("rename");
        assert_eq!((done.how, done.aside.as_ref()), (RejoinHow::Rewind, Some(&kept)), "{ticks:?}");
        assert!(!ticks.iter().any(|tick| matches!(tick, Tick::Words(text) if text.contains("fetching"))), "{ticks:?}");
        let report: serde_json::Value =
            serde_json::from_slice(&fs::read(kept.join("report.json")).expect("report")).expect("JSON");
        // Three of `diverge`, one in the segment that was gone, one after it.
        assert_eq!((&report["diverged_transactions"], &report["all_wal_kept"]), (&5.into(), &true.into()), "{report}");
        assert!(kept.join("wal").join(&after).exists(), "it is kept with the rest");
        is_standby_of(&alp, &midna, "0,100").await;
        let command = sql(&alp, "SHOW archive_command").await;
        assert!(
            command.starts_with("cp %p ") && sql(&alp, "SHOW restore_command").await.starts_with("cp "),
            "{command}"
        );

        // Nobody has it any more: a clone, and the reason is said beforehand.
        alp.stop(StopMode::Fast, LIMIT).await.expect("stop");
    });
}

/// midna anew, with its tablespace where it does not meet alp's: both run on one machine here.
async fn anew_with_space(base: &Base, alp: &Cluster, midna: &Cluster) {
    midna.stop(StopMode::Fast, LIMIT).await.expect("stop");
    let (at_alp, at_midna) = (base.dir.join("space-alp"), base.dir.join("space-midna"));
    fs::create_dir(&at_alp).expect("mkdir");
    sql(alp, &format!("CREATE TABLESPACE far LOCATION '{}'", at_alp.display())).await;
    sql(alp, "CREATE TABLE distant TABLESPACE far AS SELECT i, 'both' AS t FROM generate_series(1, 20000) AS i").await;
    let data = &midna.settings.data_dir;
    let auto = fs::read(data.join("postgresql.auto.conf")).expect("auto.conf");
    fs::remove_dir_all(data).expect("remove");
    let made = Command::new(format!("{}/pg_basebackup", super::pair::BIN))
        .args(["-h", "127.0.0.1", "-U", "replicator", "-c", "fast", "-p", &alp.settings.port.to_string(), "-D"])
        .arg(data)
        .arg(format!("--tablespace-mapping={}={}", at_alp.display(), at_midna.display()))
        .env("PGPASSWORD", PASSWORD)
        .output()
        .expect("pg_basebackup");
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    fs::write(data.join("postgresql.auto.conf"), auto).expect("auto.conf");
    fs::write(data.join("standby.signal"), "").expect("signal");
    midna.start(LIMIT).await.expect("start");
    wait_streaming(alp, "midna").await;
}

#[test]
fn a_tablespace_is_rewound_with_the_rest() {
    as_postgres("layouts::a_tablespace_is_rewound_with_the_rest", |base| async move {
        let (alp, midna) = pair(&base).await;
        anew_with_space(&base, &alp, &midna).await;
        diverge_much(&alp, &midna).await;
        sql(&alp, "UPDATE distant SET t = 'alp' WHERE i % 3 = 0").await;
        sql(&alp, "CREATE TABLE distant_alp TABLESPACE far AS SELECT * FROM distant").await;
        sql(&midna, "UPDATE distant SET t = 'midna' WHERE i % 2 = 0").await;
        alp.stop(StopMode::Fast, LIMIT).await.expect("stop");
        let source = facts(&midna, &alp).await;
        assert_eq!(source.spaces.len(), 1);
        let plan = alp.plan_rejoin(&source).await.expect("plan");
        assert_eq!((plan.how, &plan.refusal), (RejoinHow::Rewind, &None), "{plan:?}");
        let (last, half) = broken_off_everywhere(&alp, &midna, &source).await;
        assert!(half && last.how == RejoinHow::Rewind, "{last:?}");
        is_standby_of(&alp, &midna, "100").await;
        has_all_of(&alp, &midna).await;
        let digest = "SELECT md5(string_agg(d::text, ',' ORDER BY i)) FROM distant d";
        assert_eq!(sql(&alp, digest).await, sql(&midna, digest).await);
        let link = fs::read_dir(alp.settings.data_dir.join("pg_tblspc")).expect("dir").flatten().next().expect("link");
        assert_eq!(fs::read_link(link.path()).expect("link"), base.dir.join("space-alp"), "its own, as before");
    });
}
