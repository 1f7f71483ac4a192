//! The daemon's side of another node's `doctor`: it tells its clocks at once, and for all else runs this very program
//! (`doctor --for-peer`) in a process of its own.
//!
//! What this is NOT: the guard's business. Such a question never reaches the guard, is evidence of nothing, and changes
//! nothing. A look that hangs or crashes costs that process, not the daemon that holds the gate.
//!
//! **Invariants:** one look at a time; it is killed at its limit; its threads are its own.

use super::Report;
use super::sheet::Sheet;
use crate::base::ids::NodeName;
use crate::base::time::Duration;
use crate::engine::turn::{PeerAnswer, PeerQuestion};
use crate::io::{clock, outside, privileges};
use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::Value;
use std::ffi::OsString;
use std::path::Path;
use std::sync::Arc;
use tokio::sync::{Semaphore, oneshot};

/// A look at this node; the asker waits a little longer.
const LOOK_LIMIT: Duration = Duration::from_millis(7800);
/// An answer must fit into a frame of the peer channel, quoted.
const ANSWER_LIMIT: usize = 44 * 1024;

/// What another node's `doctor` asks. Its own word, so that an older daemon refuses it as no message of the protocol.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Question {
    pub doctor: What,
}

/// The two questions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum What {
    /// What time is it with you?
    Clock,
    /// Look at yourself.
    Examine,
}

/// The answer to it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Answer {
    pub doctor: Told,
}

/// The two answers.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Told {
    Clock {
        boot_ns: u64,
        wall_ms: i64,
    },
    /// An [`Examined`] as JSON.
    Examined(String),
    Failed(String),
}

/// What a node found on itself, and its sheet.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Examined {
    pub report: Report,
    #[serde(default)]
    pub sheet: Sheet,
}

/// All that comes over the peer channel: the guard's questions, and `doctor`'s.
#[derive(Debug)]
#[allow(clippy::large_enum_variant, reason = "the guard's question is the message of every poll")]
pub enum Asked {
    Guard(PeerQuestion),
    Doctor(What),
}

impl<'de> Deserialize<'de> for Asked {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Asked, D::Error> {
        let body = Value::deserialize(deserializer)?;
        if body.get("doctor").is_some() {
            return serde_json::from_value(body)
                .map(|question: Question| Asked::Doctor(question.doctor))
                .map_err(D::Error::custom);
        }
        serde_json::from_value(body).map(Asked::Guard).map_err(D::Error::custom)
    }
}

/// The answers to both.
#[derive(Debug, Serialize)]
#[serde(untagged)]
#[allow(clippy::large_enum_variant, reason = "the guard's answer is the message of every poll")]
pub enum Said {
    Guard(PeerAnswer),
    Doctor(Answer),
}

/// Answers `doctor`'s questions in the daemon.
#[derive(Debug, Clone)]
pub struct Examiner {
    words: Arc<Vec<OsString>>,
    place: Arc<Semaphore>,
}

impl Examiner {
    /// For the daemon of `node`, which runs with this configuration file.
    pub fn new(config_file: &Path, node: &NodeName) -> Examiner {
        // The child's working directory is another one.
        let file = std::path::absolute(config_file).unwrap_or_else(|_| config_file.to_owned());
        let words = ["--config".into(), file.into_os_string(), "--node".into(), node.as_str().into()];
        let words = words.into_iter().chain(["doctor", "--for-peer"].map(OsString::from)).collect();
        Examiner { words: Arc::new(words), place: Arc::new(Semaphore::new(1)) }
    }

    /// One answer; never longer than a look may take.
    pub async fn answer(&self, what: What) -> Answer {
        let doctor = match what {
            What::Clock => Told::Clock { boot_ns: clock::now().as_nanos(), wall_ms: clock::wall().as_millisecond() },
            What::Examine => self.look().await.map_or_else(Told::Failed, Told::Examined),
        };
        Answer { doctor }
    }

