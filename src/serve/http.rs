//! The status pages: one read-only router over the snapshot that the daemon publishes, served on `status.listen` and
//! on the control socket, where the commands of [`control`] join it.
//!
//! It is NOT a way to change anything: outside the control socket every method but GET (and HEAD) is refused, and
//! nothing here touches the gate. It does NOT know the clock: whether the gate passes now and whether the daemon's
//! turn runs are asked through two closures, so that these pages stay right when the daemon hangs.
//!
//! **Invariants:** `/active` never says 200 when the gate would not pass a byte at that moment, however old the
//! snapshot is. No page needs anything beyond this server, and no script or style but the page's own.

pub mod control;
pub mod history;
pub mod listen;
pub mod live;
pub mod log;
mod metrics;
mod page;
mod plot;

pub use control::{Command, ControlReply, ControlRequest, Credentials, SUDO_USER, control_router};
pub use history::{History, Sample};
pub use listen::{ControlSocket, bind_control, serve_control, serve_listener, serve_tcp};
pub use live::Live;

use super::command::Figures;
use super::tally::Latencies;
use crate::engine::outlook::{self, Outlook};
use crate::engine::status::{Role, Snapshot, pgpool};
use axum::Router;
use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, Request, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::middleware::{Next, from_fn};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use std::sync::Arc;
use tokio::sync::watch;

/// A question to the daemon that is answered at once, from memory.
pub type Ask = Arc<dyn Fn() -> bool + Send + Sync>;

/// The pools' figures, asked the same way.
pub type Pools = Arc<dyn Fn() -> Vec<Figures> + Send + Sync>;

const OVERTAKEN: &str = "the lease ran out and the daemon's turn has not said why; look at its log";

/// What the outlook is then.
const HANGS: &str = "what a failover would lose is not known: the daemon's turn does not run";

/// What the pages show and whom they ask.
#[derive(Clone)]
pub struct Views {
    /// What the daemon published last (at least every 200 ms).
    pub snapshot: watch::Receiver<Arc<Snapshot>>,
    /// Did the daemon's turn run lately?
    pub beat: Ask,
    /// Would the gate pass a byte now?
    pub gate_passes: Ask,
    /// Figures of the pools now.
    pub pools: Pools,
    /// How long requests and transactions took.
    pub latencies: Arc<dyn Fn() -> Latencies + Send + Sync>,
    /// When the daemon started, in seconds since 1970.
    pub started: f64,
    /// The event log.
    pub events: log::EventLog,
    /// The page as it was drawn last, and the last hour.
    pub live: Live,
}

impl Views {
    /// The snapshot as it must be told now: what the gate no longer grants is not shown as open.
    pub fn now(&self) -> Arc<Snapshot> {
        let published = self.snapshot.borrow().clone();
        let running = (self.beat)();
        let overtaken = published.gate.open && !(self.gate_passes)();
        if running && !overtaken {
            return published;
        }
        let mut told = if overtaken { published.overtaken(OVERTAKEN) } else { (*published).clone() };
        told.turn_running = running;
        if !running {
            told.outlook = Outlook::unknown(HANGS);
        }
        told.next = outlook::next(&told);
        Arc::new(told)
    }
}

/// The read-only pages of the contract, and nothing else.
pub fn router(views: Views) -> Router {
    harden(pages().with_state(views))
}

fn pages() -> Router<Views> {
    Router::new()
        .route("/", get(live::home))
        .route("/live", get(live::live))
        .route("/history.json", get(live::history))
        .route("/icon.svg", get(live::icon))
        .route("/status.json", get(status_json))
        .route("/events.json", get(log::events))
        .route("/pool_nodes", get(pool_nodes))
        .route("/metrics", get(metrics_text))
        .route("/active", get(active))
        .route("/primary", get(active))
        .route("/read-write", get(active))
        .route("/replica", get(replica))
        .route("/read-only", get(replica))
        .route("/health", get(health))
        .fallback(|| async { (StatusCode::NOT_FOUND, "no such page; / lists what there is\n") })
        .method_not_allowed_fallback(|| async { (StatusCode::METHOD_NOT_ALLOWED, "read-only: GET or HEAD\n") })
}

