//! The marker: the TXT record beside the service's address that says whose epoch it is (design.md section 4).
//! One string of `key=value` words separated by single spaces.

use crate::base::ids::{Epoch, NodeName, SystemId, TimelineId};
use std::time::Duration;

/// What the marker says. Unknown words are kept out but do not make it unreadable (a newer version may add some).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Marker {
    pub epoch: Epoch,
    /// Rises with every update, so that a late one never lands on a value that came back.
    pub seq: u64,
    pub active: NodeName,
    /// The synchronous standby, or `None` (written `none`) while the active node is alone.
    pub sync: Option<NodeName>,
    pub timeline: TimelineId,
    /// Milliseconds on the wire.
    pub lease: Duration,
    pub sysid: SystemId,
    /// The kernel boot_id of the active node.
    pub boot: String,
    /// RFC 3339 with whole seconds, UTC: when `sync` or `active` last changed.
    pub since: String,
    /// `loss=1`: written by a takeover that accepted loss, until its first opening.
    pub loss: bool,
}

impl std::fmt::Display for Marker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "stub {}", self.epoch)
    }
}
impl std::str::FromStr for Marker {
    type Err = String;
    fn from_str(_: &str) -> Result<Marker, String> {
        Err("stub".into())
    }
}
