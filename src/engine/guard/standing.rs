//! R1: whether the gate may pass, and until when. Nobody else extends or suspends; a fence and a consent cut by `shut`.
//!
//! **Invariants:** the gate is extended only to the lease's deadline, and only when every condition of R1 is true. A
//! cut and a suspension are the first effect of their turn, and take back what was granted earlier in it.

use super::Guard;
use super::handover::Handover;
use crate::base::time::Instant;
use crate::engine::status::GateState;
use crate::engine::turn::{Effect, Now};

/// What R1 says without the VIP.
enum Standing {
    /// The gate may pass until then.
    Serves(Instant),
    /// Only PostgreSQL is missing, and is likely to be back in a moment; until then the lease is good.
    Waits(Instant, String),
    Not(GateState, String),
}

impl Guard {
    /// Extends, suspends or cuts.
    pub(super) fn decide(&mut self, now: Now, fx: &mut Vec<Effect>) {
        if let Some(until) = self.holds_over(now) {
            let reason = self.hold_reason();
            return self.suspend(now, now.boot, until, reason, fx);
        }
        match self.standing(now) {
            Standing::Serves(until) => {
                if !self.vips_ready(now, until, fx) {
                    let reason = self.vip_reason();
                    self.shut(now, GateState::Shut, reason, fx);
                    return;
                }
                if !self.gate.open {
                    self.gate.open = true;
                    let was_suspended = self.gate.suspended.take().is_some() && self.hold_over.is_none();
                    self.counters.gate_openings += 1;
                    self.extend(until, fx);
                    let text = format!(
                        "the gate opened ({}) at epoch {}; last proof {} ms old, lease good for {} ms, {} sessions",
                        self.proofs.kind(),
                        self.durable.complete,
                        self.proof_age(now),
                        crate::base::time::millis(until.since(now.boot)),
                        self.gate.sessions
                    );
                    self.note(now, fx, "gate_opened", text);
                    if !was_suspended {
                        self.start_units(fx);
                    }
                    self.end_hold_over(fx);
                } else if until != self.gate.until {
                    self.extend(until, fx);
                }
                self.gate.until = until;
                self.gate.state = if self.gate.paused { GateState::Paused } else { GateState::Open };
                self.gate.reason.clear();
            }
            Standing::Waits(until, reason) if self.may_suspend(now) => {
                if self.vips_ready(now, until, fx) {
                    self.suspend(now, now.boot, until, reason, fx);
                } else {
                    let reason = self.vip_reason();
                    self.shut(now, GateState::Shut, reason, fx);
                }
            }
            Standing::Waits(_, reason) => {
                self.unbind_vips(fx);
                self.shut(now, GateState::Shut, reason, fx);
            }
            Standing::Not(state, reason) => {
                self.unbind_vips(fx);
                self.shut(now, state, reason, fx);
            }
        }
    }

    /// Open, or shut for want of PostgreSQL alone, without an end of the sessions that wait for it.
    pub(super) fn keeps_clients(&self) -> bool {
        self.gate.open || self.gate.suspended.is_some()
    }

    /// Only what was open is suspended, and not for longer than clients wait for a backend.
    fn may_suspend(&self, now: Now) -> bool {
        match self.gate.suspended {
            Some(since) => now.boot < since + self.setup.hold_limit,
            None => self.gate.open,
        }
    }

    /// Only PostgreSQL is missing (it restarts, recovers, or was stopped for a switchover): nothing passes (R1), the
    /// lease and the VIP stay, and clients between transactions wait. They have waited since `since`.
    pub(super) fn suspend(&mut self, now: Now, since: Instant, until: Instant, reason: String, fx: &mut Vec<Effect>) {
        let first = self.gate.open;
        if first {
            self.gate.open = false;
            self.gate.suspended = Some(since);
            self.counters.gate_suspensions += 1;
            // As with a cut: nothing that was granted earlier in this turn may be executed after it.
            fx.retain(|effect| !matches!(effect, Effect::Extend { .. } | Effect::KernelGate { .. }));
            let told = self.told(&reason);
            fx.insert(0, Effect::Suspend { until, reason: told });
            let text = format!(
                "the gate is shut and its clients wait: {reason}; epoch {}, {} sessions",
                self.durable.complete, self.gate.sessions
            );
            self.note(now, fx, "gate_suspended", text);
        } else if until != self.gate.until {
            let told = self.told(&reason);
            fx.push(Effect::Suspend { until, reason: told });
        }
        if (first || until != self.gate.until) && self.setup.kernel_gate {
            fx.push(Effect::KernelGate { until: Some(until) });
        }
        self.gate.until = until;
        self.gate.state = GateState::Paused;
        self.gate.reason = reason;
    }

    /// Both walls move together: the gate of the proxy, inline, and the kernel's behind it.
    fn extend(&self, until: Instant, fx: &mut Vec<Effect>) {
        fx.push(Effect::Extend { until });
        if self.setup.kernel_gate {
            fx.push(Effect::KernelGate { until: Some(until) });
        }
    }

    /// Milliseconds since the last proof was asked for.
    fn proof_age(&self, now: Now) -> u64 {
        self.proofs.last().map_or(0, |asked| crate::base::time::millis(now.boot.since(asked)))
    }

