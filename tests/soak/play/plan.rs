//! A seeded schedule of faults and commands. The same seed gives the same schedule; what two cores make of it differs a
//! little from run to run, so a failing seed is repeated more than once.

use crate::harness::sys::millis;
use portcullis::base::time::Duration;
use std::fmt;

/// SplitMix64: small, and the same on every machine for ever.
#[derive(Debug, Clone)]
pub struct Rng(u64);

impl Rng {
    pub fn new(seed: u64) -> Rng {
        Rng(seed)
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// Evenly below `bound`, which is small.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound.max(1)
    }
}

/// Index of a node: 0 is `a`, 1 is `b`.
pub type Who = usize;

/// How a promote is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ask {
    Plain,
    AcceptLoss,
    /// Says that the peer is off; said only while that is so.
    PeerIsOff,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// All traffic between the nodes, both ways.
    CutWire,
    /// All traffic from this node to the other.
    CutWireFrom(Who),
    /// The peer channel alone: replication goes on.
    CutPeerChannel,
    /// This node from the other and from DNS; its own clients stay.
    CutOff(Who),
    /// Between this node and the DNS server.
    CutDns(Who),
    CutDnsBoth,
    /// Undoes every cut.
    Heal,
    Freeze(Who),
    Thaw(Who),
    KillDaemon(Who),
    RestartDaemon(Who),
    StartDaemon(Who),
    PowerOff(Who),
    Boot(Who),
    KillDns,
    StartDns,
    RestartDns,
    /// A person points the record at this node's address.
    EditTo(Who),
    /// A person takes the address away.
    EditAway,
    /// A person puts back what the marker says.
    EditBack,
    Promote(Who, Ask),
    /// Asked on this node, to the other or to itself.
    Switchover(Who, Who),
}

const NAMES: [&str; 2] = ["a", "b"];

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        use Action::*;
        match *self {
            CutWire => write!(f, "cut the wire between a and b"),
            CutWireFrom(n) => write!(f, "cut the wire from {} to {}", NAMES[n], NAMES[1 - n]),
            CutPeerChannel => write!(f, "cut the peer channel"),
            CutOff(n) => write!(f, "cut {} off from everybody", NAMES[n]),
            CutDns(n) => write!(f, "cut {} from DNS", NAMES[n]),
            CutDnsBoth => write!(f, "cut both from DNS"),
            Heal => write!(f, "heal every wire"),
            Freeze(n) => write!(f, "freeze {}", NAMES[n]),
            Thaw(n) => write!(f, "thaw {}", NAMES[n]),
            KillDaemon(n) => write!(f, "kill -9 the daemon on {}", NAMES[n]),
            RestartDaemon(n) => write!(f, "restart the daemon on {}", NAMES[n]),
            StartDaemon(n) => write!(f, "start the daemon on {}", NAMES[n]),
            PowerOff(n) => write!(f, "pull the plug of {}", NAMES[n]),
            Boot(n) => write!(f, "boot {}", NAMES[n]),
            KillDns => write!(f, "kill -9 the DNS server"),
            StartDns => write!(f, "start the DNS server"),
            RestartDns => write!(f, "kill -9 the DNS server and start it"),
            EditTo(n) => write!(f, "edit the record to {}", NAMES[n]),
            EditAway => write!(f, "delete the address by hand"),
            EditBack => write!(f, "put the record back"),
            Promote(n, Ask::Plain) => write!(f, "{}$ promote --yes", NAMES[n]),
            Promote(n, Ask::AcceptLoss) => write!(f, "{}$ promote --yes --accept-data-loss", NAMES[n]),
            Promote(n, Ask::PeerIsOff) => write!(f, "{}$ promote --yes --peer-is-off {}", NAMES[n], NAMES[1 - n]),
            Switchover(n, to) => write!(f, "{}$ switchover --to {}", NAMES[n], NAMES[to]),
        }
    }
}

impl Action {
    /// The same with the nodes' places changed when `first` is 1: node 0 of a schedule is the one that serves when it
    /// begins, so that a seed means the same on a fresh pair and on one that was used.
    pub fn seen_from(self, first: Who) -> Action {
        use Action::*;
        match self {
            CutWireFrom(n) => CutWireFrom(n ^ first),
            CutOff(n) => CutOff(n ^ first),
            CutDns(n) => CutDns(n ^ first),
            Freeze(n) => Freeze(n ^ first),
            Thaw(n) => Thaw(n ^ first),
            KillDaemon(n) => KillDaemon(n ^ first),
            RestartDaemon(n) => RestartDaemon(n ^ first),
            StartDaemon(n) => StartDaemon(n ^ first),
            PowerOff(n) => PowerOff(n ^ first),
            Boot(n) => Boot(n ^ first),
            EditTo(n) => EditTo(n ^ first),
            Promote(n, ask) => Promote(n ^ first, ask),
            Switchover(n, to) => Switchover(n ^ first, to ^ first),
            CutWire | CutPeerChannel | CutDnsBoth | Heal | KillDns | StartDns | RestartDns | EditAway | EditBack => {
                self
            }
        }
    }
}

