//! A clone's directories: what is never removed, and every place a crash can leave them in.

use super::rewind::{Mark, Phase};
use super::*;
use crate::engine::report::RejoinHow;
use crate::io::postgres::again::Begun;
use std::os::unix::fs::MetadataExt;

fn nothing_outside() -> SourceFacts {
    SourceFacts {
        system_id: crate::base::ids::SystemId(1),
        bytes: 0,
        tablespaces: 0,
        spaces: Vec::new(),
        timeline: crate::base::ids::TimelineId(1),
        history: Vec::new(),
        control_timeline: crate::base::ids::TimelineId(1),
        lsn: crate::base::ids::Lsn(0),
        oldest: crate::base::ids::Lsn(0),
        same_tail: None,
    }
}

#[test]
fn a_directory_that_is_not_ours_is_not_removed() {
    let dir = tempfile::tempdir().expect("tempdir");
    let target = dir.path().join("main");
    let fresh = with_suffix(&target, FRESH_SUFFIX);
    let places = Places {
        base: target.clone(),
        target,
        fresh: fresh.clone(),
        wal: None,
        old: None,
        moved_out: false,
        own: None,
        mode: None,
    };
    fs::create_dir_all(fresh.join("data")).expect("mkdir");
    fs::write(fresh.join("data/precious"), "x").expect("write");
    assert!(matches!(prepare(&places), Err(PgError::Refused(_))));
    assert!(fresh.join("data/precious").exists());
    fs::write(fresh.join(MARKER), MARKER_HEAD).expect("write");
    assert!(prepare(&places).is_ok());
    assert!(!fresh.join("data/precious").exists());
}

#[test]
fn an_exchange_keeps_the_directory_and_sets_all_its_entries_aside() {
    let dir = tempfile::tempdir().expect("tempdir");
    let (target, base) = (dir.path().join("pg/main"), dir.path().join("state/main"));
    let places = Places {
        target: target.clone(),
        fresh: with_suffix(&base, FRESH_SUFFIX),
        base,
        wal: None,
        old: Some(target.clone()),
        moved_out: false,
        own: None,
        mode: None,
    };
    fs::create_dir_all(target.join("base/1")).expect("mkdir");
    for name in [VERSION_FILE, "postgresql.conf"] {
        fs::write(target.join(name), "old").expect("write");
    }
    let copy = prepare(&places).expect("prepared");
    fs::create_dir_all(copy.join("base/2")).expect("mkdir");
    fs::write(copy.join(VERSION_FILE), "new").expect("write");
    let inode = fs::metadata(&target).expect("stat").ino();
    let aside = swap(&places, &copy, &nothing_outside()).expect("swapped").expect("something was set aside");
    assert_eq!(fs::metadata(&target).expect("stat").ino(), inode, "the directory itself stayed");
    assert!(aside.starts_with(dir.path().join("state")) && aside.join("base/1").is_dir());
    assert_eq!(fs::read_to_string(aside.join("postgresql.conf")).expect("read"), "old");
    assert_eq!(fs::read_to_string(target.join(VERSION_FILE)).expect("read"), "new");
    assert!(target.join("base/2").is_dir() && !target.join("base/1").exists());
    assert!(!places.fresh.exists());
}