    async fn look(&self) -> Result<String, String> {
        let _place =
            self.place.try_acquire().map_err(|_| "another doctor looks at it already; try again".to_owned())?;
        let (done, result) = oneshot::channel();
        let words = Arc::clone(&self.words);
        // A thread of its own: what it does to its capabilities is its own, and nothing of it waits in the daemon's
        // runtime.
        let thread = std::thread::Builder::new().name("doctor".to_owned()).spawn(move || {
            let _fewer_checks = privileges::lend_to_own_children();
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            let said = match runtime {
                Ok(runtime) => runtime.block_on(outside::ourselves(&words, LOOK_LIMIT)),
                Err(error) => Err(format!("no runtime: {error}")),
            };
            let _asker_gone = done.send(said);
        });
        thread.map_err(|error| format!("no thread: {error}"))?;
        let text = result.await.map_err(|_| "its look was given up".to_owned())??;
        Ok(text.trim().to_owned())
    }
}

/// What `--for-peer` prints: as much as fits.
pub(super) fn answer(mut report: Report, sheet: Sheet) -> String {
    report.findings.sort_by_key(|finding| finding.level);
    let mut examined = Examined { report, sheet };
    let mut left_out = 0;
    loop {
        let text = serde_json::to_string(&examined).unwrap_or_default();
        // Quotes are escaped once more on their way.
        let quoted = text.len() + text.bytes().filter(|byte| matches!(byte, b'"' | b'\\')).count();
        if quoted <= ANSWER_LIMIT {
            return text + "\n";
        }
        if !examined.report.checked.is_empty() {
            examined.report.checked = Vec::new();
            continue;
        }
        let found = examined.report.findings.len();
        if found == 0 {
            examined.sheet.config.clear();
            continue;
        }
        let kept = found - found.div_ceil(8);
        examined.report.findings.truncate(kept);
        left_out += found - kept;
        let why = "there were more than fit into an answer; run doctor there".to_owned();
        examined.report.unchecked.retain(|(what, _)| !what.ends_with("further findings"));
        examined.report.unchecked.push((format!("{left_out} further findings"), why));
    }
}

#[cfg(test)]
mod tests {
    use super::super::Level;
    use super::*;

    #[test]
    fn questions_of_the_guard_and_of_doctor_are_told_apart() {
        let asked = |text: &str| serde_json::from_str::<Asked>(text);
        assert!(matches!(asked(r#"{"doctor":"clock"}"#), Ok(Asked::Doctor(What::Clock))));
        assert!(matches!(
            asked(r#"{"StopPrimary":{"attempt":7}}"#),
            Ok(Asked::Guard(PeerQuestion::StopPrimary { attempt: 7 }))
        ));
        assert!(asked(r#"{"doctor":"dance"}"#).is_err());
        assert!(asked(r#"{"Dance":{}}"#).is_err());
        // What an older daemon makes of it.
        let old = serde_json::to_value(Question { doctor: What::Examine }).expect("text");
        assert!(serde_json::from_value::<PeerQuestion>(old).is_err());
        let pulse = serde_json::to_value(Said::Guard(PeerAnswer::Acknowledged)).expect("text");
        assert_eq!(pulse, serde_json::to_value(PeerAnswer::Acknowledged).expect("text"));
    }

    #[test]
    fn an_answer_fits_into_a_frame_however_much_was_found() {
        let mut report = Report::default();
        report.find(Level::Critical, "pg.down", "the worst", "start it");
        for n in 0..2000 {
            report.find(Level::Advice, "door.trust", format!("line {n} \"quoted\" \\ and so on"), "x".repeat(100));
            report.checked(format!("thing {n}"));
        }
        let text = answer(report, Sheet::default());
        let whole =
            crate::wire::peer::to_body(&Answer { doctor: Told::Examined(text.trim().to_owned()) }).expect("text");
        crate::wire::peer::encode(&crate::wire::peer::Reply::Answer { id: u64::MAX, body: whole }).expect("it fits");
        let read: Examined = serde_json::from_str(&text).expect("read");
        assert_eq!(read.report.findings[0].text, "the worst");
        assert!(read.report.unchecked[0].0.ends_with("further findings"), "{:?}", read.report.unchecked);
    }
}
