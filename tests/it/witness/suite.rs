//! The cases every server must pass that shall be a witness.

use crate::relay;
use crate::servers::{self, KEY_NAME, Kind, LIMIT, NAME, SECRET, Server, TTL, ZONE, authority, key, need};
use hickory_proto::op::{Message, ResponseCode};
use portcullis::io::dns::Authority;
use portcullis::wire::dns::{Reading, RecordPair, ServiceNames, TsigKey, Update, UpdateOutcome, verify};
use std::io::Write;
use std::net::{IpAddr, Ipv4Addr};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, SystemTime};
use tokio::task::JoinSet;

/// How long a case waits for an answer that must not come.
const SHORT: Duration = Duration::from_millis(400);

const ROUNDS: u64 = 300;
const CLIENTS: u8 = 8;

pub fn ip(last: u8) -> IpAddr {
    IpAddr::V4(Ipv4Addr::new(192, 0, 2, last))
}

pub fn marker(seq: u64) -> String {
    format!(
        "v=1 epoch=7 seq={seq} active=alp sync=midna timeline=3 lease=5000 sysid=7318000111222333444 \
         boot=5f1c0000-0000-4000-8000-000000000001 since=2026-11-20T15:11:00Z"
    )
}

pub async fn read(authority: &Authority) -> Reading {
    authority.ask(LIMIT).await.expect("an answer that counts")
}

pub async fn swap(authority: &Authority, from: &RecordPair, to: u8, seq: u64) -> UpdateOutcome {
    authority.update(from, &[ip(to)], TTL, &marker(seq), LIMIT).await
}

fn written(last: u8, seq: u64) -> RecordPair {
    RecordPair::written(&[ip(last)], TTL, &marker(seq))
}

fn now_s() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).expect("after 1970").as_secs()
}

fn refusal(outcome: UpdateOutcome) -> String {
    match outcome {
        UpdateOutcome::Refused(sentence) => sentence,
        other => panic!("expected a refusal, not {other:?}"),
    }
}

pub async fn swap_done_then_stale_then_back(kind: Kind) {
    let server = Server::start(kind).await;
    let authority = server.authority();
    let first = read(&authority).await.pair;
    assert_eq!((first.addresses.clone(), first.marker.len(), first.ttl), (vec![ip(1)], 0, TTL));
    assert_eq!(swap(&authority, &first, 2, 1).await, UpdateOutcome::Done);
    let second = read(&authority).await.pair;
    assert_eq!(second, written(2, 1));
    assert_eq!(swap(&authority, &first, 3, 2).await, UpdateOutcome::Conflict);
    assert_eq!(read(&authority).await.pair, second);
    assert_eq!(swap(&authority, &second, 1, 2).await, UpdateOutcome::Done);
    let third = read(&authority).await;
    assert_eq!(third.pair, written(1, 2));
    assert_eq!(third.strange, None);
    // Only one of the two sets differs: the address, then the marker.
    assert_eq!(swap(&authority, &written(2, 2), 3, 3).await, UpdateOutcome::Conflict);
    assert_eq!(swap(&authority, &written(1, 1), 3, 3).await, UpdateOutcome::Conflict);
    // IPv6 beside IPv4, and away again.
    let both = [ip(1), "2001:db8::1".parse().expect("an address")];
    let done = authority.update(&third.pair, &both, TTL, &marker(3), LIMIT).await;
    assert_eq!(done, UpdateOutcome::Done);
    let fourth = read(&authority).await.pair;
    assert_eq!(fourth.addresses, both);
    assert_eq!(swap(&authority, &written(1, 3), 2, 4).await, UpdateOutcome::Conflict, "AAAA exists now");
    assert_eq!(swap(&authority, &fourth, 2, 4).await, UpdateOutcome::Done);
    assert_eq!(read(&authority).await.pair, written(2, 4));
}

