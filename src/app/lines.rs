//! Lines for a reader that may be slow, stuck or full: the log on standard error, and the event log on its disk.
//!
//! A thread of its own writes them; whoever has something to say hands it over and goes on. What it is NOT: no line is
//! promised to arrive. **Invariant:** [`Lines::put`] never waits: a turn that waited for a log would fence nothing and
//! renew nothing (C18). What finds no room is counted, and the count is told when there is room again.

use crate::base::time::Duration;
use std::io::{self, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{SyncSender, sync_channel};
use tracing_subscriber::fmt::MakeWriter;

/// Lines that wait for the writer; further ones are lost.
const WAITING: usize = 4096;
/// How often the end of a flush is looked for.
const LOOK_EVERY: Duration = Duration::from_millis(5);

/// Where lines go. A copy leads to the same writer.
#[derive(Debug, Clone)]
pub struct Lines {
    queue: SyncSender<Vec<u8>>,
    lost: Arc<AtomicU64>,
    taken: Arc<AtomicU64>,
    written: Arc<AtomicU64>,
}

impl Lines {
    /// Starts the writer's thread. `write` may take as long as it likes.
    ///
    /// # Errors
    /// The system gives no thread.
    pub fn start(name: &str, mut write: impl FnMut(&[u8]) + Send + 'static) -> io::Result<Lines> {
        let (queue, waiting) = sync_channel::<Vec<u8>>(WAITING);
        let lines = Lines { queue, lost: Arc::default(), taken: Arc::default(), written: Arc::default() };
        let (lost, written) = (Arc::clone(&lines.lost), Arc::clone(&lines.written));
        std::thread::Builder::new().name(name.to_owned()).spawn(move || {
            while let Ok(line) = waiting.recv() {
                write(&line);
                written.fetch_add(1, Ordering::SeqCst);
                let missing = lost.swap(0, Ordering::SeqCst);
                if missing > 0 {
                    write(
                        format!("{missing} lines were lost here: they could not be written fast enough\n").as_bytes(),
                    );
                }
            }
        })?;
        Ok(lines)
    }

    /// Hands a line over, or counts it as lost. Never waits.
    pub fn put(&self, line: Vec<u8>) {
        // Counted first: a flush that begins now waits for it.
        self.taken.fetch_add(1, Ordering::SeqCst);
        if self.queue.try_send(line).is_err() {
            self.taken.fetch_sub(1, Ordering::SeqCst);
            self.lost.fetch_add(1, Ordering::SeqCst);
        }
    }

    /// Waits until what was put is written, at most `limit`: for the end of the process.
    pub fn flush(&self, limit: Duration) {
        let rounds = limit.as_millis() / LOOK_EVERY.as_millis().max(1);
        for _ in 0..rounds {
            if self.written.load(Ordering::SeqCst) >= self.taken.load(Ordering::SeqCst) {
                return;
            }
            std::thread::sleep(LOOK_EVERY);
        }
    }
}

/// The subscriber writes one whole event at a time.
impl Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.put(bytes.to_vec());
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for Lines {
    type Writer = Lines;

    fn make_writer(&'a self) -> Lines {
        self.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::channel;

    #[test]
    fn a_stuck_reader_holds_nobody_up_and_is_told_what_it_missed() {
        let (go, gone) = channel::<()>();
        let (out, seen) = channel();
        let lines = Lines::start("test", move |line| {
            let _until_let_go = gone.recv();
            out.send(String::from_utf8_lossy(line).into_owned()).expect("the test listens");
        })
        .expect("a thread");
        // One is in the writer's hand, the others wait; far more than fit.
        for n in 0..WAITING + 100 {
            lines.put(format!("{n}\n").into_bytes());
        }
        lines.flush(Duration::from_millis(20));
        drop(go);
        lines.flush(Duration::from_secs(10));
        let seen: Vec<String> = seen.try_iter().collect();
        assert_eq!(seen[0], "0\n");
        let told = seen.iter().find(|line| line.contains("lost here")).expect("told");
        let lost: usize = told.split(' ').next().and_then(|word| word.parse().ok()).expect("a number");
        assert_eq!(seen.len() - 1 + lost, WAITING + 100, "every line is written or counted");
    }
}
