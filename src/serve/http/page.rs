//! The page for people: one HTML document, drawn from one snapshot, without script and without a second request.
//! It reloads itself; its style sheet stands in the page, and the policy allows exactly that sheet by its hash.

use crate::engine::status::{EventRow, NodeRow, Snapshot, human_ms};
use askama::Template;
use std::sync::LazyLock;

/// Also the text between `<style>` and `</style>`: the hash must be of these very bytes.
const STYLE: &str = include_str!("../../../templates/status.css");

static POLICY: LazyLock<String> = LazyLock::new(|| {
    let digest = ring::digest::digest(&ring::digest::SHA256, STYLE.as_bytes());
    let hash = data_encoding::BASE64.encode(digest.as_ref());
    format!(
        "default-src 'none'; style-src 'sha256-{hash}'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
});

/// Events on the page, newest first; the rest is in `portcullis events`.
const EVENTS: usize = 30;

pub(super) fn content_security_policy() -> &'static str {
    POLICY.as_str()
}

#[derive(Template)]
#[template(path = "status.html")]
struct Page<'a> {
    style: &'static str,
    snapshot: &'a Snapshot,
    headline: String,
    /// Class of the headline: `good`, `bad` or `calm`.
    mood: &'static str,
    lease: String,
    rows: Vec<Row<'a>>,
    events: Vec<&'a EventRow>,
}

struct Row<'a> {
    row: &'a NodeRow,
    weight: String,
    delay: String,
    replication: String,
}

/// The ages of a template: `0.3 s ago`, or a word when there was never anything.
fn ago(age_ms: &Option<u64>) -> String {
    age_ms.map_or_else(|| "never".to_owned(), |age| format!("{} ago", human_ms(age)))
}

pub(super) fn render(snapshot: &Snapshot) -> askama::Result<String> {
    let rows = snapshot.nodes.iter().map(|row| Row {
        row,
        weight: format!("{:.2}", row.weight),
        delay: row.replication_delay_bytes.map_or_else(String::new, |bytes| format!("{bytes} B")),
        replication: [row.replication_state.as_deref(), row.sync_state.as_deref()]
            .into_iter()
            .flatten()
            .collect::<Vec<_>>()
            .join(", "),
    });
    let mood = if snapshot.gate.open && snapshot.turn_running {
        "good"
    } else if snapshot.active_node().is_some_and(|name| *name != snapshot.node) {
        "calm"
    } else {
        "bad"
    };
    Page {
        style: STYLE,
        headline: snapshot.headline(),
        mood,
        lease: match snapshot.gate.lease_remaining_ms {
            0 => "none".to_owned(),
            left => format!("{} left", human_ms(left)),
        },
        rows: rows.collect(),
        events: snapshot.events.iter().rev().take(EVENTS).collect(),
        snapshot,
    }
    .render()
}