    /// What a cut into this state is for, in one word of few.
    fn cut_cause(&self, state: GateState) -> &'static str {
        match state {
            _ if self.shutting_down => "shutdown",
            GateState::Fenced => "fenced",
            GateState::Lapsed if self.against().is_some() => "record",
            GateState::Lapsed => "lease",
            _ if self.handover.is_some() || self.hold_over.is_some() => "switchover",
            _ if self.postgres_serves().is_err() => "postgres",
            _ if !self.vips.is_empty() => "vip",
            _ => "other",
        }
    }

    /// Cuts when open, and remembers why it is not.
    pub(super) fn shut(&mut self, now: Now, state: GateState, reason: String, fx: &mut Vec<Effect>) {
        if self.keeps_clients() {
            self.gate.open = false;
            self.gate.suspended = None;
            self.gate.until = Instant::ZERO;
            self.counters.gate_cuts += 1;
            *self.counters.cuts.entry(self.cut_cause(state).to_owned()).or_default() += 1;
            // Nothing that was granted earlier in this turn may be executed after the cut.
            let granted = |effect: &Effect| {
                matches!(effect, Effect::Extend { .. } | Effect::Suspend { .. } | Effect::KernelGate { .. })
            };
            fx.retain(|effect| !granted(effect));
            let told = self.told(&reason);
            fx.insert(0, Effect::Cut { reason: told });
            if self.setup.kernel_gate {
                fx.insert(1, Effect::KernelGate { until: None });
            }
            let text = format!(
                "the gate was cut ({}): {reason}; epoch {}, last proof {} ms old, {} sessions",
                state.as_str(),
                self.durable.complete,
                self.proof_age(now),
                self.gate.sessions
            );
            self.note(now, fx, "gate_cut", text);
            self.stop_units(fx);
            self.end_hold_over(fx);
        }
        self.gate.state = state;
        self.gate.reason = reason;
    }

    /// All of R1 but the VIP: until when the gate may pass, or why not.
    fn standing(&self, now: Now) -> Standing {
        match self.lease_stands(now) {
            Err((state, reason)) => Standing::Not(state, reason),
            Ok(_) if self.handover.as_ref().is_some_and(Handover::stopping) => {
                Standing::Not(GateState::Shut, "a switchover is under way".to_owned())
            }
            Ok(until) => match self.postgres_serves() {
                Ok(()) => Standing::Serves(until),
                Err((true, reason)) => Standing::Waits(until, reason),
                Err((false, reason)) => Standing::Not(GateState::Shut, reason),
            },
        }
    }

    /// R1 without PostgreSQL and the VIP.
    pub(super) fn lease_stands(&self, now: Now) -> Result<Instant, (GateState, String)> {
        use GateState::{Fenced, Lapsed, Shut};
        let shut = |reason: &str| Err((Shut, reason.to_owned()));
        if self.shutting_down {
            return shut("the daemon is shutting down");
        }
        if let Some(reason) = self.fenced() {
            return Err((Fenced, reason));
        }
        if self.durable.won > self.durable.complete {
            return shut("an unfinished takeover; run promote again to finish it");
        }
        if !self.durable.is_holder() {
            return shut("this node is not the active one");
        }
        if let Some(why) = self.against() {
            return Err((Lapsed, why));
        }
        let until = self.lease_deadline();
        if until <= now.boot {
            let reason = match self.proofs.newest() {
                None => format!("no proof yet that epoch {} still stands", self.durable.complete),
                Some(asked) => format!(
                    "the lease ran out: last proof was asked for {:.1} s ago",
                    now.boot.since(asked).as_secs_f64()
                ),
            };
            return Err((Lapsed, reason));
        }
        if let Some(why) = self.not_confirmed(now) {
            return Err((Lapsed, why));
        }
        Ok(until)
    }

    /// The local PostgreSQL is a writable primary of the right cluster whose list agrees with the record, and R6's wait
    /// is over.
    fn postgres_serves(&self) -> Result<(), (bool, String)> {
        let shut = |reason: String| Err((false, reason));
        let wait = |reason: String| Err((true, reason));
        let report = match (&self.pg.report, self.pg.up) {
            (Some(report), true) => report,
            _ => {
                let error = self.pg.error.clone().unwrap_or_else(|| "not seen yet".to_owned());
                return wait(format!("the local PostgreSQL is not up ({error})"));
            }
        };
        if report.in_recovery {
            return shut("the local PostgreSQL is a standby".to_owned());
        }
        if report.read_only {
            return shut("the local PostgreSQL refuses writes (default_transaction_read_only)".to_owned());
        }
        if let Some(marker) = &self.witness.marker
            && marker.sysid != report.system_id
        {
            return shut(format!("system identifier {} is not the record's {}", report.system_id, marker.sysid));
        }
        if let Some(why) = self.list_disagrees(report) {
            // A PostgreSQL that comes back with a wrong list is put right in a moment; one that serves with it is cut.
            return Err((self.gate.suspended.is_some(), why));
        }
        if !self.pg.barrier_passed {
            if let Some(why) = self.lost_wal() {
                return wait(why);
            }
            return wait(
                "PostgreSQL has just started: waiting until the standby has confirmed its WAL (R6)".to_owned(),
            );
        }
        Ok(())
    }
}