pub async fn a_part_of_a_set_is_no_prerequisite(kind: Kind) {
    let server = Server::start(kind).await;
    let authority = server.authority();
    let first = read(&authority).await.pair;
    let two = authority.update(&first, &[ip(1), ip(2)], TTL, &marker(1), LIMIT).await;
    assert_eq!(two, UpdateOutcome::Done);
    assert_eq!(swap(&authority, &written(1, 1), 3, 2).await, UpdateOutcome::Conflict);
    assert_eq!(swap(&authority, &written(2, 1), 3, 2).await, UpdateOutcome::Conflict);
    let whole = read(&authority).await.pair;
    assert_eq!(whole.addresses, [ip(1), ip(2)]);
    let three = RecordPair::new(vec![ip(1), ip(2), ip(3)], TTL, whole.texts().to_vec());
    assert_eq!(swap(&authority, &three, 3, 2).await, UpdateOutcome::Conflict);
    assert_eq!(swap(&authority, &whole, 3, 2).await, UpdateOutcome::Done);
}

/// "None exists" is a prerequisite too.
pub async fn the_first_marker_is_written_once(kind: Kind) {
    let server = Server::start(kind).await;
    let authority = server.authority();
    let none = RecordPair::new(vec![ip(1)], TTL, Vec::new());
    assert_eq!(swap(&authority, &none, 1, 1).await, UpdateOutcome::Done);
    assert_eq!(swap(&authority, &none, 1, 2).await, UpdateOutcome::Conflict);
    assert_eq!(read(&authority).await.pair, written(1, 1));
}

fn names() -> ServiceNames {
    ServiceNames::new(ZONE, NAME).expect("names")
}

fn plain_update(from: &RecordPair, now_s: u64) -> Update {
    Update::new(&names(), from, (&[ip(9)], TTL, &marker(9)), 4711, &key(), now_s).expect("an update")
}

pub async fn an_unsigned_update_is_refused(kind: Kind) {
    let server = Server::start(kind).await;
    let first = read(&server.authority()).await.pair;
    let update = plain_update(&first, now_s());
    let mut message = Message::from_vec(update.bytes()).expect("our own message");
    message.take_signature();
    let answer = relay::exchange(server.address, &message.to_vec().expect("encodes")).await.expect("an answer");
    let said = Message::from_vec(&answer).expect("a DNS message");
    assert!(matches!(said.response_code, ResponseCode::Refused | ResponseCode::NotAuth), "{:?}", said.response_code);
    assert!(said.signature().is_none());
    refusal(update.judge(&answer, now_s()));
    assert_eq!(read(&server.authority()).await.pair, first);
}

pub async fn an_unknown_key_and_a_wrong_secret_are_refused(kind: Kind) {
    let server = Server::start(kind).await;
    let first = read(&server.authority()).await.pair;
    let unknown = TsigKey::new("drawbridge", servers::ALGORITHM, SECRET).expect("a key");
    let wrong = TsigKey::new(KEY_NAME, servers::ALGORITHM, "d3Jvbmc=").expect("a key");
    let other_algorithm = TsigKey::new(KEY_NAME, "hmac-sha512", SECRET).expect("a key");
    for (key, word, inner) in [
        (unknown, "does not know the TSIG key drawbridge", "BadKey"),
        (wrong, "compare the secret", "BadSig"),
        (other_algorithm, "does not know the TSIG key portcullis (hmac-sha512)", "BadKey"),
    ] {
        let stranger = authority(server.address, NAME, Some(key));
        let sentence = refusal(swap(&stranger, &first, 9, 9).await);
        assert!(sentence.contains(word), "{sentence}");
        let silence = stranger.ask(LIMIT).await.expect_err("no answer that counts");
        assert!(silence.contains("NOTAUTH") && silence.contains(inner), "{silence}");
    }
    assert_eq!(read(&server.authority()).await.pair, first);
}

