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
fn a_rewind_needs_room_for_itself_and_says_what_a_clone_would_need() {
    as_postgres("mended::a_rewind_needs_room_for_itself_and_says_what_a_clone_would_need", |base| async move {
        let (alp, midna) = pair(&base).await;
        diverge(&alp, &midna).await;
        alp.stop(StopMode::Fast, LIMIT).await.expect("stop");
        let data = &alp.settings.data_dir;
        set_mode(data, 0o750);
        let facts = facts(&midna, &alp).await;
        let huge = SourceFacts { bytes: u64::MAX / 4, ..facts.clone() };
        let plan = alp.plan_rejoin(&huge).await.expect("plan");
        let why = plan.refusal.expect("refused");
        assert!(plan.how == RejoinHow::Rewind && why.contains(" free, the rewind needs about "), "{why}");
        let refused = super::pair::peer(&midna);
        let refused = alp.rejoin(&refused, &huge, &mut |_| {}).await;
        assert!(matches!(&refused, Err(PgError::Refused(why)) if why.contains("make room")), "{refused:?}");
        assert!(entries_like(&base, ".diverged-").is_empty() && mode(data) == 0o750);

        // A large database on a disk that has no room for it twice: most of it is here already.
        let disk = rustix::fs::statvfs(data).expect("statvfs");
        let large = disk.f_bavail * disk.f_frsize + (100 << 30);
        let sparse = data.join("base/large");
        fs::File::create(&sparse).and_then(|file| file.set_len(large)).expect("a sparse file");
        let full = SourceFacts { bytes: facts.bytes + large, ..facts.clone() };
        let plan = alp.plan_rejoin(&full).await.expect("plan");
        assert_eq!((plan.how, &plan.refusal), (RejoinHow::Rewind, &None), "{plan:?}");
        let words = "should this machine crash in the middle of it, only a clone helps, for which ";
        assert!(plan.why.contains(words) && plan.why.contains(" GiB too little"), "{}", plan.why);
        fs::remove_file(&sparse).expect("remove");
        let plan = alp.plan_rejoin(&facts).await.expect("plan");
        assert!(plan.refusal.is_none() && !plan.why.contains("crash"), "there is room here: {plan:?}");

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

fn tells(ticks: &[Tick], count: u64) -> bool {
    let at = |wanted: &dyn Fn(&Tick) -> bool| ticks.iter().position(wanted);
    let told = at(&|tick| matches!(tick, Tick::Diverged { transactions, .. } if *transactions == count));
    let cloning = at(&|tick| matches!(tick, Tick::Words(text) if text.starts_with("cloning: ")));
    told.is_some() && told < cloning
}

#[test]
fn what_diverged_is_told_before_a_clone_for_which_a_rewind_was_not_possible() {
    as_postgres(
        "mended::what_diverged_is_told_before_a_clone_for_which_a_rewind_was_not_possible",
        |base| async move {
            let (alp, midna) = pair(&base).await;
            diverge(&alp, &midna).await;
            let facts = facts(&midna, &alp).await;
            let to = super::pair::peer(&midna);
            let plan = alp.rehearse_rejoin(&to, &facts).await.expect("plan");
            assert_eq!((plan.how, &plan.refusal), (RejoinHow::Rewind, &None), "{plan:?}");
            // The role that does not exist yet is made by the rejoin itself.
            sql(&midna, "ALTER ROLE replicator RENAME TO later").await;
            let plan = alp.rehearse_rejoin(&to, &facts).await.expect("plan");
            let words = "it is cloned instead if pg_rewind may not read there (";
            assert!(plan.how == RejoinHow::Rewind && plan.why.contains(words), "{plan:?}");
            sql(&midna, "ALTER ROLE later RENAME TO replicator").await;
            sql(&midna, &format!("ALTER ROLE replicator PASSWORD '{}'", super::pair::PASSWORD)).await;

            let hba = midna.settings.data_dir.join("pg_hba.conf");
            let rules = fs::read_to_string(&hba).expect("hba");
            fs::write(&hba, format!("host postgres replicator all reject\n{rules}")).expect("hba");
            sql(&midna, "SELECT pg_reload_conf()").await;
            let shut = || async { alp.rehearse_rejoin(&to, &facts).await.expect("plan").how == RejoinHow::Clone };
            super::pair::until("pg_hba to be read", shut).await;
            let plan = alp.rehearse_rejoin(&to, &facts).await.expect("plan");
            assert!(
                plan.why.starts_with("pg_rewind is not possible (") && plan.why.contains("pg_hba.conf"),
                "{plan:?}"
            );
            assert!(plan.why.contains("; 3 transactions were committed here alone since "), "{plan:?}");

            alp.stop(StopMode::Fast, LIMIT).await.expect("stop");
            let (done, ticks) = rejoin(&alp, &midna, &facts).await;
            assert!(done.how == RejoinHow::Clone && tells(&ticks, 3), "{ticks:?}");
        },
    );
}

#[test]
fn what_diverged_is_told_before_a_clone_of_what_does_not_recover() {
    as_postgres("mended::what_diverged_is_told_before_a_clone_of_what_does_not_recover", |base| async move {
        let (alp, midna) = pair(&base).await;
        diverge(&alp, &midna).await;
        alp.stop(StopMode::Immediate, LIMIT).await.expect("stop");
        let conf = alp.settings.data_dir.join("postgresql.conf");
        let text = fs::read_to_string(&conf).expect("conf");
        fs::write(&conf, format!("{text}\nno_such_setting = 1\n")).expect("conf");
        let (done, ticks) = rejoin(&alp, &midna, &facts(&midna, &alp).await).await;
        assert!(done.how == RejoinHow::Clone && tells(&ticks, 3), "{ticks:?}");

        // Nobody can count in what cannot be read; that is said, and why.
        fs::remove_file(alp.settings.data_dir.join("global/pg_control")).expect("remove");
        let (done, ticks) = rejoin(&alp, &midna, &facts(&midna, &alp).await).await;
        let said = |tick: &Tick| matches!(tick, Tick::Uncounted(text) if text.contains("could not be counted (the cl"));
        assert!(done.how == RejoinHow::Clone && ticks.iter().any(said), "{ticks:?}");
    });
}
