//! `[notify]` with real commands: good ones, and each way in which one can be bad.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

use portcullis::app::notices::{Notice, Notices, Severity};
use portcullis::base::config::Notify;
use portcullis::engine::status::Role;
use portcullis::io::clock;
use serde_json::Value;
use std::path::Path;
use std::time::Duration;

/// Longer than any machine needs for a shell, and what a hanging command is given in these tests.
const PATIENCE: Duration = Duration::from_secs(60);
const SHORT: Duration = Duration::from_millis(500);

fn notice(kind: &str, text: &str) -> Notice {
    Notice {
        node: "alp".parse().unwrap(),
        service: "db.example.org".into(),
        at: "2026-11-20T15:11:00Z".into(),
        kind: kind.into(),
        severity: Severity::Critical,
        text: text.into(),
        epoch: 7,
        role: Role::Passive,
        folded: 0,
    }
}

fn shell(script: &str, word: &Path) -> Notify {
    let words = ["/bin/sh", "-c", script, "sh", word.to_str().unwrap()];
    Notify { command: words.iter().map(ToString::to_string).collect(), ..Notify::default() }
}

async fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let began = clock::now();
    while !holds() {
        assert!(clock::now().since(began) < PATIENCE, "in vain: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

fn lines(path: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[tokio::test]
async fn the_command_reads_the_event_as_json_in_a_clean_environment() {
    let folder = tempfile::tempdir().unwrap();
    let (told, env) = (folder.path().join("told"), folder.path().join("env"));
    let script = "cat >> \"$1\"; env > \"$(dirname \"$1\")/env\"";
    let notices = Notices::start(shell(script, &told), PATIENCE);
    notices.put(notice("fenced", "why; $(touch /tmp/never) \"quoted\"\nsecond line"));
    notices.put(notice("paused", "put all the same"));
    until("two to be told", || notices.counts().sent == 2).await;
    let seen = lines(&told);
    assert_eq!(seen[0]["text"], "why; $(touch /tmp/never) \"quoted\"\nsecond line");
    for (key, value) in [("node", "alp"), ("service", "db.example.org"), ("kind", "fenced"), ("role", "passive")] {
        assert_eq!(seen[0][key], value);
    }
    assert_eq!((&seen[0]["epoch"], &seen[0]["severity"]), (&7.into(), &"critical".into()));
    let env = std::fs::read_to_string(env).unwrap();
    assert!(!env.contains("CARGO"), "{env}");
    // What passwd says of who it runs as.
    let me = std::process::Command::new("id").arg("-un").output().unwrap();
    let me = String::from_utf8(me.stdout).unwrap();
    for name in ["USER", "LOGNAME"] {
        assert!(env.lines().any(|line| line == format!("{name}={}", me.trim())), "{env}");
    }
    assert!(env.lines().any(|line| line.starts_with("HOME=/")), "{env}");
}

#[tokio::test]
async fn a_hanging_command_is_killed_with_all_it_started_and_the_next_is_told() {
    let folder = tempfile::tempdir().unwrap();
    let told = folder.path().join("told");
    // The first one hangs, with a child of its own; others are good.
    let script = "[ -e \"$1\" ] && exec cat >> \"$1.next\"; sleep 1000 & echo $! > \"$1.pid\"; mv \"$1.pid\" \"$1\"; \
                  wait";
    let notices = Notices::start(shell(script, &told), Duration::from_secs(2));
    let began = clock::now();
    notices.put(notice("fenced", "first"));
    notices.put(notice("gate_cut", "second"));
    assert!(clock::now().since(began) < SHORT, "to put one took {:?}", clock::now().since(began));
    until("the second to be told", || notices.counts().sent == 1).await;
    assert_eq!(notices.counts().failed, 1);
    assert_eq!(lines(&folder.path().join("told.next"))[0]["text"], "second");
    let child = std::fs::read_to_string(&told).unwrap();
    let stat = format!("/proc/{}/stat", child.trim());
    until("its child to be gone", || {
        std::fs::read_to_string(&stat).map_or(true, |stat| !stat.contains("(sleep)") || stat.contains(") Z "))
    })
    .await;
}

#[tokio::test]
async fn one_that_fails_closes_its_input_or_is_missing_is_counted_and_nothing_worse() {
    let folder = tempfile::tempdir().unwrap();
    let told = folder.path().join("told");
    let notices = Notices::start(shell("echo no pager >&2; exit 3", &told), PATIENCE);
    notices.put(notice("fenced", "one"));
    until("a failure", || notices.counts().failed == 1).await;
    notices.set(Notify { command: vec!["/nowhere/pager".into()], ..Notify::default() });
    notices.put(notice("fenced", "two"));
    until("a missing program", || notices.counts().failed == 2).await;
    // More than a pipe holds, and nobody reads it: no signal, no wait.
    notices.set(shell("exec 0<&-; : > \"$1\"", &told));
    notices.put(notice("fenced", &"x".repeat(1_000_000)));
    until("one that reads nothing", || notices.counts().sent == 1).await;
    assert!(told.exists());
    // Nobody is told any more.
    notices.set(Notify::default());
    assert!(!notices.wants("fenced"));
}

#[tokio::test]
async fn a_mail_goes_to_sendmail_although_the_command_fails() {
    let folder = tempfile::tempdir().unwrap();
    let (sendmail, got) = (folder.path().join("sendmail"), folder.path().join("got"));
    std::fs::write(&sendmail, format!("#!/bin/sh\n{{ echo \"$@\"; cat; }} > {}\n", got.display())).unwrap();
    std::fs::set_permissions(&sendmail, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let settings =
        Notify { command: vec!["/bin/false".into()], mail: vec!["dba@example.org".into(), "root".into()], sendmail };
    let notices = Notices::start(settings, PATIENCE);
    notices.put(notice("gate_cut", "the lease ran out"));
    until("the attempt", || notices.counts().failed == 1).await;
    let got = std::fs::read_to_string(got).unwrap();
    assert!(got.starts_with("-i -- dba@example.org root\nTo: dba@example.org, root\nSubject: [portcullis] "), "{got}");
    assert!(got.contains("\n\nthe lease ran out\n"), "{got}");
}
