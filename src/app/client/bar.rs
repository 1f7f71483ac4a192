//! The progress bar of a long command: on a terminal one line that moves; elsewhere plain lines, not too many.

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::Value;
use std::io::IsTerminal;

/// Between two lines with figures in a pipe or a file.
const PLAIN_EVERY_MS: u64 = 5000;
/// The bar has so many steps, of which the last is never shown before the end.
const STEPS: u64 = 1000;

/// At most one bar stands at a time.
pub(super) struct Bar {
    terminal: bool,
    bar: Option<ProgressBar>,
    plain_at: Option<u64>,
}

impl Bar {
    pub(super) fn new() -> Bar {
        let terminal = std::io::stdout().is_terminal() && std::io::stderr().is_terminal();
        Bar { terminal, bar: None, plain_at: None }
    }

    /// Takes a line with figures; `true`: nothing is to be printed for it.
    pub(super) fn takes(&mut self, text: &str, at_ms: u64, data: Option<&Value>) -> bool {
        let figure = |key: &str| data.and_then(|data| data.get(key)).and_then(Value::as_u64);
        let (Some(done), Some(total)) = (figure("done_bytes"), figure("total_bytes")) else {
            self.clear();
            return false;
        };
        let phase = data.is_some_and(|data| data.get("phase").is_some());
        let uncounted = data.is_some_and(|data| data.get("uncounted").is_some());
        if figure("diverged_transactions").is_some() || uncounted {
            self.clear();
            return false;
        }
        if !self.terminal {
            let due = phase || self.plain_at.is_none_or(|told| at_ms >= told + PLAIN_EVERY_MS);
            if due {
                self.plain_at = Some(at_ms);
            }
            return !due;
        }
        let bar = self.bar.get_or_insert_with(|| {
            let bar = ProgressBar::with_draw_target(Some(STEPS), ProgressDrawTarget::stderr());
            if let Ok(style) = ProgressStyle::with_template("[{bar:30}] {msg}") {
                bar.set_style(style.progress_chars("=> "));
            }
            bar
        });
        bar.set_position(position(done, total));
        bar.set_message(text.to_owned());
        true
    }

    /// Before anything else is printed.
    pub(super) fn clear(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }
}

fn position(done: u64, total: u64) -> u64 {
    let part = u128::from(done) * u128::from(STEPS) / u128::from(total.max(1));
    u64::try_from(part).unwrap_or(STEPS).min(STEPS - 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pipe_gets_few_lines_and_every_word() {
        let mut bar = Bar { terminal: false, bar: None, plain_at: None };
        let bytes = serde_json::json!({"done_bytes": 1, "total_bytes": 2});
        let phase = serde_json::json!({"done_bytes": 1, "total_bytes": 2, "phase": "syncing"});
        assert!(!bar.takes("x", 0, Some(&bytes)), "the first is printed");
        assert!(bar.takes("x", 4999, Some(&bytes)));
        assert!(!bar.takes("x", 4999, Some(&phase)), "a phase always is");
        assert!(bar.takes("x", 9998, Some(&bytes)) && !bar.takes("x", 9999, Some(&bytes)));
        assert!(!bar.takes("words", 9999, None));
        assert!(!bar.takes("words", 9999, Some(&serde_json::json!({"may_lose": true}))));
    }

    #[test]
    fn the_bar_is_never_full() {
        assert_eq!((position(0, 0), position(5, 10), position(10, 10), position(20, 10)), (0, 500, 999, 999));
    }
}
