//! The lease arithmetic of rules R1 and R2: deadlines only, always counted from the question.

use crate::base::time::{Duration, Instant};

/// L, d and the margin (`fence.lease`, `fence.max_drift`, `fence.margin`).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Timing {
    pub lease: Duration,
    /// At most 0.1.
    pub max_drift: f64,
    pub margin: Duration,
}

impl Timing {
    /// W, the wait before taking over: L (1 + d) / (1 - d) + margin, rounded up to the millisecond, for the longer
    /// of our lease and `other` (the marker's).
    pub fn wait(&self, other: Option<Duration>) -> Duration {
        let lease = other.map_or(self.lease, |other| other.max(self.lease));
        let factor = (1.0 + self.max_drift) / (1.0 - self.max_drift);
        let micros = lease.as_secs_f64() * factor * 1e6;
        let whole = Duration::from_secs_f64(micros.ceil() / 1e6) + self.margin;
        let millis = u64::try_from(whole.as_nanos().div_ceil(1_000_000)).unwrap_or(u64::MAX);
        Duration::from_millis(millis)
    }
}

/// The proofs in hand for one (node, epoch), each the moment its question was first sent.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct Proofs {
    witness: Option<Instant>,
    pledge: Option<Instant>,
    /// A VIP witness answered (R3): it only prolongs.
    neighbour: Option<Instant>,
    /// A promote under all of R2 (R3: it opens where there is no witness).
    grant: Option<Instant>,
    /// The last good one, also after all were voided; only shown.
    last: Option<Instant>,
}

impl Proofs {
    /// A witness said "here" to a question sent at `asked`.
    pub fn witnessed(&mut self, asked: Instant) {
        self.witness = self.witness.max(Some(asked));
        self.last = self.last.max(Some(asked));
    }

    /// The peer pledged to a question sent at `asked`.
    pub fn pledged(&mut self, asked: Instant) {
        self.pledge = self.pledge.max(Some(asked));
        self.last = self.last.max(Some(asked));
    }

    /// R2 held at `at`: what a promote with a VIP alone opens on.
    pub fn granted(&mut self, at: Instant) {
        self.grant = self.grant.max(Some(at));
        self.last = self.last.max(Some(at));
    }

    /// A VIP witness answered a question sent at `asked`; it only prolongs a lease that is good at `now` (R3, P10).
    /// False when it was too late.
    pub fn neighboured(&mut self, asked: Instant, now: Instant, lease: Duration) -> bool {
        let good = self.deadline(lease) > now;
        if good {
            self.neighbour = self.neighbour.max(Some(asked));
            self.last = self.last.max(Some(asked));
        }
        good
    }

    /// A negative verdict voids everything in hand; pledges asked from now on count only once the authority says
    /// "here" again, which is the caller's part.
    pub fn void(&mut self) {
        *self = Proofs { last: self.last, ..Proofs::default() };
    }

    /// When the last good proof was asked for, voided since or not.
    pub fn last(&self) -> Option<Instant> {
        self.last
    }

    /// Whose word the newest is, for people.
    pub fn kind(&self) -> &'static str {
        match self.newest() {
            None => "no proof",
            asked if asked == self.witness => "the witness said so",
            asked if asked == self.pledge => "the peer pledged",
            asked if asked == self.grant => "promoted",
            Some(_) => "the VIP's witness answered",
        }
    }

    /// When the last proof was asked for.
    pub fn newest(&self) -> Option<Instant> {
        self.witness.max(self.pledge).max(self.neighbour).max(self.grant)
    }

    /// The newest of each kind, and when it was asked for.
    pub fn each(&self) -> impl Iterator<Item = (&'static str, Instant)> {
        let all = [
            ("witness", self.witness),
            ("pledge", self.pledge),
            ("vip_witness", self.neighbour),
            ("promote", self.grant),
        ];
        all.into_iter().filter_map(|(kind, asked)| Some((kind, asked?)))
    }

    pub fn witness(&self) -> Option<Instant> {
        self.witness
    }

    /// Until when the lease is good; `Instant::ZERO` without any proof.
    pub fn deadline(&self, lease: Duration) -> Instant {
        self.newest().map_or(Instant::ZERO, |asked| asked + lease)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_wait_outlasts_the_longest_lease_on_the_slowest_clock() {
        let timing = Timing { lease: Duration::from_secs(3), max_drift: 0.01, margin: Duration::from_millis(200) };
        assert_eq!(timing.wait(None), Duration::from_millis(3261));
        assert_eq!(timing.wait(Some(Duration::from_secs(5))), Duration::from_millis(5302));
        assert_eq!(timing.wait(Some(Duration::from_secs(1))), Duration::from_millis(3261));
    }

    #[test]
    fn a_lease_counts_from_the_question_and_the_later_proof_wins() {
        let mut proofs = Proofs::default();
        let at = |s: u64| Instant::from_nanos(s * 1_000_000_000);
        assert_eq!(proofs.deadline(Duration::from_secs(3)), Instant::ZERO);
        proofs.witnessed(at(10));
        proofs.pledged(at(9));
        assert_eq!(proofs.deadline(Duration::from_secs(3)), at(13));
        proofs.witnessed(at(8));
        assert_eq!(proofs.deadline(Duration::from_secs(3)), at(13), "a late answer never shortens");
        proofs.void();
        assert_eq!(proofs.deadline(Duration::from_secs(3)), Instant::ZERO);
    }

    #[test]
    fn p10_a_vip_witness_that_answers_after_the_lease_ran_out_revives_nothing() {
        let lease = Duration::from_secs(3);
        let at = |s: u64| Instant::from_nanos(s * 1_000_000_000);
        let mut proofs = Proofs::default();
        assert!(!proofs.neighboured(at(1), at(1), lease), "it begins no lease");
        assert_eq!(proofs.deadline(lease), Instant::ZERO);
        proofs.pledged(at(10));
        assert!(proofs.neighboured(at(11), at(12), lease));
        assert_eq!(proofs.deadline(lease), at(14), "dated from the question");
        assert!(!proofs.neighboured(at(13), at(14), lease), "asked in time, answered too late");
        assert_eq!(proofs.deadline(lease), at(14));
    }
}
