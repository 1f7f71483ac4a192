//! The page in a real browser, in every state: what is to be read without script, on a phone and at a desk, in light
//! and dark; that nothing is asked of another host; that it is live. `UPDATE_SCREENSHOTS=1` writes `docs/screenshots/`
//! anew (with Debian's `pngquant`): `UPDATE_SCREENSHOTS=1 cargo test --test http screenshots`.

use crate::browser::{Browser, Look};
use crate::states::{active, fenced, lapsed, listen, passive, row, views, views_with};
use portcullis::engine::outlook::{Lag, Outlook, next};
use portcullis::engine::status::*;
use portcullis::serve::http::{History, Sample, router};
use std::io::Write;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::Ordering;

fn unknown(text: &str) -> Outlook {
    Outlook::unknown(text)
}

fn event(at: &str, kind: &str, text: &str) -> EventRow {
    EventRow { at: format!("2026-11-20T{at}Z"), kind: kind.into(), text: text.into() }
}

/// alp goes on without midna.
fn alone() -> Snapshot {
    let mut s = active();
    s.peer.as_mut().unwrap().reachable = false;
    s.peer.as_mut().unwrap().age_ms = Some(1_864_000);
    s.replication.in_sync = false;
    s.replication.alone_since = Some("2026-11-20T15:11:06Z".into());
    s.nodes[1] = NodeRow {
        status: "down".into(),
        attached: false,
        replication_delay_bytes: None,
        replication_state: None,
        sync_state: None,
        ..row(1, "midna", "standby")
    };
    s.lag = Some(Lag { node: "midna".parse().unwrap(), bytes: 3_355_443, ms: Some(1_860_000), away: true });
    s.outlook = Outlook {
        safe: false,
        lost: Some(12_041),
        lost_bytes: Some(3_355_443),
        text: "if alp died now, about 12041 transactions (3.1 MiB of WAL) would be lost: alp has been alone since \
               2026-11-20T15:11:06Z"
            .into(),
    };
    s.events.push(event("15:11:03", "standby_lost", "midna is silent; commits wait for it"));
    s.events.push(event("15:11:06", "alone", "alp goes on alone: midna was silent for 3.0 s (sync=none is recorded)"));
    s
}

fn conflict() -> Snapshot {
    let mut s = active();
    let mac = Some("52:54:00:ab:cd:ef".to_owned());
    s.gate.open = false;
    s.gate.state = GateState::Lapsed;
    s.gate.reason = Some("52:54:00:ab:cd:ef claims the VIP 192.0.2.100 too".into());
    s.role = Role::Passive;
    s.vips[0] = VipStatus { conflict: mac, bound: false, mac: None, address: "192.0.2.100/24".into() };
    s.vip = s.vips.first().cloned();
    s.replication.in_sync = false;
    s.outlook = unknown(
        "what would be lost if alp died now is not known: midna is not proven to have all that was \
                         acknowledged",
    );
    s.events.push(event("15:40:12", "vip_conflict", "52:54:00:ab:cd:ef claims 192.0.2.100 too"));
    s.events.push(event("15:40:12", "gate_cut", "52:54:00:ab:cd:ef claims the VIP 192.0.2.100 too"));
    s
}

/// midna takes over and waits for alp's lease to run out.
fn switching() -> Snapshot {
    let mut s = last();
    s.advice = None;
    s.procedure = Some(ProcedureStatus {
        kind: "promote".into(),
        id: 41,
        step: "waiting until alp's lease has surely run out, 3 s left".into(),
        since: "2026-11-20T15:42:04Z".into(),
    });
    s.outlook = unknown("what a failover would lose is not known while a promote is under way");
    s.witness.as_mut().unwrap().servers[0].verdict = VerdictWord::Here;
    s.witness.as_mut().unwrap().points_at = Some("midna".parse().unwrap());
    s.witness.as_mut().unwrap().epoch = Some(8);
    s.gate.reason = Some("a takeover to epoch 8 is under way".into());
    s.events.push(event("15:42:04", "promote", "portcullis promote was asked for"));
    s.events.push(event("15:42:05", "won", "the record names midna, epoch 8"));
    s
}

/// midna, with alp dead.
fn last() -> Snapshot {
    let mut s = passive();
    s.peer.as_mut().unwrap().reachable = false;
    s.peer.as_mut().unwrap().age_ms = Some(14_000);
    s.gate.reason = Some("the record points at alp".into());
    s.replication.in_sync = false;
    s.postgres.streaming = false;
    s.nodes[0].status = "down".into();
    s.nodes[0].attached = false;
    s.nodes[0].replication_delay_bytes = None;
    s.nodes[1].replication_state = None;
    s.nodes[1].attached = false;
    s.lag = None;
    s.advice = Some("portcullis promote --dry-run    (shows what a failover would do)".into());
    s.outlook.text = "alp does not answer; in a failover now, nothing would be lost: the record says sync=midna: no \
                      acknowledged write is missing"
        .into();
    s
}

