//! Changing the record: read it, write it with both record sets as prerequisites, and settle what was not answered by
//! writing again (R2, P5): a reading never settles anything, because a late update could still land after it.

use super::{Guard, Then, proofs::AskedFor};
use crate::base::ids::{Epoch, NodeName, OpId, TimelineId};
use crate::base::time::{Duration, Instant};
use crate::engine::durable::Entry;
use crate::engine::evidence::{self, Seen};
use crate::engine::turn::{Effect, Now};
use crate::wire::dns::{RecordPair, UpdateOutcome};
use crate::wire::marker::Marker;

/// How long one update may take before it counts as unanswered.
const UPDATE_LIMIT: Duration = Duration::from_millis(1500);
/// Pause before a job reads or writes again after a failure.
const PAUSE: Duration = Duration::from_millis(250);
/// How long a job goes on trying in all.
const JOB_LIMIT: Duration = Duration::from_secs(10);

/// What a job wants to be written.
#[derive(Debug, Clone, PartialEq, Hash)]
pub(super) enum Purpose {
    /// The first marker of a fresh pair.
    First,
    /// Our new boot_id under our own epoch.
    Boot,
    /// `sync=none` or `sync=<peer>` under our own epoch; the active node stays as it is.
    Sync(Option<NodeName>),
    /// A takeover, judged on this very record.
    Takeover {
        epoch: Epoch,
        judged: RecordPair,
        sync: Option<NodeName>,
        loss: bool,
        /// After a whole switchover a late `sync=` of the old node changes nothing that was judged.
        handed_over: bool,
    },
}

/// How a job ended.
#[derive(Debug, Clone, PartialEq, Hash)]
pub(super) enum JobEnd {
    Settled(Marker),
    /// The record is not what the purpose was judged on. Nothing of ours landed, or a later epoch stands.
    Changed(String),
    /// Surely not written: refused, or never sent.
    NotWritten(String),
    /// An update may have landed; nobody knows.
    Unknown(String),
}

#[derive(Debug, Clone, PartialEq, Hash)]
enum Phase {
    Pausing,
    Reading { question: u64 },
    Updating { op: OpId, marker: Marker },
    ReadingBack { question: u64, marker: Marker },
    PausingBeforeBack { marker: Marker },
}

/// One change of the record under way; one at a time.
#[derive(Debug, Clone, Hash)]
pub(super) struct RecordJob {
    purpose: Purpose,
    phase: Phase,
    /// When it wants to be woken.
    pub(super) wake: Instant,
    give_up: Instant,
    /// An update was sent whose fate is not settled.
    unsettled: bool,
    last_error: String,
}

impl Guard {
    /// Starts a job; false while another one runs.
    pub(super) fn start_job(&mut self, now: Now, purpose: Purpose, fx: &mut Vec<Effect>) -> bool {
        if self.job.is_some() {
            return false;
        }
        let question = self.ask_witness(now, 0, AskedFor::Job, fx);
        self.job = Some(RecordJob {
            purpose,
            phase: Phase::Reading { question },
            wake: now.boot + JOB_LIMIT,
            give_up: now.boot + JOB_LIMIT,
            unsettled: false,
            last_error: "no answer yet".to_owned(),
        });
        true
    }

    /// Time has passed: try again, or give up.
    pub(super) fn advance_job(&mut self, now: Now, fx: &mut Vec<Effect>) {
        let Some(mut job) = self.job.take() else { return };
        if now.boot >= job.give_up {
            let error = job.last_error.clone();
            let end = match (&job.phase, job.unsettled) {
                (Phase::Updating { .. }, _) | (_, true) => JobEnd::Unknown(error),
                (Phase::ReadingBack { .. } | Phase::PausingBeforeBack { .. }, _) => JobEnd::Unknown(error),
                _ => JobEnd::NotWritten(error),
            };
            self.end_job(now, job.purpose, end, fx);
            return;
        }
        if now.boot >= job.wake {
            match job.phase.clone() {
                Phase::Pausing => {
                    let question = self.ask_witness(now, 0, AskedFor::Job, fx);
                    job.phase = Phase::Reading { question };
                    job.wake = job.give_up;
                }
                Phase::PausingBeforeBack { marker } => {
                    let question = self.ask_witness(now, 0, AskedFor::Job, fx);
                    job.phase = Phase::ReadingBack { question, marker };
                    job.wake = job.give_up;
                }
                _ => job.wake = job.give_up,
            }
        }
        self.job = Some(job);
    }