#[test]
fn an_exchange_that_crashed_anywhere_keeps_the_old_cluster_in_one_place() {
    // Entries moved out, then in, before the crash.
    for (out, into) in [(0, 0), (1, 0), (2, 0), (3, 0), (4, 0), (4, 1), (4, 2)] {
        let dir = tempfile::tempdir().expect("tempdir");
        let (target, base) = (dir.path().join("pg/main"), dir.path().join("state/main"));
        let fresh = with_suffix(&base, FRESH_SUFFIX);
        let find = || {
            let old = if target.join(VERSION_FILE).exists() { Some((target.clone(), false)) } else { None };
            let marked = || read_marker(&fresh).map(|marked| (marked.old, marked.moved_out));
            let (old, moved_out) = old.or_else(marked).expect("it is known where it is");
            let (target, base, fresh) = (target.clone(), base.clone(), fresh.clone());
            Places { target, base, fresh, wal: None, old: Some(old), moved_out, own: None, mode: None }
        };
        let names = ["postgresql.conf", VERSION_FILE, "base", "global"];
        fs::create_dir_all(target.join("base/1")).expect("mkdir");
        fs::create_dir_all(target.join("global/1")).expect("mkdir");
        for name in [VERSION_FILE, "postgresql.conf"] {
            fs::write(target.join(name), "old").expect("write");
        }
        prepare(&find()).expect("prepared");
        let to = set_aside_name(&base);
        fs::create_dir(&to).expect("mkdir");
        write_marker(&find(), Some(&to), false).expect("marked");
        for name in &names[..out] {
            fs::rename(target.join(name), to.join(name)).expect("moved out");
        }
        if into > 0 {
            write_marker(&find(), Some(&to), true).expect("marked");
            for name in &names[2..2 + into] {
                fs::create_dir_all(target.join(name).join("2")).expect("moved in");
            }
        }

        let places = find();
        let copy = prepare(&places).expect("prepared again");
        let own = places.old.clone().expect("old").join("postgresql.conf");
        assert!(own.exists(), "{out} {into}: this machine's files are found");
        for name in ["base/2", "global/2"] {
            fs::create_dir_all(copy.join(name)).expect("mkdir");
        }
        fs::write(copy.join(VERSION_FILE), "new").expect("write");
        // And a crash during this copy.
        assert_eq!(find().moved_out, places.moved_out);
        let aside = swap(&places, &copy, &nothing_outside()).expect("swapped").expect("set aside");
        for name in ["postgresql.conf", VERSION_FILE, "base/1", "global/1"] {
            assert!(aside.join(name).exists(), "{out} {into}: {name} is elsewhere");
        }
        assert!(!aside.join("base/2").exists() && !target.join("base/1").exists(), "{out} {into}");
        assert_eq!(fs::read_to_string(target.join(VERSION_FILE)).expect("read"), "new");
        assert!(target.join("base/2").exists() && target.join("global/2").exists(), "{out} {into}");
    }
}

#[test]
fn names_set_aside_never_collide() {
    let dir = tempfile::tempdir().expect("tempdir");
    let target = dir.path().join("main");
    let first = set_aside_name(&target);
    fs::create_dir(&first).expect("mkdir");
    // Possibly in the next second: free either way.
    assert!(!set_aside_name(&target).exists());
}

fn cluster(dir: &Path) -> Cluster {
    Cluster {
        node: "alp".parse().expect("name"),
        settings: crate::base::config::NodePostgres {
            host: String::new(),
            port: 1,
            socket_dir: dir.to_owned(),
            data_dir: dir.join("data"),
            bin_dir: dir.to_owned(),
            start: None,
            stop: None,
        },
        admin_user: String::new(),
        state_dir: dir.join("state"),
        replication: crate::io::postgres::ReplicationAccess {
            user: String::new(),
            password: None,
            conninfo: String::new(),
            slots: false,
        },
    }
}

/// A data directory with a link to its WAL, as a cluster or as a copy of one.
fn made(data: &Path, link: &Path, wal: &Path, text: &str) {
    for dir in [&data.join("pg_tblspc"), wal] {
        fs::create_dir_all(dir).expect("mkdir");
    }
    for file in [data.join(VERSION_FILE), wal.join("segment")] {
        fs::write(file, text).expect("write");
    }
    std::os::unix::fs::symlink(link, data.join("pg_wal")).expect("symlink");
}