fn overtaken() -> Snapshot {
    let mut s = fenced();
    s.advice = Some("portcullis rejoin alp    (bring this node back as standby)".into());
    s.outlook = unknown(
        "if midna died now, data might be lost: midna is alone since 2026-11-20T15:30:00Z: what it \
                         acknowledged after that is not here",
    );
    s.replication.alone_since = Some("2026-11-20T15:30:00Z".into());
    s.lag = None;
    s.events.push(event("15:30:00", "fenced", "fenced at 8: midna won epoch 8"));
    s
}

fn silence() -> Snapshot {
    let mut s = lapsed();
    s.advice = None;
    s.outlook = unknown(
        "what would be lost if alp died now is not known: midna is not proven to have all that was \
                         acknowledged",
    );
    s.lag = Some(Lag { node: "midna".parse().unwrap(), bytes: 0, ms: Some(0), away: true });
    s.events.push(event("15:41:59", "gate_cut", "neither the witness nor midna has confirmed epoch 7 for 5 s"));
    s
}

/// A node without a vote.
fn third() -> Snapshot {
    let mut s = passive();
    s.node = "zora".parse().unwrap();
    s.gate.reason =
        Some("this node has no vote (voter = false): it follows the active node and serves no clients".into());
    s.lease_ms = 0;
    s.nodes.push(NodeRow { sync_state: Some("async".into()), ..row(2, "zora", "standby") });
    s.vips[0].mac = None;
    s.lag = Some(Lag { node: "zora".parse().unwrap(), bytes: 8192, ms: Some(200), away: false });
    s
}

fn vip_only() -> Snapshot {
    let mut s = active();
    s.witness = None;
    s.vip_witness = Some(VipWitnessStatus { witness: Some("192.0.2.1".into()), age_ms: Some(480), error: None });
    s
}

fn dns_only() -> Snapshot {
    let mut s = active();
    s.vip = None;
    s.vips = Vec::new();
    let witness = s.witness.as_mut().unwrap();
    witness.mode = "observe".into();
    witness.epoch = None;
    witness.servers.push(ServerStatus {
        server: "[2001:db8::53]:53".into(),
        verdict: VerdictWord::Silent,
        age_ms: Some(1312),
        error: Some("no answer within 1 s".into()),
    });
    s
}

/// The same hour for everyone: a slow start, a peak, and a hole where the standby was away.
fn hour() -> History {
    History::of((1..=300_u32).map(|n| {
        let wave = |period: f64| (f64::from(n) / period).sin().abs();
        let lag = if n % 97 > 90 { u64::from(n % 7) * 90_000 } else { u64::from(n % 13) * 700 };
        let known = !(180..200).contains(&n);
        Sample {
            t: u64::from(n) * 10,
            at: format!("2026-11-20T14:{:02}:{:02}Z", 52 + (n / 6) % 8, n % 6 * 10),
            lag_bytes: known.then_some(lag),
            lag_ms: known.then_some(lag / 150),
            sessions: 8 + u64::from(n % 40 / 9),
            writes_per_s: Some(20.0 + 60.0 * wave(23.0)),
            transactions_per_s: Some(90.0 + 200.0 * wave(23.0)),
            received_bytes_per_s: Some(9_000.0 + 30_000.0 * wave(23.0)),
            sent_bytes_per_s: Some(60_000.0 + 150_000.0 * wave(31.0)),
        }
    }))
}

