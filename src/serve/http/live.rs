//! The page's rendering, made once for everybody who looks, and its stream of server-sent events.
//!
//! ```text
//!  data: {"title": "alp: active", "sections": {"proof": "<h2>...", ...}}      what changed; at least every second
//! ```
//!
//! **Invariants:** the turn is never waited for nor held up: this reads what it has published. At most one rendering
//! runs at a time, on a thread for such work. There are at most [`MAX_STREAMS`] streams; a slow reader holds nothing
//! but its own, which ends after [`STREAM_LIFE`], and what it did not read is not kept for it.

use super::Views;
use super::history::History;
use super::page::{self, Sections};
use crate::engine::status::{Snapshot, VerdictWord, WitnessStatus};
use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{Html, IntoResponse, Response};
use futures_util::stream;
use serde::Serialize;
use std::collections::BTreeMap;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{Mutex, OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep_until};

/// Streams at once; further ones get 503 and try again. Fewer than connections, so that the other pages stay reachable.
pub const MAX_STREAMS: usize = 16;
/// A stream ends after this, and the browser opens the next. Below what a connection may live.
pub const STREAM_LIFE: Duration = Duration::from_secs(50);
/// Ages are told anew this often.
const TELL_EVERY: Duration = Duration::from_secs(1);
/// A rendering may be this old while nothing of weight has changed.
const GOOD_FOR: Duration = Duration::from_millis(500);

/// What is drawn once for everybody.
#[derive(Debug)]
pub(super) struct Drawn {
    pub(super) title: String,
    pub(super) sections: Sections,
}

struct Cached {
    at: Instant,
    snapshot: Arc<Snapshot>,
    drawn: Arc<Drawn>,
}

/// Shared by all who look. A copy is the same.
#[derive(Clone)]
pub struct Live {
    history: History,
    cache: Arc<Mutex<Option<Cached>>>,
    streams: Arc<Semaphore>,
}

impl Live {
    pub fn new(history: History) -> Live {
        Live { history, cache: Arc::default(), streams: Arc::new(Semaphore::new(MAX_STREAMS)) }
    }

    pub(super) fn history(&self) -> &History {
        &self.history
    }
}

/// Nothing of weight differs: ages and numbers may.
fn same_essence(one: &Snapshot, other: &Snapshot) -> bool {
    let essence = |s: &Snapshot| {
        let step = s.procedure.as_ref().map(|p| (p.id, p.step.clone()));
        let last = s.events.last().map(|event| (event.at.clone(), event.text.clone()));
        let rest = (s.turn_running, s.maintenance, s.outlook.safe, s.replication.in_sync, s.postgres.up);
        let conflict = s.vips.iter().any(|vip| vip.conflict.is_some());
        (s.role, s.gate.state, s.gate.open, s.epoch, step, last, rest, conflict, s.gate.reason.clone())
    };
    // What moves while nobody does anything (the bytes of a lag, the count of what would be lost) is a number too.
    let standing = |s: &Snapshot| {
        let rows: Vec<_> = s.nodes.iter().map(|r| (r.status.clone(), r.role.clone(), r.attached)).collect();
        let streams: Vec<_> = s.nodes.iter().map(|r| (r.replication_state.clone(), r.sync_state.clone())).collect();
        let peer = s.peer.as_ref().map(|p| (p.reachable, p.role, p.epoch));
        let says = |w: &WitnessStatus| -> Vec<VerdictWord> { w.servers.iter().map(|server| server.verdict).collect() };
        let witness = s.witness.as_ref().map(|w| (w.points_at.clone(), says(w)));
        let vips: Vec<_> = s.vips.iter().map(|vip| (vip.bound, vip.conflict.clone())).collect();
        let since = (s.replication.alone_since.clone(), s.replication.waiting_since.clone());
        let paused = s.paused_databases.clone();
        (rows, streams, peer, witness, vips, since, paused, s.next.clone(), s.postgres.clone(), s.advice.clone())
    };
    one.node == other.node && essence(one) == essence(other) && standing(one) == standing(other)
}

