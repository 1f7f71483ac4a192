//! A local PostgreSQL that is there and does not answer: it hangs, or somebody froze it.
//!
//! What it is NOT: a reason to cut. Silence proves nothing; but such a primary hands nothing over, so that a promote
//! goes by its daemon's consent (R2), and such a standby is not promoted.

use super::Guard;
use crate::base::time::{Duration, Instant};
use crate::engine::turn::{Effect, Now};

/// After the first look that ran out of time (2 s): a slow disk makes one look late, not all of them for so long.
const HANGS_AFTER: Duration = Duration::from_secs(3);
/// For so long one that gave no session in time is taken to give none, although the daemon's old session is answered.
const NO_SESSION_FOR: Duration = Duration::from_secs(30);

/// When PostgreSQL last answered, and since when it does not.
#[derive(Debug, Clone, Hash, Default)]
pub(super) struct Silence {
    /// The first look without an answer, after which none was answered.
    since: Option<(Instant, String)>,
    no_session: Option<(Instant, String)>,
    /// When the last look that was answered began.
    pub(super) answered: Instant,
    said: bool,
}

impl Guard {
    /// A look ran out of time.
    pub(super) fn on_pg_silent(&mut self, now: Now, why: String) {
        self.pg.silence.since.get_or_insert_with(|| (now.boot, now.rfc3339()));
        self.pg.error = Some(why);
    }

    /// A look that began at `asked` was answered.
    pub(super) fn pg_answered(&mut self, asked: Instant) {
        let silence = &mut self.pg.silence;
        (silence.since, silence.said, silence.answered) = (None, false, asked);
    }

    /// It is gone, was stopped or is new: that is not silence.
    pub(super) fn forget_silence(&mut self) {
        self.pg.silence = Silence { answered: self.pg.silence.answered, ..Silence::default() };
    }

    /// It gave no session in time.
    pub(super) fn on_no_session(&mut self, now: Now) {
        let since = self.pg.silence.since.as_ref().map_or_else(|| now.rfc3339(), |(_, wall)| wall.clone());
        self.pg.silence.no_session = Some((now.boot, since));
    }

    /// The last look got no answer in time.
    pub(super) fn is_silent(&self) -> bool {
        self.pg.up && self.pg.silence.since.is_some()
    }

    /// Since when PostgreSQL here has not answered, RFC 3339, where that is long enough to act on.
    pub(super) fn hangs_since(&self, now: Now) -> Option<&str> {
        let Silence { since, no_session, .. } = &self.pg.silence;
        let long = since.as_ref().filter(|(at, _)| now.boot >= *at + HANGS_AFTER);
        let lately = no_session.as_ref().filter(|(at, _)| now.boot < *at + NO_SESSION_FOR);
        long.or(lately).filter(|_| self.pg.up).map(|(_, wall)| wall.as_str())
    }

    /// No look was answered for so long, since the first that ran out of time.
    pub(super) fn silent_for(&self, now: Now) -> Duration {
        let since = self.pg.silence.since.as_ref().filter(|_| self.pg.up);
        since.map_or(Duration::ZERO, |(at, _)| now.boot.since(*at))
    }

    /// Somebody is told once.
    pub(super) fn advance_silence(&mut self, now: Now, fx: &mut Vec<Effect>) {
        if self.pg.silence.said {
            return;
        }
        let Some(since) = self.hangs_since(now).map(str::to_owned) else { return };
        self.pg.silence.said = true;
        let then = match self.gate.open {
            true => format!("clients get no answers; `portcullis promote` on {} takes over", self.setup.peer),
            false => "thaw or restart it".to_owned(),
        };
        self.note(now, fx, "postgres_silent", format!("PostgreSQL here does not answer since {since}: {then}"));
    }
}