    pub(super) fn on_job_reading(
        &mut self,
        now: Now,
        question: u64,
        reading: Result<(RecordPair, Seen), String>,
        fx: &mut Vec<Effect>,
    ) {
        let Some(mut job) = self.job.take() else { return };
        match (job.phase.clone(), reading) {
            (Phase::Reading { question: q }, Ok((pair, seen))) if q == question => {
                match self.plan(now, &job.purpose, &pair, &seen) {
                    Ok((addresses, marker)) => {
                        let op = OpId(self.id());
                        let text = marker.to_string();
                        fx.push(Effect::Update {
                            op,
                            prerequisite: pair,
                            addresses,
                            marker: text,
                            limit: UPDATE_LIMIT,
                        });
                        job.phase = Phase::Updating { op, marker };
                        job.wake = job.give_up;
                        self.job = Some(job);
                    }
                    // An unanswered update of ours is dead for good only once a later epoch stands: a record that a
                    // person edited may be put back, and then it could still land (P5).
                    Err(why) if job.unsettled && !self.later_epoch(&job.purpose, &seen) => {
                        self.end_job(now, job.purpose, JobEnd::Unknown(why), fx);
                    }
                    Err(why) => self.end_job(now, job.purpose, JobEnd::Changed(why), fx),
                }
            }
            (Phase::Reading { question: q }, Err(why)) if q == question => {
                job.last_error = why;
                job.phase = Phase::Pausing;
                job.wake = now.boot + PAUSE;
                self.job = Some(job);
            }
            (Phase::ReadingBack { question: q, marker }, Ok((_, seen))) if q == question => {
                match evidence::marker_of(&seen) {
                    Some(read) if *read == marker => self.end_job(now, job.purpose, JobEnd::Settled(marker), fx),
                    Some(read) if read.epoch > marker.epoch => {
                        let why = format!("{} took epoch {} meanwhile", read.active, read.epoch);
                        self.end_job(now, job.purpose, JobEnd::Changed(why), fx);
                    }
                    _ => {
                        job.last_error =
                            "the new marker is not read back from the server that took the update (a cache or \
                                          balancer before it?)"
                                .to_owned();
                        job.phase = Phase::PausingBeforeBack { marker };
                        job.wake = now.boot + PAUSE;
                        self.job = Some(job);
                    }
                }
            }
            (Phase::ReadingBack { question: q, marker }, Err(why)) if q == question => {
                job.last_error = why;
                job.phase = Phase::PausingBeforeBack { marker };
                job.wake = now.boot + PAUSE;
                self.job = Some(job);
            }
            _ => self.job = Some(job),
        }
    }

    /// The record has moved past what the purpose wanted to write.
    fn later_epoch(&self, purpose: &Purpose, seen: &Seen) -> bool {
        let wanted = match purpose {
            Purpose::Takeover { epoch, .. } => *epoch,
            Purpose::First => Epoch(1),
            Purpose::Boot | Purpose::Sync(_) => self.durable.won.next(),
        };
        evidence::marker_of(seen).is_some_and(|marker| marker.epoch >= wanted && marker.active != self.setup.me)
    }

    pub(super) fn on_update_answered(&mut self, now: Now, op: OpId, outcome: UpdateOutcome, fx: &mut Vec<Effect>) {
        let Some(mut job) = self.job.take() else { return };
        let marker = match job.phase.clone() {
            Phase::Updating { op: sent, marker } if sent == op => marker,
            _ => {
                self.job = Some(job);
                return;
            }
        };
        match outcome {
            UpdateOutcome::Done => {
                self.witness.ignore_before = now.boot;
                if matches!(job.purpose, Purpose::Takeover { .. }) {
                    let question = self.ask_witness(now, 0, AskedFor::Job, fx);
                    job.phase = Phase::ReadingBack { question, marker };
                    job.wake = job.give_up;
                    self.job = Some(job);
                } else {
                    self.end_job(now, job.purpose, JobEnd::Settled(marker), fx);
                }
            }
            UpdateOutcome::Conflict => {
                job.last_error = "the record changed between reading and writing it".to_owned();
                job.phase = Phase::Pausing;
                job.wake = now.boot;
                self.job = Some(job);
            }
            UpdateOutcome::Unknown(why) => {
                job.unsettled = true;
                job.last_error = format!("an update was not answered: {why}");
                job.phase = Phase::Pausing;
                job.wake = now.boot + PAUSE;
                self.job = Some(job);
            }
            UpdateOutcome::NotSent(why) => {
                job.last_error = why;
                job.phase = Phase::Pausing;
                job.wake = now.boot + PAUSE;
                self.job = Some(job);
            }
            UpdateOutcome::Refused(why) if job.unsettled => {
                self.end_job(now, job.purpose, JobEnd::Unknown(why), fx);
            }
            UpdateOutcome::Refused(why) => self.end_job(now, job.purpose, JobEnd::NotWritten(why), fx),
        }
    }