#[test]
fn a_swap_with_wal_elsewhere_that_crashed_anywhere_loses_neither() {
    // The data directory itself, or a link to it; the steps that were done before the crash.
    for (linked, steps) in [false, true].into_iter().flat_map(|linked| (0..=6).map(move |steps| (linked, steps))) {
        let dir = tempfile::tempdir().expect("tempdir");
        let root = fs::canonicalize(dir.path()).expect("path");
        let cluster = cluster(&root);
        let (real, wal) = (root.join(if linked { "real/main" } else { "data" }), root.join("fast/wal"));
        made(&real, Path::new(if linked { "../../fast/wal" } else { "../fast/wal" }), &wal, "old");
        if linked {
            std::os::unix::fs::symlink(&real, root.join("data")).expect("symlink");
        }
        let fresh_wal = with_suffix(&wal, ".portcullis-new");
        let copied = |places: &Places| {
            let copy = prepare(places).expect("prepared");
            spaces::clear(&nothing_outside(), places.wal.as_deref()).expect("cleared");
            made(&copy, &fresh_wal, &fresh_wal, "new");
            spaces::settle_links(&copy, &nothing_outside(), places.wal.as_deref()).expect("settled");
            copy
        };
        let places = cluster.places().expect("places");
        assert_eq!((&places.target, places.wal.as_deref()), (&real, Some(wal.as_path())));
        let copy = copied(&places);
        // What `swap` does, one by one.
        let (aside, old_wal) = (set_aside_name(&real), set_aside_name(&wal));
        let work: [&dyn Fn(); 6] = [
            &|| spaces::settle_wal(&real, Some(&wal)).expect("absolute"),
            &|| {
                write_marker(&places, Some(&aside), false).expect("marked");
                fs::rename(&real, &aside).expect("aside");
            },
            &|| {
                fs::remove_file(aside.join("pg_wal")).expect("unlink");
                std::os::unix::fs::symlink(&old_wal, aside.join("pg_wal")).expect("link");
            },
            &|| fs::rename(&wal, &old_wal).expect("WAL aside"),
            &|| fs::rename(&fresh_wal, &wal).expect("WAL in"),
            &|| fs::rename(&copy, &real).expect("in"),
        ];
        work.iter().take(steps).for_each(|step| step());

        // The next rejoin: a copy anew, and all of the swap.
        let places = cluster.places().expect("places");
        assert_eq!((&places.target, places.wal.as_deref()), (&real, Some(wal.as_path())), "{linked} {steps}");
        let done = steps == 6;
        let own = places.old.clone().expect("the old cluster is found");
        let whose = if done { "new" } else { "old" };
        assert_eq!(fs::read_to_string(own.join(VERSION_FILE)).expect("there"), whose, "{linked} {steps}");
        let copy = copied(&places);
        let told = swap(&places, &copy, &nothing_outside()).expect("swapped").expect("told where");
        let read = |data: &Path| {
            let text = |path: PathBuf| fs::read_to_string(&path).unwrap_or_else(|error| format!("{path:?}: {error}"));
            (text(data.join(VERSION_FILE)), text(data.join("pg_wal/segment")))
        };
        let both = |text: &str| (text.to_owned(), text.to_owned());
        assert_eq!(read(&cluster.settings.data_dir), both("new"), "{linked} {steps}");
        assert_eq!(read(if done { &aside } else { &told }), both("old"), "{linked} {steps}: the old one");
        assert_eq!(fs::read_link(real.join("pg_wal")).expect("link"), wal);
        let is_link = fs::symlink_metadata(root.join("data")).expect("there").is_symlink();
        assert_eq!(is_link, linked, "the path stays what it was");
    }
}

/// A rewind of `data` that broke off and could be done again; its mark says `phase`. Gives what was kept before it.
fn broken_off(cluster: &Cluster, peer: &Peer, phase: Phase) -> PathBuf {
    let (data, kept) = (&cluster.settings.data_dir, cluster.state_dir.join("kept"));
    for dir in [data.join("global"), data.join("pg_wal"), kept.join("own"), kept.join("wal")] {
        fs::create_dir_all(dir).expect("mkdir");
    }
    fs::write(data.join(VERSION_FILE), "15\n").expect("write");
    fs::write(data.join("postgresql.conf"), "the source's").expect("write");
    fs::write(kept.join("own/postgresql.conf"), "ours").expect("write");
    fs::write(kept.join("pg_control"), "").expect("write");
    let (at, timeline) = (crate::base::ids::Lsn(80), crate::base::ids::TimelineId(1));
    let diverged = super::super::divergence::Divergence { at, timeline, transactions: 3, whole: true, before: None };
    Begun::now(peer, &nothing_outside(), &diverged).write(&kept).expect("written");
    Mark { kept: kept.clone(), phase, mode: 0o750 }.write(&cluster.state_dir).expect("marked");
    rewind::poison(data).expect("poisoned");
    kept
}

fn midna() -> Peer {
    Peer { name: "midna".parse().expect("name"), host: "192.0.2.1".to_owned(), port: 1 }
}

/// A rejoin that goes as far as the copy, for which there is no tool here.
async fn rejoin_to_the_copy(cluster: &Cluster, told: &str) {
    let done = cluster.rejoin(&midna(), &nothing_outside(), &mut |_| {}).await;
    assert!(matches!(&done, Err(error) if error.to_string().contains("pg_basebackup")), "{told}: {done:?}");
}

