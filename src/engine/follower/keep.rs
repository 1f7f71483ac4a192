//! PostgreSQL kept following: whom it streams from, what is done when it does not, and what is done about one that is
//! found writable (R5, R6).
//!
//! **Invariant:** nothing here runs beside a procedure, in maintenance, or on data whose rejoin is not done; and no
//! PostgreSQL of another system identifier is touched.

use super::{Follower, Owner, Then};
use crate::base::config::FencePostgres;
use crate::base::ids::NodeName;
use crate::base::time::Duration;
use crate::engine::durable::Entry;
use crate::engine::turn::{Effect, Now, PgOutput, PgTask};

/// After a failed task.
const RETRY_AFTER: Duration = Duration::from_secs(3);
/// How often a standby that does not stream is told to look for its primary, at first and later.
const NUDGE_EVERY: Duration = Duration::from_secs(1);
const NUDGE_LATER: Duration = Duration::from_secs(10);
/// Without a stream for so long although the active node is there: something is wrong, and a person is told.
const DRY_LIMIT: Duration = Duration::from_secs(10);
/// So long after that the switch point is surely looked up, which may say more.
const JUDGE_LIMIT: Duration = Duration::from_secs(2);

impl Follower {
    /// Every turn: one thing at most is begun.
    pub(super) fn keep(&mut self, now: Now, fx: &mut Vec<Effect>) {
        let streaming_step = self.rejoin.as_ref().is_some_and(super::rejoin::Rejoin::is_streaming);
        if self.rejoin.is_some() && !streaming_step {
            return;
        }
        let trouble = self.find_trouble(now);
        if trouble != self.trouble {
            if let Some(text) = &trouble {
                self.note(now, fx, "cannot_follow", text.clone());
            }
            self.trouble = trouble;
        }
        let idle = self.pg.task.is_none() && now.boot >= self.pg.retry_at && !self.durable.maintenance;
        let Some(in_recovery) = self.report().map(|r| r.in_recovery).filter(|_| idle) else { return };
        if !in_recovery {
            self.end_writable(now, fx);
        } else if !self.durable.rejoining || streaming_step {
            self.follow_active(now, fx);
        }
    }

    /// Of this cluster, as far as can be known: else it is somebody's database, and not ours to touch.
    fn is_ours(&self) -> bool {
        let id = self.report().map(|r| r.system_id);
        let theirs = self.active().and_then(|facts| facts.state.pg.as_ref()).map(|pg| pg.system_id);
        self.durable.initialised || (id.is_some() && id == theirs)
    }

    fn end_writable(&mut self, now: Now, fx: &mut Vec<Effect>) {
        if !self.is_ours() || self.setup.fence_postgres == FencePostgres::Keep {
            return;
        }
        if !self.durable.rejoining {
            // First on disk: what it wrote is nobody else's, so it may not follow by itself any more.
            let id = self.procedure_id(now);
            if !self.writing.iter().any(|(_, e, _)| matches!(e.as_slice(), [Entry::RejoinStarted { .. }])) {
                self.record(fx, vec![Entry::RejoinStarted { id }], Then::Nothing);
            }
            return;
        }
        let task = match self.setup.fence_postgres {
            FencePostgres::Stop => PgTask::Stop,
            FencePostgres::Demote | FencePostgres::Keep => PgTask::Demote { follow_peer: false },
        };
        self.pg_task(Owner::Demotion, task, fx);
    }

    fn follow_active(&mut self, now: Now, fx: &mut Vec<Effect>) {
        let Some((report, facts)) = self.report().zip(self.active()) else { return };
        let Some(theirs) = facts.state.pg.as_ref().filter(|pg| !pg.in_recovery) else { return };
        if theirs.system_id != report.system_id {
            return;
        }
        let (name, prepared) = (facts.state.node.clone(), facts.state.prepared);
        let (streaming, behind) = (report.streaming, (report.timeline, theirs.timeline));
        if self.pg.follows.as_ref() != Some(&name) {
            // Its slot has to be there, or PostgreSQL waits five seconds before it asks again.
            if prepared {
                fx.push(Effect::FollowFrom { node: name.clone() });
                self.pg_task(Owner::Follow(name), PgTask::Adopt, fx);
            }
            return;
        }
        if streaming {
            (self.pg.dry_since, self.pg.judged, self.pg.diverged) = (None, false, false);
            if !self.durable.initialised && !self.is_writing(&Entry::Initialised) {
                self.record(fx, vec![Entry::Initialised], Then::Nothing);
            }
            return;
        }
        let since = *self.pg.dry_since.get_or_insert(now.boot);
        let long = now.boot.since(since) >= DRY_LIMIT;
        if long && !self.pg.judged && behind.0 < behind.1 {
            self.pg.judged = true;
            self.pg_task(Owner::SwitchPoint, PgTask::SwitchPoint { from: behind.0, to: behind.1 }, fx);
        } else if now.boot >= self.pg.nudge_at && !self.pg.diverged {
            self.pg.nudge_at = now.boot + if long { NUDGE_LATER } else { NUDGE_EVERY };
            self.pg_task(Owner::Nudge, PgTask::Nudge, fx);
        }
    }