pub async fn a_clock_an_hour_off_is_refused(kind: Kind) {
    let server = Server::start(kind).await;
    let first = read(&server.authority()).await.pair;
    for wrong in [now_s() - 3600, now_s() + 3600] {
        let update = plain_update(&first, wrong);
        let answer = relay::exchange(server.address, update.bytes()).await.expect("an answer");
        let sentence = refusal(update.judge(&answer, wrong));
        assert!(sentence.contains("BADTIME") && sentence.contains("differ by 3"), "{sentence}");
        let said = Message::from_vec(&answer).expect("a DNS message");
        // Signed with the client's own time, so that the client can verify it (RFC 8945 section 5.2.3).
        let request = Message::from_vec(update.bytes()).expect("our own message");
        let mac = &request.signature().expect("signed").data.mac;
        let verified = verify(&key(), &answer, said.signature(), Some(mac), wrong).expect("BADTIME is signed");
        assert_eq!(verified.time, wrong);
    }
    assert_eq!(read(&server.authority()).await.pair, first);
}

pub async fn a_zone_not_served_is_refused(kind: Kind) {
    let server = Server::start(kind).await;
    let stranger = authority(server.address, "db.example.net", Some(key()));
    let sentence = refusal(swap(&stranger, &RecordPair::default(), 9, 9).await);
    assert!(sentence.contains("not the primary of zone example.net"), "{sentence}");
    let silence = stranger.ask(LIMIT).await.expect_err("no answer that counts");
    assert!(silence.contains("REFUSED"), "{silence}");
}

/// While a reader looks on, which must never see a moment without data.
pub async fn of_eight_racing_clients_exactly_one_wins(kind: Kind) {
    let server = Server::start(kind).await;
    let authority = server.authority();
    let mut current = read(&authority).await.pair;
    assert_eq!(swap(&authority, &current, 1, 1).await, UpdateOutcome::Done);
    current = written(1, 1);

    let (stop, readings) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let reader = tokio::spawn({
        let (authority, stop, readings) = (authority.clone(), stop.clone(), readings.clone());
        async move {
            while !stop.load(Ordering::Relaxed) {
                let pair = read(&authority).await.pair;
                assert_eq!((pair.addresses.len(), pair.marker.len()), (1, 1), "{pair:?}");
                readings.fetch_add(1, Ordering::Relaxed);
            }
        }
    });
    for round in 0..ROUNDS {
        let start = Arc::new(tokio::sync::Barrier::new(CLIENTS.into()));
        let mut clients = JoinSet::new();
        for client in 1..=CLIENTS {
            let (authority, current, start) = (authority.clone(), current.clone(), start.clone());
            let seq = 2 + round * u64::from(CLIENTS) + u64::from(client);
            clients.spawn(async move {
                start.wait().await;
                (client, seq, swap(&authority, &current, client, seq).await)
            });
        }
        let mut winners = Vec::new();
        for (client, seq, outcome) in clients.join_all().await {
            match outcome {
                UpdateOutcome::Done => winners.push((client, seq)),
                UpdateOutcome::Conflict => {}
                other => panic!("round {round}: {other:?}"),
            }
        }
        let [(client, seq)] = winners[..] else { panic!("round {round}: winners {winners:?}") };
        current = written(client, seq);
    }
    stop.store(true, Ordering::Relaxed);
    reader.await.expect("the reader saw data all the time");
    assert_eq!(read(&authority).await.pair, current);
    println!("{} readings while {ROUNDS} rounds were raced", readings.load(Ordering::Relaxed));
    assert!(readings.load(Ordering::Relaxed) >= 50, "the reader hardly looked");
}

pub async fn signed_questions_get_signed_answers(kind: Kind) {
    let server = Server::start(kind).await;
    let signed = read(&server.authority()).await.signed_time.expect("a signed time");
    assert!(signed.abs_diff(now_s()) <= 2, "the server's clock is ours here");
    let unsigned = read(&authority(server.address, NAME, None)).await;
    assert_eq!(unsigned.signed_time, None);
    assert_eq!(unsigned.pair.addresses, [ip(1)]);
    assert!(unsigned.soa_serial.is_some(), "the answer without a marker carries the SOA");
}