#[tokio::test]
async fn a_copy_for_a_half_rewound_directory_gets_this_machines_files_wherever_a_crash_was() {
    // What an exchange does, one by one, and a swap by names.
    const BY_NAMES: usize = 0;
    for step in BY_NAMES..=7 {
        let dir = tempfile::tempdir().expect("tempdir");
        let root = fs::canonicalize(dir.path()).expect("path");
        let cluster = cluster(&root);
        let data = &cluster.settings.data_dir;
        let kept = broken_off(&cluster, &midna(), Phase::Rewinding);
        let places = cluster.places().expect("places");
        let aside = set_aside_name(data);
        prepare(&places).expect("prepared");
        Mark::ends_in_a_clone(&cluster.state_dir).expect("marked");
        let out = |name: &str| fs::rename(data.join(name), aside.join(name)).expect("moved out");
        let work: [&dyn Fn(); 7] = [
            &|| {
                fs::create_dir(&aside).expect("mkdir");
                rewind::poison(&aside).expect("poisoned");
                write_marker(&places, Some(&aside), false).expect("marked");
            },
            &|| out("postgresql.conf"),
            &|| out(VERSION_FILE),
            &|| out("pg_wal"),
            &|| {
                out("global");
                write_marker(&places, Some(&aside), true).expect("marked");
                fs::write(data.join("postgresql.conf"), "ours").expect("moved in");
            },
            &|| fs::write(data.join(VERSION_FILE), "15\n").expect("moved in"),
            &|| make_private(data, Some(0o750)).expect("private"),
        ];
        work.iter().take(step).for_each(|step| step());
        if step == BY_NAMES {
            write_marker(&places, Some(&aside), false).expect("marked");
            fs::rename(data, &aside).expect("set aside");
        }
        for time in ["once", "twice"] {
            rejoin_to_the_copy(&cluster, &format!("step {step}, {time}")).await;
            let (places, mark) = (cluster.places().expect("places"), Mark::read(&cluster.state_dir));
            assert_eq!(places.mode, Some(0o750), "step {step}, {time}");
            if step == work.len() {
                // The copy was in: nothing is half any more.
                assert!(mark.is_none() && places.own.as_ref() == Some(data), "{time}");
            } else {
                assert_eq!(mark.map(|mark| mark.phase), Some(Phase::Cloning), "step {step}, {time}");
                assert_eq!(places.own, Some(kept.join("own")), "step {step}, {time}: whose configuration");
            }
        }
    }
}

#[tokio::test]
async fn a_rewind_that_was_being_replaced_is_not_planned_again_and_one_that_cannot_be_made_ready_is_replaced() {
    let dir = tempfile::tempdir().expect("tempdir");
    let cluster = cluster(&fs::canonicalize(dir.path()).expect("path"));
    let kept = broken_off(&cluster, &midna(), Phase::Rewinding);
    let source = nothing_outside();
    assert_eq!(cluster.plan_rejoin(&source).await.expect("plan").how, RejoinHow::Rewind);
    // A disk that lost it.
    fs::remove_dir(kept.join("wal")).expect("rmdir");
    rejoin_to_the_copy(&cluster, "nothing to put back").await;
    assert_eq!(Mark::read(&cluster.state_dir).map(|mark| mark.phase), Some(Phase::Rewinding), "no copy is there yet");
    Mark::ends_in_a_clone(&cluster.state_dir).expect("marked");
    let plan = cluster.plan_rejoin(&source).await.expect("plan");
    assert!(plan.how == RejoinHow::Clone && plan.why.contains("a copy was about to take its place"), "{plan:?}");
}

#[tokio::test]
async fn what_was_written_before_a_rewind_is_undone_is_kept() {
    let dir = tempfile::tempdir().expect("tempdir");
    let cluster = cluster(&fs::canonicalize(dir.path()).expect("path"));
    let (data, kept) = (&cluster.settings.data_dir, broken_off(&cluster, &midna(), Phase::Moving));
    for (log, text) in [(kept.join("own/log"), "before"), (data.join("log"), "since")] {
        fs::create_dir(&log).expect("mkdir");
        fs::write(log.join("postgresql.log"), text).expect("write");
    }
    fs::write(kept.join("own/key.pem"), "before").expect("write");
    cluster.undo_rewind_not_begun().await.expect("undone");
    let read = |dir: &Path| fs::read_to_string(dir.join("log/postgresql.log")).expect("there");
    assert_eq!((read(data).as_str(), data.join("key.pem").exists()), ("before", true));
    let entries = fs::read_dir(&kept).expect("read").flatten().map(|entry| entry.path());
    let later: Vec<_> = entries.filter(|path| path.to_string_lossy().contains("own-later-")).collect();
    assert_eq!(later.iter().map(|dir| read(dir)).collect::<Vec<_>>(), ["since"]);
    assert!(Mark::read(&cluster.state_dir).is_none() && rewind::mode_of(data) == Some(0o750));
}
