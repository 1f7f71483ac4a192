//! Lines for a reader that may be slow, stuck or full: the log on standard error, and the event log on its disk.
//!
//! A thread of its own writes them; whoever has something to say hands it over and goes on. What it is NOT: no line is
//! promised to arrive. **Invariant:** [`Lines::put`] never waits: a turn that waited for a log would fence nothing and
//! renew nothing (C18). What finds no room is counted, and the count is told when there is room again.

use crate::base::time::Duration;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};

/// Lines that wait for the writer; further ones are lost.
const WAITING: usize = 4096;
/// How often the end of a flush is looked for.
const LOOK_EVERY: Duration = Duration::from_millis(5);

/// How long the writer waits for a line before it looks whether it owes one.
const IDLE: Duration = Duration::from_secs(1);

/// Who writes them, on a thread of its own; it may take as long as it likes.
pub trait Sink<T>: Send + 'static {
    fn write(&mut self, line: T);
    /// So many lines found no room.
    fn lost(&mut self, missing: u64);
    /// About once a second.
    fn idle(&mut self) {}
    /// The last that is asked of it.
    fn end(&mut self) {}
}

/// Bytes as they are.
struct Bytes<F>(F);

impl<F: FnMut(&[u8]) + Send + 'static> Sink<Vec<u8>> for Bytes<F> {
    fn write(&mut self, line: Vec<u8>) {
        (self.0)(&line);
    }

    fn lost(&mut self, missing: u64) {
        (self.0)(lost_text(missing).as_bytes());
    }
}

/// What stands where lines are missing.
pub fn lost_text(missing: u64) -> String {
    format!("{missing} lines were lost here: they could not be written fast enough\n")
}

/// Where lines go. A copy leads to the same writer.
pub struct Lines<T = Vec<u8>> {
    /// `None`: it is the end.
    queue: SyncSender<Option<T>>,
    lost: Arc<AtomicU64>,
    taken: Arc<AtomicU64>,
    written: Arc<AtomicU64>,
    /// The thread that is not started yet.
    pending: Arc<Mutex<Option<Pending>>>,
}

type Pending = Box<dyn FnOnce() -> io::Result<()> + Send>;

impl<T> Clone for Lines<T> {
    fn clone(&self) -> Lines<T> {
        Lines {
            queue: self.queue.clone(),
            lost: Arc::clone(&self.lost),
            taken: Arc::clone(&self.taken),
            written: Arc::clone(&self.written),
            pending: Arc::clone(&self.pending),
        }
    }
}

impl Lines {
    /// Starts the writer's thread. `write` may take as long as it likes.
    ///
    /// # Errors
    /// The system gives no thread.
    pub fn start(name: &str, write: impl FnMut(&[u8]) + Send + 'static) -> io::Result<Lines> {
        let lines = Lines::prepare(name, Bytes(write));
        lines.begin()?;
        Ok(lines)
    }
}

impl<T> std::fmt::Debug for Lines<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Lines").field("taken", &self.taken).field("written", &self.written).finish_non_exhaustive()
    }
}

impl<T: Send + 'static> Lines<T> {
    /// A writer whose thread [`Lines::begin`] starts, or the first flush; until then lines wait. A thread keeps the
    /// credentials it was started with.
    pub fn prepare(name: &str, mut sink: impl Sink<T>) -> Lines<T> {
        let (queue, waiting) = sync_channel::<Option<T>>(WAITING);
        let (lost, written) = (Arc::<AtomicU64>::default(), Arc::<AtomicU64>::default());
        let (of_lost, of_written, name) = (Arc::clone(&lost), Arc::clone(&written), name.to_owned());
        let work = move || {
            let (lost, written) = (of_lost, of_written);
            loop {
                match waiting.recv_timeout(IDLE) {
                    Ok(Some(line)) => sink.write(line),
                    Ok(None) => sink.end(),
                    Err(RecvTimeoutError::Timeout) => {
                        sink.idle();
                        continue;
                    }
                    Err(RecvTimeoutError::Disconnected) => return,
                }
                written.fetch_add(1, Ordering::SeqCst);
                let missing = lost.swap(0, Ordering::SeqCst);
                if missing > 0 {
                    sink.lost(missing);
                }
                sink.idle();
            }
        };
        let start: Pending = Box::new(move || std::thread::Builder::new().name(name).spawn(work).map(drop));
        let pending = Arc::new(Mutex::new(Some(start)));
        Lines { queue, lost, taken: Arc::default(), written, pending }
    }

    /// Starts the writer's thread, where it does not run yet.
    ///
    /// # Errors
    /// The system gives no thread.
    pub fn begin(&self) -> io::Result<()> {
        let pending = self.pending.lock().unwrap_or_else(PoisonError::into_inner).take();
        pending.map_or(Ok(()), |start| start())
    }

    /// Hands a line over, or counts it as lost. Never waits.
    pub fn put(&self, line: T) {
        if !self.hand_over(Some(line)) {
            self.lost.fetch_add(1, Ordering::SeqCst);
        }
    }

    /// Whether there was room.
    fn hand_over(&self, line: Option<T>) -> bool {
        // Counted first: a flush that begins now waits for it.
        self.taken.fetch_add(1, Ordering::SeqCst);
        let taken = self.queue.try_send(line).is_ok();
        if !taken {
            self.taken.fetch_sub(1, Ordering::SeqCst);
        }
        taken
    }

    /// Waits until what was put is written, at most `limit`: for the end of the process.
    pub fn flush(&self, limit: Duration) {
        // Without a thread nothing is written, and this ends all the same.
        let _no_thread = self.begin();
        let mut asked = false;
        let rounds = limit.as_millis() / LOOK_EVERY.as_millis().max(1);
        for _ in 0..rounds {
            asked = asked || self.hand_over(None);
            if asked && self.written.load(Ordering::SeqCst) >= self.taken.load(Ordering::SeqCst) {
                return;
            }
            std::thread::sleep(LOOK_EVERY);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::channel;

    #[test]
    fn lines_wait_for_the_thread_and_the_end_does_not() {
        let (out, seen) = channel();
        let sink = Bytes(move |line: &[u8]| out.send(line.to_vec()).expect("the test listens"));
        let lines = Lines::prepare("test", sink);
        lines.put(b"early".to_vec());
        assert!(lines.pending.lock().expect("not poisoned").is_some() && seen.try_recv().is_err(), "no thread yet");
        // An error ends the process before it becomes who it will be: it is told all the same.
        lines.flush(Duration::from_secs(60));
        assert_eq!(seen.try_recv().as_deref(), Ok(&b"early"[..]));
        assert!(lines.pending.lock().expect("not poisoned").is_none(), "one thread");
    }

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
