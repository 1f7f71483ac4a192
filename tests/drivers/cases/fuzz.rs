//! Strangers at the front door: arbitrary and mutated bytes before, during and after the login. The gate never panics
//! (its process lives on), never hangs (each connection ends within a deadline), never grows beyond its limit.
//!
//! What it is NOT: it does not look for wrong answers; the other suites do. PostgreSQL itself is no subject here.

use super::{logged_in, raw};
use crate::raw::{SYNC, extended, message, query, startup};
use crate::suite::{Case, Target, case};
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::Semaphore;
use tokio::time::{Instant, timeout};

/// A case goes on for this long, or this many seeds, and on a slow machine until it had the least.
const TIME: Duration = Duration::from_secs(5);
const SEEDS: u64 = 4000;
const DECODER_SEEDS: u64 = 20_000;
const AT_LEAST: u64 = 200;
const AT_A_TIME: usize = 32;
/// A connection whose client has said its last ends within this.
const DEADLINE: Duration = Duration::from_secs(40);
/// Buffers of so many connections, and what an allocator keeps.
const GROWTH_KIB: u64 = 16 * 1024;

pub fn cases() -> Vec<Case> {
    vec![
        case!(decoders, 180),
        case!(before_the_login, 180),
        case!(during_the_login, 180),
        case!(after_the_login, 180),
        case!(openings_that_never_end, 180),
    ]
}

/// SplitMix64: every failure has a seed.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: usize) -> usize {
        usize::try_from(self.next() % u64::try_from(n.max(1)).unwrap()).unwrap()
    }

    fn byte(&mut self) -> u8 {
        self.next().to_le_bytes()[0]
    }

    fn bytes(&mut self, most: usize) -> Vec<u8> {
        let length = self.below(most);
        (0..length).map(|_| self.byte()).collect()
    }

    /// Changes a few places: a bit, a byte, a length, a piece gone, doubled, or put in.
    fn mutate(&mut self, bytes: &mut Vec<u8>) {
        for _ in 0..self.below(6) {
            let at = self.below(bytes.len());
            let end = (at + self.below(24)).min(bytes.len());
            match self.below(7) {
                0 if !bytes.is_empty() => bytes[at] ^= 1 << self.below(8),
                1 if !bytes.is_empty() => bytes[at] = self.byte(),
                2 if bytes.len() >= at + 4 => {
                    let odd = [0, 1, 3, 4, 5, 0xffff, 0x7fff_ffff, 0x3fff_ffff, 0x3fff_fffe, 0x8000_0000, 0xffff_ffff];
                    bytes[at..at + 4].copy_from_slice(&u32::to_be_bytes(odd[self.below(odd.len())]));
                }
                3 => drop(bytes.drain(at..end)),
                4 => {
                    let piece = bytes[at..end].to_vec();
                    bytes.splice(at..at, piece);
                }
                5 => {
                    let piece = self.bytes(40);
                    bytes.splice(at..at, piece);
                }
                _ => bytes.truncate(self.below(bytes.len() + 1)),
            }
        }
    }
}

/// Opening packets of all kinds, some of them after another.
fn opening(random: &mut Random, database: &str) -> Vec<u8> {
    let mut bytes = match random.below(8) {
        0 => random.bytes(300),
        1 => crate::raw::SSL_REQUEST.to_vec(),
        2 => crate::raw::GSSENC_REQUEST.to_vec(),
        3 => portcullis::wire::pg::cancel_request(i32::from_le_bytes([random.byte(), 1, 0, 0]), &random.bytes(300)),
        4 => {
            let name = "n".repeat(random.below(200));
            startup(random.byte(), &[("user", "lowly"), ("database", database), (&name, &name), ("_pq_.x", "1")])
        }
        5 => startup(2, &[("user", "nobody"), ("database", database), ("replication", "database")]),
        6 => [crate::raw::SSL_REQUEST.to_vec(), startup(0, &[("user", "app")])].concat(),
        _ => startup(0, &[("user", "lowly"), ("database", "nowhere"), ("options", "-c work_mem=4MB")]),
    };
    random.mutate(&mut bytes);
    bytes
}

/// Messages of a session, in no sensible order. The role may do nothing that lasts.
fn messages(random: &mut Random) -> Vec<u8> {
    let mut all = Vec::new();
    for _ in 0..1 + random.below(8) {
        let one = match random.below(16) {
            0 => query("select 1"),
            1 => query("begin; select 1/0"),
            2 => query("copy (select generate_series(1, 1000)) to stdout"),
            3 => query("create temporary table if not exists t(n text); copy t from stdin"),
            4 => message(b'd', &random.bytes(200)),
            5 => message([b'c', b'f'][random.below(2)], b"why\0"),
            6 => SYNC.to_vec(),
            7 => message(b'H', b""),
            8 => extended("select $1::int"),
            9 => message(b'P', format!("s{}\0select 1\0\0\0", random.below(4)).as_bytes()),
            10 => message(b'B', format!("\0s{}\0\0\0\0\0\0\0", random.below(4)).as_bytes()),
            11 => message([b'D', b'C'][random.below(2)], format!("Ss{}\0", random.below(4)).as_bytes()),
            12 => message(b'E', b"\0\0\0\0\x01"),
            13 => message(b'F', &random.bytes(30)),
            14 => message(random.byte(), &random.bytes(60)),
            _ => query("show pool_nodes; show"),
        };
        all.extend(one);
    }
    random.mutate(&mut all);
    all
}