/// What the schedule has broken so far.
#[derive(Debug, Clone, Default)]
struct Broken {
    off: [bool; 2],
    frozen: [bool; 2],
    no_daemon: [bool; 2],
    cuts: bool,
    dns: bool,
    edited: bool,
}

/// One step: when it is due, counted from the start of the run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Step {
    pub due: Duration,
    pub action: Action,
}

/// Five to ten actions over fifteen to twenty-five seconds.
pub fn plan(seed: u64) -> Vec<Step> {
    let mut rng = Rng::new(seed);
    let count = 5 + rng.below(6);
    let length = 15_000 + rng.below(10_001);
    let mut broken = Broken::default();
    let mut due = 500 + rng.below(1000);
    let mut steps = Vec::new();
    let mut follows = None;
    for _ in 0..count {
        let menu = menu(&broken);
        let total: u64 = menu.iter().map(|(weight, _)| weight).sum();
        let mut at = rng.below(total);
        let chosen = menu.iter().find(|(weight, _)| {
            let here = at < *weight;
            at = at.saturating_sub(*weight);
            here
        });
        let answer = follows.take();
        let Some(action) = answer.or(chosen.map(|(_, action)| *action)) else { continue };
        apply(&mut broken, action);
        steps.push(Step { due: millis(due), action });
        follows = operator(&broken, action).filter(|_| rng.below(3) > 0);
        // Half of the gaps are short: two things at once are what nobody thought of.
        let mean = length / count;
        due += if follows.is_some() || rng.below(2) == 0 { rng.below(400) } else { rng.below(3 * mean) };
        due = due.min(length);
    }
    steps
}

/// What a hasty operator does about it, while the lease of the node that fell silent may still run.
fn operator(broken: &Broken, action: Action) -> Option<Action> {
    use Action::*;
    let (CutOff(silent) | Freeze(silent) | PowerOff(silent) | KillDaemon(silent)) = action else { return None };
    let other = 1 - silent;
    let well = !broken.off[other] && !broken.frozen[other] && !broken.no_daemon[other];
    well.then_some(Promote(other, Ask::Plain))
}

/// What may come next and how likely it is. A broken thing is mended more often than another is broken.
fn menu(broken: &Broken) -> Vec<(u64, Action)> {
    use Action::*;
    let mut menu = vec![
        (2, CutWire),
        (2, CutPeerChannel),
        (2, CutDnsBoth),
        (if broken.cuts { 8 } else { 0 }, Heal),
        (if broken.dns { 0 } else { 2 }, KillDns),
        (if broken.dns { 6 } else { 0 }, StartDns),
        (if broken.dns { 0 } else { 2 }, RestartDns),
        (if broken.dns || broken.edited { 0 } else { 1 }, EditAway),
        (if broken.edited && !broken.dns { 8 } else { 0 }, EditBack),
    ];
    for n in 0..2 {
        let (off, frozen, no_daemon) = (broken.off[n], broken.frozen[n], broken.no_daemon[n]);
        let well = !off && !frozen;
        let when = |condition: bool, weight: u64| if condition { weight } else { 0 };
        menu.extend([
            (1, CutWireFrom(n)),
            (4, CutOff(n)),
            (2, CutDns(n)),
            (when(!broken.dns && !broken.edited, 1), EditTo(n)),
            (when(well, 3), Freeze(n)),
            (when(frozen, 10), Thaw(n)),
            (when(!off && !no_daemon, 2), KillDaemon(n)),
            (when(well && !no_daemon, 2), RestartDaemon(n)),
            (when(!off && no_daemon, 8), StartDaemon(n)),
            (when(!off, 2), PowerOff(n)),
            (when(off, 8), Boot(n)),
            (when(well && !no_daemon, 10), Promote(n, Ask::Plain)),
            (when(well && !no_daemon, 1), Promote(n, Ask::AcceptLoss)),
            (when(well && !no_daemon && broken.off[1 - n], 3), Promote(n, Ask::PeerIsOff)),
            (when(well && !no_daemon, 2), Switchover(n, n)),
            (when(well && !no_daemon, 1), Switchover(n, 1 - n)),
        ]);
    }
    menu.retain(|(weight, _)| *weight > 0);
    menu
}

fn apply(broken: &mut Broken, action: Action) {
    use Action::*;
    match action {
        CutWire | CutWireFrom(_) | CutPeerChannel | CutOff(_) | CutDns(_) | CutDnsBoth => broken.cuts = true,
        Heal => broken.cuts = false,
        Freeze(n) => broken.frozen[n] = true,
        Thaw(n) => broken.frozen[n] = false,
        KillDaemon(n) => broken.no_daemon[n] = true,
        StartDaemon(n) => broken.no_daemon[n] = false,
        PowerOff(n) => (broken.off[n], broken.frozen[n], broken.no_daemon[n]) = (true, false, false),
        Boot(n) => broken.off[n] = false,
        KillDns => broken.dns = true,
        StartDns => broken.dns = false,
        EditTo(_) | EditAway => broken.edited = true,
        EditBack => broken.edited = false,
        RestartDaemon(_) | RestartDns | Promote(..) | Switchover(..) => {}
    }
}