    pub(super) fn on_kept(&mut self, now: Now, owner: Owner, result: Result<PgOutput, String>, fx: &mut Vec<Effect>) {
        match (owner, result) {
            (Owner::Follow(name), Ok(_)) => {
                (self.pg.dry_since, self.pg.judged, self.pg.diverged) = (None, false, false);
                self.pg.nudge_at = now.boot + NUDGE_EVERY;
                self.pg.failed_as = None;
                self.note(now, fx, "following", format!("PostgreSQL follows {name} as its standby"));
                self.pg.follows = Some(name);
            }
            (Owner::Demotion, Ok(_)) => {
                self.pg.failed_as = None;
                let text = "PostgreSQL was writable on a node without a vote; it follows nobody until rejoin";
                self.note(now, fx, "postgres_demoted", text.to_owned());
            }
            (Owner::SwitchPoint, Ok(PgOutput::Lsn(point))) => {
                self.pg.diverged = self.report().is_some_and(|r| r.lsn > point);
            }
            // The history has not come: there is nothing to be said beyond "it does not stream".
            (Owner::SwitchPoint, _) | (Owner::Nudge, Ok(_)) => {}
            (_, Err(why)) => {
                self.pg.retry_at = now.boot + RETRY_AFTER;
                if self.pg.failed_as.as_ref() != Some(&why) {
                    self.pg.failed_as = Some(why.clone());
                    self.note(now, fx, "postgres_setup_failed", why);
                }
            }
            (Owner::Rejoin, Ok(_)) => {}
        }
    }

    /// Why PostgreSQL here does not follow by itself, with what to do.
    fn find_trouble(&self, now: Now) -> Option<String> {
        let me = &self.setup.me;
        let rejoin = format!("`portcullis rejoin {me}` makes it a standby");
        let away = format!("if nobody needs it, stop it and move its data directory away; then {rejoin}");
        let unfinished = self.durable.rejoining && self.rejoin.is_none();
        let unfinished = unfinished.then(|| format!("the data here is not known to be the active node's; {rejoin}"));
        let Some(report) = self.report() else {
            if unfinished.is_some() {
                return unfinished;
            }
            // Where there is no data at all, the advice says as much.
            return (self.pg.start_refused && self.pg.present).then(|| {
                format!("PostgreSQL here was not started: its data is no standby's, and {me} has no vote; {rejoin}")
            });
        };
        if !report.in_recovery && !self.is_ours() {
            return Some(format!("PostgreSQL here is a primary of another cluster, and is left alone; {away}"));
        }
        if !report.in_recovery {
            return Some(format!("PostgreSQL here is writable, and {me} has no vote; {rejoin}"));
        }
        if unfinished.is_some() {
            return unfinished;
        }
        let facts = self.active()?;
        let theirs = facts.state.pg.as_ref()?;
        let name: &NodeName = &facts.state.node;
        if theirs.system_id != report.system_id {
            return Some(format!(
                "PostgreSQL here has the system identifier {}, that of {name} {}: it is another cluster's; {away}",
                report.system_id, theirs.system_id
            ));
        }
        if self.pg.diverged {
            return Some(format!(
                "PostgreSQL here ({} on timeline {}) is ahead of where timeline {} of {name} began, and cannot follow; \
                 {rejoin} again",
                report.lsn, report.timeline, theirs.timeline
            ));
        }
        let limit = DRY_LIMIT + JUDGE_LIMIT;
        let dry = self.pg.dry_since.filter(|since| !report.streaming && now.boot.since(*since) >= limit);
        dry.map(|_| {
            format!("PostgreSQL here does not stream from {name}; its log says why; if WAL it needs is gone, {rejoin}")
        })
    }
}
