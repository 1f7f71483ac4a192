//! `/events.json?since=TIME`: the event log as far back as it is kept, which is further than a snapshot's last events.
//!
//! What it is NOT: the log's owner. It reads the files that the driver's writer appends to; a line that is half written
//! is left out. **Invariant:** the turn is never held up: one reading at a time, on a thread for such work, and never
//! more than [`MAX_ROWS`] of the newest.

use super::Views;
use crate::engine::status::EventRow;
use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use std::collections::VecDeque;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tokio::sync::Mutex;

/// Newest rows that are told at most.
pub const MAX_ROWS: usize = 10_000;
/// A longer line is not the writer's: what follows it is left out.
const MAX_LINE: usize = 64 * 1024;

/// Where the event log is: `events.log`, and `events.log.1` before it. A copy is the same.
#[derive(Debug, Clone)]
pub struct EventLog {
    path: PathBuf,
    turn: Arc<Mutex<()>>,
}

impl EventLog {
    pub fn new(path: PathBuf) -> EventLog {
        EventLog { path, turn: Arc::default() }
    }

    /// The rows since then, oldest first.
    fn read(&self, since: Option<jiff::Timestamp>) -> Vec<EventRow> {
        let mut rows = VecDeque::new();
        for path in [&self.path.with_extension("log.1"), &self.path] {
            append(path, since, &mut rows);
        }
        rows.into()
    }
}

fn append(path: &Path, since: Option<jiff::Timestamp>, rows: &mut VecDeque<EventRow>) {
    let Ok(file) = std::fs::File::open(path) else { return };
    let lines = BufReader::new(file).lines().map_while(Result::ok).take_while(|line| line.len() <= MAX_LINE);
    for line in lines {
        let Ok(row) = serde_json::from_str::<EventRow>(&line) else { continue };
        // One without a readable time is shown rather than hidden.
        if let (Some(since), Ok(at)) = (since, row.at.parse::<jiff::Timestamp>())
            && at < since
        {
            continue;
        }
        if rows.len() == MAX_ROWS {
            rows.pop_front();
        }
        rows.push_back(row);
    }
}

#[derive(serde::Deserialize)]
pub(super) struct Wanted {
    since: Option<jiff::Timestamp>,
}

/// `GET /events.json`
pub(super) async fn events(State(views): State<Views>, wanted: Result<Query<Wanted>, QueryRejection>) -> Response {
    let Ok(Query(Wanted { since })) = wanted else {
        let text = "write /events.json?since=2026-11-20T15:11:00Z, or leave since out\n";
        return (StatusCode::BAD_REQUEST, text).into_response();
    };
    let log = views.events.clone();
    let _turn = log.turn.clone().lock_owned().await;
    match tokio::task::spawn_blocking(move || log.read(since)).await {
        Ok(rows) => axum::Json(rows).into_response(),
        Err(_) => (StatusCode::INTERNAL_SERVER_ERROR, "the event log cannot be read\n").into_response(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_log_before_this_one_is_read_too_and_torn_lines_are_not() {
        let dir = tempfile::tempdir().expect("a directory");
        let row = |at: &str| format!("{{\"at\":\"2026-11-20T{at}Z\",\"kind\":\"x\",\"text\":\"{at}\"}}\n");
        let log = EventLog::new(dir.path().join("events.log"));
        assert!(log.read(None).is_empty(), "no log yet");
        std::fs::write(dir.path().join("events.log.1"), row("01:00:00") + &row("02:00:00")).expect("written");
        std::fs::write(dir.path().join("events.log"), row("03:00:00") + "torn\n" + &row("04:00:00") + "{\"at")
            .expect("written");
        let texts = |since: Option<&str>| -> Vec<String> {
            let since = since.map(|text| text.parse().expect("a time"));
            log.read(since).into_iter().map(|row| row.text).collect()
        };
        assert_eq!(texts(None), ["01:00:00", "02:00:00", "03:00:00", "04:00:00"]);
        assert_eq!(texts(Some("2026-11-20T02:00:00Z")), ["02:00:00", "03:00:00", "04:00:00"]);
        std::fs::write(dir.path().join("events.log"), row("05:00:00").repeat(MAX_ROWS)).expect("written");
        assert_eq!(texts(None).len(), MAX_ROWS, "the newest, and no more");
    }
}