    /// What to write over the record as just read, or why the purpose is void.
    fn plan(
        &self,
        now: Now,
        purpose: &Purpose,
        pair: &RecordPair,
        seen: &Seen,
    ) -> Result<(Vec<std::net::IpAddr>, Marker), String> {
        let current = evidence::marker_of(seen);
        let mine = |epoch: Epoch| current.filter(|m| m.active == self.setup.me && m.epoch == epoch);
        let next_seq = current.map_or(1, |m| m.seq.saturating_add(1)).max(self.durable.seq.saturating_add(1));
        let fresh = |epoch: Epoch, sync: Option<NodeName>, loss: bool| -> Result<Marker, String> {
            let report = self.pg.report.as_ref().ok_or("the local PostgreSQL was not seen yet")?;
            Ok(Marker {
                epoch,
                seq: next_seq,
                active: self.setup.me.clone(),
                sync,
                timeline: report.timeline,
                lease: self.setup.timing.lease,
                sysid: report.system_id,
                boot: self.setup.boot.clone(),
                since: now.rfc3339(),
                loss,
            })
        };
        match purpose {
            Purpose::First => match (seen, current) {
                (Seen::Unmarked { .. }, _) => Ok((pair.addresses.clone(), fresh(Epoch(1), None, false)?)),
                (_, Some(_)) if mine(Epoch(1)).is_some() => Ok((pair.addresses.clone(), fresh(Epoch(1), None, false)?)),
                _ => Err("a marker is there already".to_owned()),
            },
            Purpose::Boot | Purpose::Sync(_) => {
                let Seen::Agreed { marker } = seen else { return Err("the record does not name this node".to_owned()) };
                if marker.active != self.setup.me || marker.epoch != self.durable.won {
                    return Err(format!("the record names {} at epoch {}", marker.active, marker.epoch));
                }
                let mut next = Marker { seq: next_seq, boot: self.setup.boot.clone(), ..marker.clone() };
                if let Some(report) = self.pg.report.as_ref().filter(|r| !r.in_recovery) {
                    next.timeline = report.timeline;
                }
                if let Purpose::Sync(sync) = purpose {
                    if next.sync != *sync {
                        next.since = now.rfc3339();
                    }
                    next.sync = sync.clone();
                    next.loss = next.loss && self.durable.complete < self.durable.won;
                }
                Ok((pair.addresses.clone(), next))
            }
            Purpose::Takeover { epoch, judged, sync, loss, handed_over } => {
                let late_sync = || {
                    let before = judged.marker.first().and_then(|text| text.parse::<Marker>().ok());
                    let same = matches!((&before, current), (Some(before), Some(now))
                        if before.epoch == now.epoch && before.active == now.active && before.boot == now.boot);
                    *handed_over && same && judged.addresses == pair.addresses
                };
                if !pair.same_data(judged) && mine(*epoch).is_none() && !late_sync() {
                    return Err(match current {
                        Some(m) => format!("the record changed: it names {} at epoch {} now", m.active, m.epoch),
                        None => "the record changed while it was judged".to_owned(),
                    });
                }
                let mut marker = fresh(*epoch, sync.clone(), *loss)?;
                if let Some(own) = mine(*epoch) {
                    marker.timeline = own.timeline.max(marker.timeline);
                } else if self.pg.report.as_ref().is_some_and(|report| report.in_recovery) {
                    // The one that the promotion will write: who takes over from a taker that dies half-way must not
                    // use its number again (P14).
                    let used = current.map_or(TimelineId(1), |m| m.timeline).max(marker.timeline);
                    marker.timeline = TimelineId(used.0.saturating_add(1));
                } else if marker.timeline == TimelineId(0) {
                    marker.timeline = current.map_or(TimelineId(1), |m| m.timeline);
                }
                Ok((evidence::addresses_for(&self.setup, pair, &self.setup.me), marker))
            }
        }
    }

    fn end_job(&mut self, now: Now, purpose: Purpose, end: JobEnd, fx: &mut Vec<Effect>) {
        if let JobEnd::Settled(marker) = &end {
            self.witness.ignore_before = now.boot;
            self.witness.sync = Some(marker.sync.clone());
            self.witness.marker = Some(marker.clone());
        }
        match purpose {
            Purpose::First => {
                if let JobEnd::Settled(marker) = end {
                    let entries = vec![
                        Entry::Won { epoch: marker.epoch, seq: marker.seq, loss: false, old_lease_ms: 0 },
                        sync_entry(&marker),
                        Entry::Complete { epoch: marker.epoch },
                    ];
                    self.witness.forget(now.boot);
                    self.note(now, fx, "first_marker", format!("wrote the first marker: epoch {}", marker.epoch));
                    self.record(fx, entries, Then::Nothing);
                }
            }
            Purpose::Boot => {
                if matches!(end, JobEnd::Unknown(_)) {
                    // It may land, and would then be read as "here": W is waited all the same (S6).
                    self.witness.boot_from = Some(now.boot);
                }
                if let JobEnd::Settled(marker) = end {
                    self.witness.forget(now.boot);
                    self.witness.boot_from = Some(now.boot);
                    self.note(now, fx, "boot_recorded", "wrote this boot into the marker; waiting W".to_owned());
                    self.record(fx, vec![sync_entry(&marker)], Then::Nothing);
                }
            }
            Purpose::Sync(_) => {
                if let JobEnd::Settled(marker) = &end {
                    self.record(fx, vec![sync_entry(marker)], Then::Nothing);
                }
                self.on_sync_recorded(now, end, fx);
            }
            Purpose::Takeover { .. } => self.on_takeover_job(now, end, fx),
        }
    }
}

/// What the journal keeps of our own update.
pub(super) fn sync_entry(marker: &Marker) -> Entry {
    Entry::Sync { epoch: marker.epoch, seq: marker.seq, sync: marker.sync.clone(), since: marker.since.clone() }
}
