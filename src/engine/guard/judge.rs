//! What a takeover would lose (R4), and what a person is shown before it: judged on the very record that the update
//! will have as its prerequisite. It decides nothing; `takeover` does.

use super::Guard;
use super::observe::is_behind;
use crate::base::ids::{Epoch, NodeName};
use crate::base::time::millis;
use crate::engine::evidence::{self, Seen};
use crate::engine::setup::Mode;
use crate::engine::status::human_ms;
use crate::engine::turn::Now;

/// What a takeover over this record would lose.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Loss {
    None(String),
    Possible(String),
    /// Not to be had at any price: no data, other data, an unfinished rejoin.
    NotPromotable(String),
}

impl Guard {
    /// What a takeover over this record would lose (R4).
    pub(super) fn judge_loss(&self, seen: &Seen, planned: bool, stale: Option<Epoch>, alive: bool) -> Loss {
        let Some(report) = self.pg.report.as_ref().filter(|_| self.pg.up) else {
            let error = self.pg.error.clone().unwrap_or_else(|| "not seen yet".to_owned());
            let me = &self.setup.me;
            return Loss::NotPromotable(match self.pg_present {
                true => format!("the local PostgreSQL is not up ({error}); start it first"),
                false => format!("there is no data directory here yet; `portcullis rejoin {me}` makes one"),
            });
        };
        if self.is_silent() {
            let error = self.pg.error.as_deref().unwrap_or("no answer");
            return Loss::NotPromotable(format!("the local PostgreSQL does not answer ({error}); thaw or restart it"));
        }
        if self.durable.rejoining {
            return Loss::NotPromotable(
                "an unfinished rejoin: the data here is not whole; run rejoin again".to_owned(),
            );
        }
        let older = |highest: Epoch| {
            Loss::Possible(format!(
                "epoch {highest} is known here and the record does not show it (a restored zone?): what was \
                 acknowledged at it may not be here"
            ))
        };
        let Some(marker) = evidence::marker_of(seen) else {
            return match stale.filter(|_| !planned && self.setup.mode == Mode::Update) {
                Some(highest) => older(highest),
                None => self.judge_unmarked(report, planned, alive),
            };
        };
        if marker.sysid != report.system_id {
            return Loss::NotPromotable(format!(
                "this PostgreSQL has system identifier {}, the record says {}: other data; rejoin it",
                report.system_id, marker.sysid
            ));
        }
        if let Some(highest) = stale.filter(|_| !planned) {
            return older(highest);
        }
        if marker.active == self.setup.me && marker.epoch == self.durable.complete {
            let behind = self.durable.confirmed.is_some_and(|confirmed| is_behind(report, confirmed));
            if let Some(why) = self.lost_wal().filter(|_| !self.pg.barrier_passed) {
                return Loss::Possible(why);
            } else if behind {
                return Loss::Possible(format!("the data here ({}) is behind what was confirmed before", report.lsn));
            }
            return Loss::None("this node was the active one: no acknowledged write is missing".to_owned());
        }
        if planned {
            return Loss::None("the old primary hands over its last write: nothing is lost".to_owned());
        }
        if marker.active == self.setup.me {
            // A takeover of ours that did not complete was judged when it was made.
            return Loss::None("this node had taken over already: no further write is missing".to_owned());
        }
        if !self.setup.synchronous {
            return Loss::Possible(format!(
                "asynchronous replication: what {} acknowledged last may not be here",
                marker.active
            ));
        }
        if let Some((lsn, ..)) = self.durable.confirmed.filter(|confirmed| is_behind(report, *confirmed)) {
            return Loss::Possible(format!(
                "the data here ({}, timeline {}) is behind {lsn}, which was confirmed before",
                report.lsn, report.timeline
            ));
        }
        match &marker.sync {
            Some(name) if *name == self.setup.me => {
                Loss::None(format!("the record says sync={name}: no acknowledged write is missing"))
            }
            _ => Loss::Possible(format!(
                "{} is alone since {}: what it acknowledged after that is not here",
                marker.active, marker.since
            )),
        }
    }

