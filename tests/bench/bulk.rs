//! Large transfers: COPY out and in with a proof that not a byte changed, and a result of a gigabyte to a client that
//! reads slowly while the system's memory is watched.

use crate::client::{Client, sha256_of};
use crate::harness::sys::{Fail, Outcome, in_netns, millis, now, pause, secs};
use crate::rig::Rig;
use crate::systems::Running;
use crate::usage::{Cpu, pss_kib};
use portcullis::base::time::Duration;
use ring::digest;
use std::sync::atomic::{AtomicBool, Ordering};

/// Bytes of one row of text as COPY writes it: wide enough that the client's own work does not count.
const ROW: u64 = 1004;
const OUT: &str = "COPY bulk TO STDOUT";
const IN: &str = "COPY bulk_in FROM STDIN";
const BACK: &str = "COPY bulk_in TO STDOUT";
/// How fast the slow reader reads, in bytes a second, and for how long; then it takes the rest at once.
const SLOW_RATE: usize = 8 * 1024 * 1024;
const SLOW_FOR: Duration = secs(8);

/// The table to copy, and its bytes as COPY writes them.
pub struct Bulk {
    data: Vec<u8>,
    sha256: String,
}

/// What one COPY out and one COPY in gave.
#[derive(Debug, Clone, Copy)]
pub struct Copied {
    /// Megabytes (10^6 bytes) a second.
    pub out_rate: f64,
    pub in_rate: f64,
    /// Milliseconds of the proxy's CPU per megabyte.
    pub cpu: Option<(f64, f64)>,
}

/// Memory of the system around a slow reader, in KiB.
#[derive(Debug, Clone, Copy)]
pub struct Slow {
    pub before: u64,
    pub most: u64,
}

impl Bulk {
    /// Fills the tables.
    pub fn new(rig: &Rig, megabytes: u64) -> Outcome<Bulk> {
        let rows = megabytes * 1_000_000 / ROW;
        rig.sql("DROP TABLE IF EXISTS bulk, bulk_in")?;
        rig.sql(&format!(
            "CREATE UNLOGGED TABLE bulk AS SELECT lpad(i::text, 10, '0') AS i, repeat(md5(i::text), 31) AS t \
             FROM generate_series(1, {rows}) i"
        ))?;
        rig.sql("CREATE UNLOGGED TABLE bulk_in (LIKE bulk)")?;
        let direct = Running::direct(rig);
        let mut data = Vec::new();
        in_netns(rig.lab.a.ns(), || Client::open(&direct)?.run(OUT, |piece| data.extend_from_slice(piece)))?;
        let sha256 = data_encoding::HEXLOWER.encode(digest::digest(&digest::SHA256, &data).as_ref());
        Ok(Bulk { data, sha256 })
    }

    /// COPY out and in, timed; with `prove`, both are compared by their SHA-256 afterwards.
    pub fn copy(&self, rig: &Rig, on: &Running, prove: bool) -> Outcome<Copied> {
        rig.sql("TRUNCATE bulk_in")?;
        in_netns(rig.lab.a.ns(), || {
            let mut client = Client::open(on)?;
            let megabytes = self.megabytes();
            let (began, cpu) = (now(), on.pid.map(Cpu::of));
            let mut bytes = 0;
            client.run(OUT, |piece| bytes += piece.len())?;
            if bytes != self.data.len() {
                return Err(Fail(format!("COPY out gave {bytes} bytes, not {}", self.data.len())));
            }
            let (turned, cpu_out) = (now(), spent(on, cpu.as_ref(), megabytes));
            let cpu = on.pid.map(Cpu::of);
            client.copy_in(IN, &self.data)?;
            let (ended, cpu_in) = (now(), spent(on, cpu.as_ref(), megabytes));
            if prove {
                for (what, sum) in [
                    ("out", sha256_of(&mut client, OUT)?),
                    ("in", sha256_of(&mut Client::open(&Running::direct(rig))?, BACK)?),
                ] {
                    if sum != self.sha256 {
                        return Err(Fail(format!("COPY {what}: the bytes differ")));
                    }
                }
            }
            Ok(Copied {
                out_rate: megabytes / turned.since(began).as_secs_f64(),
                in_rate: megabytes / ended.since(turned).as_secs_f64(),
                cpu: cpu_out.zip(cpu_in),
            })
        })
    }

    #[allow(clippy::cast_precision_loss, reason = "far below 2^52")]
    fn megabytes(&self) -> f64 {
        self.data.len() as f64 / 1e6
    }

    /// The whole table as rows to a client that reads slowly at first; the system's memory is looked at all the while.
    pub fn slowly(&self, rig: &Rig, on: &Running) -> Outcome<Slow> {
        let pid = on.pid.ok_or("memory of a slow reader is asked of a proxy only")?;
        let done = AtomicBool::new(false);
        let before = pss_kib(pid)?;
        std::thread::scope(|scope| {
            let watcher = scope.spawn(|| {
                let mut most = before;
                while !done.load(Ordering::Relaxed) {
                    most = most.max(pss_kib(pid).unwrap_or(0));
                    pause(millis(50));
                }
                most
            });
            let read = in_netns(rig.lab.a.ns(), || {
                let mut client = Client::open(on)?;
                let began = now();
                let mut bytes = 0usize;
                client.run("SELECT * FROM bulk", |piece| {
                    bytes += piece.len();
                    let passed = now().since(began);
                    let due = millis(u64::try_from(bytes * 1000 / SLOW_RATE).unwrap_or(0));
                    if passed < SLOW_FOR && due > passed {
                        pause(due.saturating_sub(passed));
                    }
                })?;
                Ok(bytes)
            });
            done.store(true, Ordering::Relaxed);
            let most = watcher.join().map_err(|_| Fail("a thread of the bench panicked".to_owned()))?;
            read.map(|_| Slow { before, most })
        })
    }
}

fn spent(on: &Running, before: Option<&Cpu>, megabytes: f64) -> Option<f64> {
    Some(Cpu::of(on.pid?).since(before?).micros / 1000.0 / megabytes)
}
