//! The daemon's word to `may-start-primary`: this start is mine. Where a unit starts PostgreSQL (or a `start` command
//! that asks like one), the daemon's own start passes the very question that keeps a former primary down; without a
//! witness to ask, or with a silent one, it would be refused for ever.
//!
//! What it is NOT: no right that lasts. The file stands only while the daemon waits for the start it ordered; one that
//! a killed daemon left is worth nothing after [`GOOD_FOR`], nor after a boot.

use crate::base::time::Instant;
use crate::io::clock;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Under `state_dir`.
const FILE: &str = "start-ordered";
/// From the order to the unit's question. With a shorter lease, a killed daemon's order may outlive its proof.
const GOOD_FOR: Duration = Duration::from_secs(2);

/// Taken back when dropped.
pub(super) struct Errand(Option<PathBuf>);

/// A start is under way from here on. Where that cannot be written, the unit asks the witness as ever.
pub(super) fn begin(state_dir: &Path) -> Errand {
    let file = state_dir.join(FILE);
    let written = clock::boot_id().and_then(|boot| std::fs::write(&file, told(&boot, clock::now())));
    match written {
        Ok(()) => Errand(Some(file)),
        Err(error) => {
            tracing::warn!(file = %file.display(), %error, "the order to start PostgreSQL cannot be written down");
            Errand(None)
        }
    }
}

impl Drop for Errand {
    fn drop(&mut self) {
        if let Some(file) = &self.0 {
            let _already_gone = std::fs::remove_file(file);
        }
    }
}

/// Did the daemon order a start just now?
pub fn start_was_ordered(state_dir: &Path) -> bool {
    let text = std::fs::read_to_string(state_dir.join(FILE));
    text.is_ok_and(|text| clock::boot_id().is_ok_and(|boot| counts(&text, &boot, clock::now())))
}

fn told(boot: &str, at: Instant) -> String {
    format!("{boot} {}\n", at.as_nanos())
}

fn counts(text: &str, boot: &str, now: Instant) -> bool {
    let mut words = text.split_whitespace();
    let same = words.next() == Some(boot);
    let at = words.next().and_then(|word| word.parse().ok()).map(Instant::from_nanos);
    same && at.is_some_and(|at| at <= now && now.since(at) <= GOOD_FOR)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_order_counts_for_a_moment_in_its_own_boot() {
        let at = Instant::from_nanos(5_000_000_000);
        let text = told("boot-1", at);
        assert!(counts(&text, "boot-1", at));
        assert!(counts(&text, "boot-1", at + GOOD_FOR));
        assert!(!counts(&text, "boot-1", at + GOOD_FOR + Duration::from_nanos(1)), "too old");
        assert!(!counts(&text, "boot-1", at - Duration::from_nanos(1)), "from the future");
        assert!(!counts(&text, "boot-2", at), "another boot");
        assert!(!counts("", "boot-1", at) && !counts("boot-1", "boot-1", at) && !counts("boot-1 x", "boot-1", at));
    }

    #[test]
    fn an_order_stands_until_the_start_is_done() {
        let dir = tempfile::tempdir().expect("a directory");
        assert!(!start_was_ordered(dir.path()));
        let errand = begin(dir.path());
        assert!(start_was_ordered(dir.path()));
        drop(errand);
        assert!(!start_was_ordered(dir.path()));
    }
}