    pub(super) fn unfence_refusal(&self, seen: &Seen, alive: bool) -> Option<String> {
        let elsewhere = evidence::points_at(seen).filter(|name| **name != self.setup.me);
        if let Some(name) = elsewhere {
            return Some(format!("the witness points at {name}; `promote` moves the service here"));
        }
        let marker = evidence::marker_of(seen);
        if marker.is_some_and(|m| m.active != self.setup.me) {
            return Some("the marker names the other node; `promote` moves the service here".to_owned());
        }
        if marker.is_none() && !alive {
            return Some(format!(
                "without a marker only {}'s word lifts a fence, and it does not answer; start its daemon",
                self.setup.peer
            ));
        }
        let held = self.peer.state.as_ref().filter(|_| alive).filter(|p| p.won > self.durable.won);
        held.map(|p| format!("{} holds the higher epoch {}; `portcullis status` there", p.node, p.won))
    }

    /// What is known, for a person who has to decide.
    pub(super) fn facts(
        &self,
        now: Now,
        seen: &Seen,
        alive: bool,
        planned: bool,
        loss: &Loss,
        epoch: Epoch,
    ) -> Vec<String> {
        let peer = &self.setup.peer;
        let mut lines = Vec::new();
        lines.push(if alive {
            let role = self.peer.state.as_ref().map_or("unknown", |p| p.role.as_str());
            format!("{peer} is alive, role {role}")
        } else {
            let ago = |at| human_ms(millis(now.boot.since(at)));
            let last = match (&self.peer.heard_wall, self.peer.heard) {
                (Some(wall), Some(at)) => format!("{wall}, {} ago", ago(at)),
                _ => format!("none since this daemon started {} ago", ago(self.started)),
            };
            format!("{peer} does not answer; last contact: {last}")
        });
        lines.push(match evidence::marker_of(seen) {
            Some(m) => format!(
                "the record: epoch {}, active {}, sync {}, since {}",
                m.epoch,
                m.active,
                m.sync.as_ref().map_or("none", NodeName::as_str),
                m.since
            ),
            None if self.setup.mode == Mode::Observe => {
                let shows = evidence::points_at(seen).map_or("nobody", NodeName::as_str);
                format!("the address record names {shows}; it has to be {} when this says so", self.wanted_record())
            }
            None if self.setup.mode == Mode::VipOnly => format!("without DNS the record is {peer}'s word"),
            None => "there is no marker yet".to_owned(),
        });
        if let Some(report) = &self.pg.report {
            lines.push(format!(
                "PostgreSQL here: {}, timeline {}, received {}, replayed {}",
                if report.in_recovery { "standby" } else { "primary" },
                report.timeline,
                report.lsn,
                report.replay_lsn.map_or_else(|| "-".to_owned(), |l| l.to_string())
            ));
        }
        lines.push(match loss {
            Loss::None(why) => format!("loss: none: {why}"),
            Loss::Possible(why) => format!("loss: POSSIBLE: {why}"),
            Loss::NotPromotable(why) => format!("cannot be promoted: {why}"),
        });
        if self.setup.block && !planned {
            lines.push(format!(
                "on_standby_loss = \"block\": from then on every commit waits until {peer} follows as standby"
            ));
        }
        if let Some(why) = self.hung_primary(alive) {
            lines.push(format!("PostgreSQL on {peer} cannot hand over ({why}): its daemon cuts the gate and stops it"));
        }
        if !planned && self.takeover.as_ref().is_some_and(super::takeover::Takeover::is_switchover) {
            // Never a failover: what `promote` would do is not its plan.
            return lines;
        }
        lines.push(if planned {
            format!("the plan: a switchover to epoch {epoch}: {peer} hands over, clients are held for about a second")
        } else if alive {
            format!("the plan: a takeover to epoch {epoch} with {peer}'s consent, so nothing is waited for")
        } else {
            let wait = self.wait().as_secs_f64();
            let off = self.takeover.as_ref().is_some_and(|t| t.peer_is_off);
            let how = match (self.setup.mode, self.setup.stonith, off) {
                (Mode::VipOnly, _, true) => format!("{peer} is off, as you say, so nothing is waited for"),
                (_, true, _) => format!(
                    "fence.stonith switches {peer} off; where that fails, its lease is waited out, W = {wait:.2} s"
                ),
                (_, false, _) => {
                    format!("{peer} may serve until its lease has run out, so W = {wait:.2} s is waited out")
                }
            };
            format!("the plan: a failover to epoch {epoch}: {how}")
        });
        lines
    }
}