pub async fn an_unsigned_answer_to_a_signed_question_is_silence(kind: Kind) {
    let server = Server::start(kind).await;
    let relay = relay::strips_the_signature(server.address, false).await;
    let why = authority(relay, NAME, Some(key())).ask(LIMIT).await.expect_err("it must not count");
    assert!(why.contains("not signed"), "{why}");
}

/// Who can throw in a forged datagram, but cannot stop the server's own, does not silence the witness.
pub async fn a_forged_answer_before_the_real_one_is_passed_over(kind: Kind) {
    let server = Server::start(kind).await;
    let relay = relay::strips_the_signature(server.address, true).await;
    let reading = read(&authority(relay, NAME, Some(key()))).await;
    assert_eq!(reading.pair.addresses, [ip(1)]);
    assert!(reading.signed_time.is_some(), "what counted was the signed answer");
}

pub async fn an_update_without_answer_is_settled_by_the_next(kind: Kind) {
    let server = Server::start(kind).await;
    let direct = server.authority();
    let first = read(&direct).await.pair;
    let relay = relay::loses_the_answer(server.address).await;
    let lossy = authority(relay, NAME, Some(key()));
    let outcome = lossy.update(&first, &[ip(2)], TTL, &marker(1), SHORT * 5).await;
    assert!(matches!(&outcome, UpdateOutcome::Unknown(why) if why.contains("no answer")), "{outcome:?}");
    let read_then = read(&direct).await.pair;
    assert_eq!(read_then, written(2, 1), "here it had landed");
    assert_eq!(swap(&direct, &read_then, 2, 2).await, UpdateOutcome::Done);
    assert_eq!(read(&direct).await.pair, written(2, 2));
}

pub async fn an_update_that_never_arrived_cannot_land_later(kind: Kind) {
    let server = Server::start(kind).await;
    let direct = server.authority();
    let first = read(&direct).await.pair;
    let (relay, release, answer) = relay::holds_the_request(server.address).await;
    let held = authority(relay, NAME, Some(key()));
    let outcome = held.update(&first, &[ip(2)], TTL, &marker(1), SHORT).await;
    assert!(matches!(outcome, UpdateOutcome::Unknown(_)), "{outcome:?}");
    assert_eq!(read(&direct).await.pair, first, "nothing has landed");
    // The same address as before: the marker alone makes the old update fail.
    assert_eq!(swap(&direct, &first, 1, 2).await, UpdateOutcome::Done);
    release.send(()).expect("the relay waits");
    let late = tokio::time::timeout(LIMIT, answer).await.expect("in time").expect("an answer");
    let code = Message::from_vec(&late).expect("a DNS message").response_code;
    assert!(matches!(code, ResponseCode::NXRRSet | ResponseCode::YXRRSet), "{code:?}");
    assert_eq!(read(&direct).await.pair, written(1, 2));
}

/// Runs `nsupdate` with our key; returns whether it succeeded, and what it said.
pub fn nsupdate(server: &Server, commands: &str) -> (bool, String) {
    need("nsupdate", "bind9-dnsutils");
    let mut child = Command::new("nsupdate")
        .args(["-t", "10", "-k"])
        .arg(server.key_file())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("nsupdate starts");
    let (host, port) = (server.address.ip(), server.address.port());
    let script = format!("server {host} {port}\n{commands}\nsend\n");
    child.stdin.take().expect("piped").write_all(script.as_bytes()).expect("nsupdate reads");
    let output = child.wait_with_output().expect("nsupdate ends");
    (output.status.success(), String::from_utf8_lossy(&output.stderr).into_owned())
}