/// Headers that hold for every answer: nothing is cached, framed, sniffed or fetched from elsewhere.
fn harden(router: Router) -> Router {
    router.layer(from_fn(|request: Request, next: Next| async move {
        let mut response = next.run(request).await;
        let headers = response.headers_mut();
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
        headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
        headers.insert(header::REFERRER_POLICY, HeaderValue::from_static("no-referrer"));
        headers.insert(header::X_FRAME_OPTIONS, HeaderValue::from_static("DENY"));
        headers.insert("cross-origin-opener-policy", HeaderValue::from_static("same-origin"));
        headers.insert("cross-origin-resource-policy", HeaderValue::from_static("same-origin"));
        headers
            .entry(header::CONTENT_SECURITY_POLICY)
            .or_insert(HeaderValue::from_static("default-src 'none'; frame-ancestors 'none'"));
        response
    }))
}

async fn status_json(State(views): State<Views>) -> Response {
    axum::Json(&*views.now()).into_response()
}

#[derive(serde::Deserialize)]
struct PoolNodes {
    format: Option<String>,
}

/// Without a format, the numbers that old monitoring matches on; with one, pgpool-II's columns of that version.
async fn pool_nodes(State(views): State<Views>, wanted: Result<Query<PoolNodes>, QueryRejection>) -> Response {
    let Ok(Query(wanted)) = wanted else {
        return (StatusCode::BAD_REQUEST, "write /pool_nodes?format=4.3, or leave format out\n").into_response();
    };
    match wanted.format.as_deref() {
        None => views.now().pool_nodes_lines().into_response(),
        Some(format) if pgpool::FORMATS.contains(&format) => views.now().pool_nodes_lines_of_4_3().into_response(),
        Some(_) => {
            let text = format!("format is a version of pgpool-II: one of {}\n", pgpool::FORMATS.join(", "));
            (StatusCode::BAD_REQUEST, text).into_response()
        }
    }
}

async fn metrics_text(State(views): State<Views>, headers: HeaderMap) -> Response {
    let accept = headers.get(header::ACCEPT).and_then(|value| value.to_str().ok()).unwrap_or("");
    let counted = metrics::Counted { pools: (views.pools)(), latencies: (views.latencies)(), started: views.started };
    match metrics::render(&views.now(), counted, accept.contains("application/openmetrics-text")) {
        Ok((kind, text)) => ([(header::CONTENT_TYPE, kind)], text).into_response(),
        Err(_) => (StatusCode::INTERNAL_SERVER_ERROR, "the metrics cannot be encoded\n").into_response(),
    }
}

/// 200 or 503 with one line that says why, for load balancers and people alike.
fn verdict(good: bool, text: String) -> Response {
    let code = if good { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (code, text + "\n").into_response()
}

async fn active(State(views): State<Views>) -> Response {
    // `now` has asked the gate itself, so that a snapshot which outlived its lease is lapsed here.
    let snapshot = views.now();
    let text = if snapshot.gate.open {
        format!("open: {} is active, epoch {}", snapshot.node, snapshot.epoch)
    } else {
        let reason = snapshot.gate.reason.as_deref().unwrap_or("this node is not active");
        format!("{}: {reason}", snapshot.gate.state.as_str())
    };
    verdict(snapshot.gate.open, text)
}

async fn replica(State(views): State<Views>) -> Response {
    let snapshot = views.now();
    let attached = snapshot.own_row().is_none_or(|row| row.attached);
    let why_not = if !snapshot.turn_running {
        Some("the daemon's turn does not run, so nobody knows whether this standby streams")
    } else if snapshot.role != Role::Passive || snapshot.postgres.role.as_deref() != Some("standby") {
        Some("this node is not a standby")
    } else if !snapshot.postgres.streaming {
        Some("this standby does not stream from the active node")
    } else if !attached {
        Some("this standby is detached")
    } else {
        None
    };
    match why_not {
        None => verdict(true, format!("streaming: {} is a standby in service", snapshot.node)),
        Some(why) => verdict(false, why.to_owned()),
    }
}

async fn health(State(views): State<Views>) -> Response {
    if (views.beat)() {
        verdict(true, "the daemon's turn is running".to_owned())
    } else {
        verdict(false, "the daemon's turn does not run; look at its log".to_owned())
    }
}
