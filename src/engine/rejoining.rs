//! What a rejoin is on every node, with a vote or without: its limits, the plan said in words, and what of an answer
//! counts. The steps are each machine's own (`guard::rejoin`, `follower::rejoin`): a voter's touch the record, a
//! follower's go after whoever is active.

use super::report::{RejoinHow, RejoinPlan, SourceFacts};
use super::turn::PeerAnswer;
use crate::base::time::Duration;

/// How long is waited for the node to bring back, or for one to rejoin to (the contract).
pub(super) const NODE_LIMIT: Duration = Duration::from_secs(30);
/// The active node's facts; right after a promotion a checkpoint comes first.
pub(super) const LOOK_LIMIT: Duration = Duration::from_secs(90);
/// A question refused is asked again so much later.
pub(super) const LOOK_AGAIN: Duration = Duration::from_secs(1);
/// The active node's part: record, list, role, slot.
pub(super) const PREPARE_LIMIT: Duration = Duration::from_secs(30);
/// Until the new standby streams and has caught up.
pub(super) const STREAM_LIMIT: Duration = Duration::from_secs(120);

/// `follow alp: it is only behind`
pub(super) fn intention(plan: &RejoinPlan, source: &impl std::fmt::Display) -> String {
    let (would, aside) = match plan.how {
        RejoinHow::Follow => ("follow", ""),
        RejoinHow::Rewind => ("rewind to", ""),
        RejoinHow::Clone => ("clone", "; an old data directory is set aside"),
    };
    format!("{would} {source}: {}{aside}", plan.why)
}

/// What was proven when it was planned stays proven; the later answer is fresher in everything else.
pub(super) fn with_proof(before: Option<&SourceFacts>, fresh: SourceFacts) -> SourceFacts {
    SourceFacts { same_tail: before.and_then(|before| before.same_tail), ..fresh }
}

/// The source's facts, or why it gives none.
pub(super) fn facts(answer: Result<PeerAnswer, String>) -> Result<SourceFacts, String> {
    match answer {
        Ok(PeerAnswer::Prepared { source, .. }) => Ok(source),
        Ok(PeerAnswer::Refused { why }) | Err(why) => Err(why),
        Ok(_) => Err("it gave an answer to another question".to_owned()),
    }
}