/// The page's sections as of now, drawn anew only where that is needed.
pub(super) async fn drawn(views: &Views) -> Result<Arc<Drawn>, String> {
    // Whoever comes while one draws waits for that, and mostly takes it.
    let mut cache = views.live.cache.lock().await;
    let now = views.now();
    if let Some(cached) = &*cache {
        let fresh = cached.at.elapsed() < GOOD_FOR && same_essence(&cached.snapshot, &now);
        if fresh || Arc::ptr_eq(&cached.snapshot, &now) {
            return Ok(Arc::clone(&cached.drawn));
        }
    }
    let (snapshot, history) = (Arc::clone(&now), views.live.history.clone());
    let drawing = tokio::task::spawn_blocking(move || {
        let sections = page::sections(&snapshot, &history.samples())?;
        Ok::<Drawn, askama::Error>(Drawn { title: page::title(&snapshot), sections })
    });
    let drawn = match drawing.await {
        Ok(Ok(drawn)) => Arc::new(drawn),
        Ok(Err(error)) => return Err(error.to_string()),
        Err(error) => return Err(error.to_string()),
    };
    *cache = Some(Cached { at: Instant::now(), snapshot: now, drawn: Arc::clone(&drawn) });
    Ok(drawn)
}

/// `GET /`
pub(super) async fn home(State(views): State<Views>) -> Response {
    let html = match drawn(&views).await {
        Ok(drawn) => page::document(&drawn.title, &drawn.sections).map_err(|error| error.to_string()),
        Err(error) => Err(error),
    };
    match html {
        Ok(html) => ([(header::CONTENT_SECURITY_POLICY, page::content_security_policy())], Html(html)).into_response(),
        Err(error) => {
            (StatusCode::INTERNAL_SERVER_ERROR, format!("the page cannot be drawn: {error}\n")).into_response()
        }
    }
}

#[derive(Serialize)]
struct News<'a> {
    title: &'a str,
    sections: BTreeMap<&'static str, &'a str>,
}

struct Stream {
    views: Views,
    last: Option<Arc<Drawn>>,
    seen: Arc<Snapshot>,
    ticks: tokio::time::Interval,
    end: Instant,
    _slot: OwnedSemaphorePermit,
}

impl Stream {
    /// Waits until there is something to be told, and gives it as one event.
    async fn next(mut self) -> Option<(Result<Bytes, Infallible>, Stream)> {
        self.wait().await?;
        self.seen = self.views.snapshot.borrow_and_update().clone();
        let drawn = drawn(&self.views).await.ok()?;
        let before = self.last.as_ref();
        let changed = drawn.sections.iter().filter(|(id, html)| {
            let old = before.and_then(|before| before.sections.iter().find(|(old, _)| old == id));
            old.is_none_or(|(_, old)| old != html)
        });
        let news = News { title: &drawn.title, sections: changed.map(|(id, html)| (*id, html.as_str())).collect() };
        let text = serde_json::to_string(&news).ok()?;
        // The browser tries again a second after an end.
        let event = Bytes::from(format!("retry: 1000\ndata: {text}\n\n"));
        self.last = Some(drawn);
        Some((Ok(event), self))
    }

    /// `None`: this stream is over.
    async fn wait(&mut self) -> Option<()> {
        loop {
            tokio::select! {
                () = sleep_until(self.end) => return None,
                _ = self.ticks.tick() => return Some(()),
                changed = self.views.snapshot.changed() => {
                    changed.ok()?;
                    let now = self.views.snapshot.borrow_and_update().clone();
                    if !same_essence(&self.seen, &now) {
                        return Some(());
                    }
                }
            }
        }
    }
}

/// `GET /live`
pub(super) async fn live(State(views): State<Views>) -> Response {
    let Ok(slot) = Arc::clone(&views.live.streams).try_acquire_owned() else {
        let wait = [(header::RETRY_AFTER, "5")];
        return (StatusCode::SERVICE_UNAVAILABLE, wait, "too many look on; try again\n").into_response();
    };
    let mut ticks = interval(TELL_EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let seen = views.snapshot.borrow().clone();
    let stream = Stream { views, last: None, seen, ticks, end: Instant::now() + STREAM_LIFE, _slot: slot };
    let kind = [(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream"))];
    (kind, Body::from_stream(stream::unfold(stream, Stream::next))).into_response()
}

/// `GET /history.json`
pub(super) async fn history(State(views): State<Views>) -> Response {
    let kind = [(header::CONTENT_TYPE, HeaderValue::from_static("application/json"))];
    (kind, views.live.history().json()).into_response()
}

/// `GET /icon.svg`
pub(super) async fn icon() -> Response {
    ([(header::CONTENT_TYPE, HeaderValue::from_static("image/svg+xml"))], page::ICON).into_response()
}