type State = (&'static str, Snapshot, &'static [&'static str]);

/// Each with what somebody who sees only the page must be able to read: who, why, and what to type.
fn states() -> Vec<State> {
    vec![
        ("active", active(), &["alp is active: its gate is open", "Nothing would be lost.", "192.0.2.53:53 names it"]),
        (
            "passive",
            passive(),
            &["alp is active; midna is passive", "Nothing would be lost.", "✓ up, standby, streams"],
        ),
        (
            "lapsed",
            silence(),
            &[
                "alp has lapsed, its gate is shut: neither the witness nor midna",
                "portcullis doctor",
                "no answer within",
            ],
        ),
        (
            "fenced",
            overtaken(),
            &["midna is active; alp is fenced: midna won epoch 8", "portcullis rejoin alp", "data might be lost"],
        ),
        (
            "switching",
            switching(),
            &[
                "SWITCHING",
                "promote is under way on midna",
                "nobody is known to be active",
                "waiting until alp's lease has surely run out",
                "portcullis status --watch",
            ],
        ),
        (
            "alone",
            alone(),
            &[
                "alp is active: its gate is open",
                "About 12041 transactions would be lost.",
                "on midna:",
                "systemctl start portcullis",
                "alone since 2026-11-20 15:11:06",
                "3.1 MiB, 31 min behind",
            ],
        ),
        (
            "conflict",
            conflict(),
            &[
                "CONFLICT",
                "the machine with MAC 52:54:00:ab:cd:ef claims it too",
                "portcullis doctor",
                "take the address",
            ],
        ),
        (
            "last-one",
            last(),
            &[
                "midna is passive; the record points at alp, which does not say that it is active",
                "portcullis promote --dry-run",
                "Nothing would be lost.",
                "✗ does not answer",
            ],
        ),
        ("third", third(), &["alp is active; zora is passive", "no vote", "zora is 8.0 KiB, 0.2 s behind"]),
        ("vip-only", vip_only(), &["alp is active", "VIP witness 192.0.2.1 answers", "a VIP and no DNS"]),
        ("dns-only", dns_only(), &["alp is active", "edited by a person", "[2001:db8::53]:53", "… silent"]),
    ]
}

#[tokio::test]
async fn every_state_can_be_read_screenshots() {
    let mut browser = Browser::start().await;
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/screenshots");
    let update = std::env::var_os("UPDATE_SCREENSHOTS").is_some();
    for (name, mut snapshot, words) in states() {
        snapshot.next = next(&snapshot);
        let (views, _switches, _publish) = views_with(snapshot, hour());
        let at = listen(router(views)).await;
        let url = format!("http://{at}/");
        for (kind, look) in [("desk", Look::DESK), ("phone", Look::PHONE)] {
            let tab = browser.open(&url, look).await;
            let text = browser.text(&tab).await;
            let told: Vec<String> = text.lines().map(|line| line.trim().to_lowercase()).collect();
            let told = told.join("\n");
            for word in words {
                assert!(told.contains(&word.to_lowercase()), "{name} {kind}: no {word:?} in\n{text}");
            }
            for plot in ["lag in bytes", "lag in seconds", "sessions", "transactions that write"] {
                assert!(told.contains(plot), "{name} {kind}: no plot of {plot}");
            }
            let width = browser.value(&tab, "document.documentElement.scrollWidth").await;
            assert_eq!(width, look.width, "{name} {kind}: the page scrolls sideways");
            let dark = "getComputedStyle(document.body).backgroundColor === 'rgb(18, 22, 28)'";
            assert_eq!(browser.value(&tab, dark).await, look.dark, "{name} {kind}: the scheme is not obeyed");
            if look.script {
                browser.until(&tab, "document.getElementById('gone').hidden").await;
            }
            if update {
                browser.whole(&tab, look).await;
                let picture = browser.picture(&tab).await;
                store(&format!("{folder}/{name}-{kind}.png"), &picture);
            }
            for asked in browser.asked(&tab) {
                assert!(asked.starts_with(&url), "{name} {kind} asks for {asked}");
            }
            let complaints = browser.complaints(&tab);
            assert!(complaints.is_empty(), "{name} {kind}: {complaints:#?}");
            browser.close(tab).await;
        }
    }
}

/// Few colours suffice, and the repository stays small.
fn store(path: &str, picture: &[u8]) {
    std::fs::create_dir_all(std::path::Path::new(path).parent().unwrap()).unwrap();
    let mut quant = Command::new("pngquant")
        .args(["--strip", "--speed", "1", "64", "-"])
        .stdin(Stdio::piped())
        .stdout(std::fs::File::create(path).unwrap())
        .spawn()
        .expect("apt-get install pngquant");
    quant.stdin.take().unwrap().write_all(picture).unwrap();
    assert!(quant.wait().unwrap().success());
    assert!(std::fs::metadata(path).unwrap().len() < 100_000, "{path} is too large");
}

#[tokio::test]
async fn the_page_is_live_and_says_when_it_is_not() {
    let mut browser = Browser::start().await;
    let (views, switches, publish) = views(active());
    let at = listen(router(views)).await;
    let tab = browser.open(&format!("http://{at}/"), Look::DESK).await;
    browser.value(&tab, "window.same = true").await;
    browser.until(&tab, "document.title === 'alp: active'").await;
    // The lease runs down by itself where nothing new comes.
    switches.gate.store(false, Ordering::SeqCst);
    let mut moved = overtaken();
    moved.next = next(&moved);
    publish.send_replace(Arc::new(moved));
    browser.until(&tab, "document.title === 'alp: fenced'").await;
    browser.until(&tab, "document.querySelector('pre').innerText.trim() === 'portcullis rejoin alp'").await;
    assert!(browser.text(&tab).await.contains("midna is active; alp is fenced"));
    // A command that is being copied is not pulled away.
    browser.value(&tab, "getSelection().selectAllChildren(document.querySelector('pre')), true").await;
    publish.send_replace(Arc::new(active()));
    switches.gate.store(true, Ordering::SeqCst);
    browser.until(&tab, "document.title === 'alp: active'").await;
    assert_eq!(browser.value(&tab, "getSelection().toString().trim()").await, "portcullis rejoin alp");
    browser.value(&tab, "getSelection().removeAllRanges(), true").await;
    browser.until(&tab, "document.querySelector('pre') === null").await;
    // Nobody publishes any more: streams end, none begins, and the page says so.
    assert_eq!(browser.value(&tab, "window.same").await, true, "it was loaded anew");
    assert_eq!(browser.complaints(&tab).len(), 0);
    drop(publish);
    browser.until(&tab, "!document.getElementById('gone').hidden").await;
    let gone = browser.text(&tab).await;
    assert!(gone.contains("Not live: nothing has come from this daemon for"), "{gone}");
}