/// Connects, says all of it (in pieces), says no more, and waits for the end.
async fn stranger(target: Arc<Target>, seed: u64, prelude: Vec<u8>, bytes: Vec<u8>) {
    let mut random = Random(!seed);
    let talk = async {
        let mut stream = TcpStream::connect(target.address).await.expect("the gate accepts");
        let (mut reader, mut writer) = stream.split();
        let writing = async {
            writer.write_all(&prelude).await?;
            let cut = random.below(bytes.len() + 1);
            writer.write_all(&bytes[..cut]).await?;
            tokio::task::yield_now().await;
            writer.write_all(&bytes[cut..]).await?;
            writer.shutdown().await
        };
        let reading = async {
            let mut sink = vec![0; 8192];
            while matches!(reader.read(&mut sink).await, Ok(1..)) {}
        };
        // A reset while we still write is an end as well.
        let _ = tokio::join!(writing, reading);
    };
    assert!(timeout(DEADLINE, talk).await.is_ok(), "seed {seed}: the connection does not end");
}

/// Strangers until time is up; the gate is as it was before.
async fn siege(target: &Arc<Target>, make: impl Fn(&mut Random, &str) -> (Vec<u8>, Vec<u8>)) {
    let Some(gate) = target.gate() else { return };
    let (mut witness, _) = logged_in(target).await;
    gate.forget_peak();
    let before = gate.peak_kib();
    let began = Instant::now();
    let seats = Arc::new(Semaphore::new(AT_A_TIME));
    let mut strangers = tokio::task::JoinSet::new();
    let mut seed = 0;
    while seed < SEEDS && (began.elapsed() < TIME || seed < AT_LEAST) {
        let seat = Arc::clone(&seats).acquire_owned().await.unwrap();
        let (prelude, bytes) = make(&mut Random(seed), &target.database);
        let stranger = stranger(Arc::clone(target), seed, prelude, bytes);
        strangers.spawn(async move {
            stranger.await;
            drop(seat);
        });
        seed += 1;
        while let Some(done) = strangers.try_join_next() {
            done.expect("a stranger is served to its end");
        }
    }
    while let Some(done) = strangers.join_next().await {
        done.expect("a stranger is served to its end");
    }
    assert!(gate.is_alive(), "the gate's process died");
    let grown = gate.peak_kib().saturating_sub(before);
    assert!(grown <= GROWTH_KIB, "the gate grew by {grown} KiB");
    // Those inside did not notice, and more may come.
    assert_eq!(witness.ask(&query("select 1")).await, "TDCi");
    assert_eq!(logged_in(target).await.0.ask(&query("select 1")).await, "TDCi");
}

async fn before_the_login(target: Arc<Target>) {
    siege(&target, |random, database| {
        let bytes = (0..1 + random.below(3)).flat_map(|_| opening(random, database)).collect();
        (Vec::new(), bytes)
    })
    .await;
}

async fn during_the_login(target: Arc<Target>) {
    siege(&target, |random, _| {
        let prelude = startup(0, &[("user", "app"), ("database", "app")]);
        let mut initial = b"SCRAM-SHA-256\0\0\0\0\x20n,,n=,r=fyko+d2lbbFgONRv9qkxdawL".to_vec();
        random.mutate(&mut initial);
        let mut all = message(b'p', &initial);
        all.extend(message(b'p', b"c=biws,r=fyko+d2lbbFgONRv9qkxdawL3rfcNHYJY1ZVvWVs7j,p=AAAA"));
        if random.below(2) == 0 {
            random.mutate(&mut all);
        }
        (prelude, all)
    })
    .await;
}

async fn after_the_login(target: Arc<Target>) {
    siege(&target, |random, database| (startup(0, &[("user", "lowly"), ("database", database)]), messages(random)))
        .await;
}

/// Connections that announce much and send little, all open at once; they cost next to nothing while they last.
async fn openings_that_never_end(target: Arc<Target>) {
    let Some(gate) = target.gate() else { return };
    gate.forget_peak();
    let before = gate.peak_kib();
    let mut held = Vec::new();
    for turn in 0..300u32 {
        let mut one = raw(&target).await;
        match turn % 3 {
            0 => {}
            1 => one.send(&[0, 0, 0x27, 0x10, 0, 3]).await,
            _ => one.send(&[0x7f, 0xff, 0xff, 0xff, 0, 3]).await,
        }
        held.push(one);
    }
    assert_eq!(logged_in(&target).await.0.ask(&query("select 1")).await, "TDCi");
    let grown = gate.peak_kib().saturating_sub(before);
    assert!(grown <= GROWTH_KIB, "the gate grew by {grown} KiB");
}

/// The decoders alone, many more of them.
async fn decoders(target: Arc<Target>) {
    for seed in 0..DECODER_SEEDS {
        let mut random = Random(seed);
        let bytes = match random.below(4) {
            0 => random.bytes(400),
            1 => opening(&mut random, &target.database)[..].iter().skip(4).copied().collect(),
            2 => [messages(&mut random), messages(&mut random)].concat(),
            _ => {
                // Both sides of a session.
                let mut down = Vec::new();
                for _ in 0..random.below(20) {
                    let kinds = b"123CDEGHIKNRSTVZnst";
                    let kind = kinds[random.below(kinds.len())];
                    down.extend(message(kind, &[random.bytes(30), b"I".to_vec()].concat()));
                }
                let mut up = messages(&mut random);
                up.resize(up.len().max(down.len()), 0);
                down.resize(up.len(), 0);
                [up, down].concat()
            }
        };
        let caught = std::panic::catch_unwind(|| crate::decoders::exercise(&bytes));
        assert!(caught.is_ok(), "seed {seed}: {bytes:?}");
    }
}