/// Runs `dig`; returns all it printed.
pub fn dig(server: &Server, arguments: &[&str]) -> String {
    need("dig", "bind9-dnsutils");
    let output = Command::new("dig")
        .args(["+tries=1", "+time=10", "+norecurse", &format!("@{}", server.address.ip())])
        .args(["-p", &server.address.port().to_string()])
        .args(arguments)
        .output()
        .expect("dig runs");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

pub async fn a_long_answer_comes_by_tcp(kind: Kind) {
    let server = Server::start(kind).await;
    let lines: Vec<String> = (0..20)
        .map(|n| format!("update add _portcullis.{NAME}. 5 TXT \"{n:02}{}\" \"tail\"", "x".repeat(200)))
        .collect();
    assert_eq!(nsupdate(&server, &lines.join("\n")), (true, String::new()));
    assert!(dig(&server, &["+ignore", &format!("_portcullis.{NAME}"), "TXT"]).contains("flags: qr aa tc"));
    for key in [Some(key()), None] {
        let pair = read(&authority(server.address, NAME, key)).await.pair;
        assert_eq!(pair.marker.len(), 20);
        assert!(pair.marker.iter().all(|text| text.ends_with("xtail")));
    }
    // And all of it can be a prerequisite.
    let all = read(&server.authority()).await.pair;
    assert_eq!(swap(&server.authority(), &all, 1, 1).await, UpdateOutcome::Done);
}

pub async fn the_apex_survives_its_wipe(kind: Kind) {
    let server = Server::start(kind).await;
    for wipe in [format!("{ZONE}. ANY"), format!("{ZONE}. SOA"), format!("{ZONE}. NS")] {
        // Whether it is refused or passed over is the server's choice.
        nsupdate(&server, &format!("zone {ZONE}\nupdate delete {wipe}"));
    }
    assert!(dig(&server, &["+short", ZONE, "SOA"]).starts_with("ns.example.org. hostmaster.example.org. "));
    assert_eq!(dig(&server, &["+short", ZONE, "NS"]), "ns.example.org.\n");
    let first = read(&server.authority()).await.pair;
    assert_eq!(first.addresses, [ip(1)]);
    assert_eq!(swap(&server.authority(), &first, 2, 1).await, UpdateOutcome::Done);
}

pub async fn dig_and_nsupdate_work(kind: Kind) {
    let server = Server::start(kind).await;
    let serial = || dig(&server, &["+short", ZONE, "SOA"]).split(' ').nth(2).expect("a serial").to_owned();
    let before = serial();
    // No `zone` line: nsupdate finds it by asking for the SOA.
    let (done, said) = nsupdate(&server, &format!("update delete {NAME}. A\nupdate add {NAME}. 7 A 192.0.2.7"));
    assert!(done, "{said}");
    let key_file = server.key_file();
    let key_file = key_file.to_str().expect("UTF-8");
    for how in [&["+notcp"][..], &["+tcp"], &["+noedns"], &["-k", key_file]] {
        let answer = dig(&server, &[how, &[NAME, "A"]].concat());
        assert!(answer.contains("status: NOERROR") && answer.contains("flags: qr aa;"), "{answer}");
        assert!(answer.contains("192.0.2.7") && answer.contains("\t7\tIN\tA\t"), "{answer}");
        assert_eq!(answer.contains("TSIG PSEUDOSECTION"), how.contains(&"-k"), "{answer}");
        assert!(!answer.contains("WARNING") && !answer.contains("Couldn't verify"), "{answer}");
    }
    let after = serial();
    assert_ne!(before, after, "every change raises the serial");
    let (done, said) = nsupdate(&server, &format!("prereq yxrrset {NAME}. A 192.0.2.8\nupdate delete {NAME}. A"));
    assert!(!done && said.contains("NXRRSET"), "{said}");
    assert_eq!(serial(), after, "what changes nothing does not");
    let missing = dig(&server, &["nowhere.example.org", "A"]);
    assert!(missing.contains("status: NXDOMAIN") && missing.contains("AUTHORITY SECTION"), "{missing}");
    let empty = dig(&server, &[NAME, "AAAA"]);
    assert!(empty.contains("status: NOERROR") && empty.contains("hostmaster.example.org"), "{empty}");
    assert!(dig(&server, &[ZONE, "AXFR"]).contains("Transfer failed"));
}
