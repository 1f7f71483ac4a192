//! `service.units` (the applications that run beside the active node's gate): started after it opened, stopped when it
//! is cut. Their hand is bounded and the gate never waits for it.
//!
//! What it is NOT: it does not know systemd, and it never keeps the gate from opening or from being cut.

use super::Guard;
use crate::base::time::Instant;
use crate::engine::turn::{Effect, Now};

/// What was asked of the units.
#[derive(Debug, Clone, Hash, Default)]
pub(super) struct UnitsMemory {
    /// `None`: nothing asked in this life.
    wanted: Option<bool>,
    /// What a former life left running is stopped then, unless the gate has opened.
    stop_from: Instant,
}

impl UnitsMemory {
    pub(super) fn new(stop_from: Instant) -> UnitsMemory {
        UnitsMemory { wanted: None, stop_from }
    }
}

impl Guard {
    pub(super) fn start_units(&mut self, fx: &mut Vec<Effect>) {
        self.want_units(true, fx);
    }

    pub(super) fn stop_units(&mut self, fx: &mut Vec<Effect>) {
        self.want_units(false, fx);
    }

    fn want_units(&mut self, start: bool, fx: &mut Vec<Effect>) {
        if self.setup.units {
            self.units.wanted = Some(start);
            fx.push(Effect::Units { start });
        }
    }

    /// A daemon that was killed left its units running: a lease later they have to be justified by an open gate.
    pub(super) fn stop_units_of_a_former_life(&mut self, now: Now, fx: &mut Vec<Effect>) {
        if self.units.wanted.is_none() && now.boot >= self.units.stop_from {
            self.want_units(false, fx);
        }
    }

    pub(super) fn on_units(&mut self, now: Now, start: bool, result: Result<(), String>, fx: &mut Vec<Effect>) {
        let (done, verb) = if start { ("units_started", "started") } else { ("units_stopped", "stopped") };
        match result {
            Ok(()) => self.note(now, fx, done, format!("service.units were {verb}")),
            Err(why) => self.note(now, fx, "units_failed", format!("service.units were not all {verb}: {why}")),
        }
    }
}
