//! The VIP as the guard wants it: probed, bound with what is left of the lease, renewed with it, announced; obeyed
//! when an operator takes it away; a conflict is never defended.

use super::{Guard, RENEW_EVERY};
use crate::base::ids::Epoch;
use crate::base::time::{Duration, Instant};
use crate::engine::setup::Mode;
use crate::engine::turn::{Effect, Event, Now};
use crate::wire::arp::kernel_lifetime;
use std::collections::BTreeMap;
use std::net::IpAddr;

/// How much before its kernel lifetime a removal must come to count as somebody's deed.
const EXPIRY_SLACK: Duration = Duration::from_millis(400);
/// How long after a conflict or a failed bind the address is probed again.
const PROBE_AGAIN: Duration = Duration::from_secs(1);
/// Beyond one poll, how long nobody may claim the address before it is probed again.
const CLAIM_QUIET: Duration = Duration::from_millis(300);
/// A hand that has not answered for so long has lost the question.
const HAND_LIMIT: Duration = Duration::from_secs(3);
/// The kernel's word of our own removal may come so late.
const OWN_REMOVAL: Duration = Duration::from_secs(1);
/// When, after binding, it is announced: a burst at once, and again over 5 s: one lost frame costs a client 45 s.
const ANNOUNCE_AFTER: [Duration; 6] = [
    Duration::from_millis(0),
    Duration::from_millis(500),
    Duration::from_millis(1000),
    Duration::from_millis(2000),
    Duration::from_millis(3500),
    Duration::from_millis(5000),
];
/// And then at least once a minute.
const ANNOUNCE_EVERY: Duration = Duration::from_secs(60);

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Phase {
    Unbound,
    Probing,
    Binding,
    Bound,
}

/// One VIP.
#[derive(Debug, Clone, Hash)]
pub(super) struct VipMemory {
    pub(super) address: IpAddr,
    phase: Phase,
    /// MAC of somebody else who claims it.
    pub(super) conflict: Option<String>,
    /// Only shown: the MAC of our own interface, and of who last announced the address while it was not ours.
    pub(super) own_mac: Option<String>,
    pub(super) holder_mac: Option<String>,
    /// Removed by an operator: not bound again by habit.
    pub(super) obeyed: bool,
    expires: Instant,
    set_at: Instant,
    probe_from: Instant,
    announced: usize,
    announce_at: Instant,
    /// From when the schedule counts: bound, the carrier back, or a stall over.
    announce_from: Instant,
    error: Option<String>,
    /// When this phase began, and when we last took the address off ourselves.
    since: Instant,
    unbound_at: Instant,
}

/// The VIP's witnesses as remembered (R3).
#[derive(Debug, Clone, Hash, Default)]
pub(super) struct NeighbourMemory {
    questions: BTreeMap<u64, (Instant, IpAddr, Epoch)>,
    pub(super) asked: Option<Instant>,
    pub(super) witness: Option<IpAddr>,
    /// The last question was answered by nobody, or by somebody else too.
    pub(super) error: Option<String>,
}

impl VipMemory {
    pub(super) fn new(address: IpAddr) -> VipMemory {
        VipMemory {
            address,
            phase: Phase::Unbound,
            conflict: None,
            own_mac: None,
            holder_mac: None,
            obeyed: false,
            expires: Instant::ZERO,
            set_at: Instant::ZERO,
            probe_from: Instant::ZERO,
            announced: 0,
            announce_at: Instant::ZERO,
            announce_from: Instant::ZERO,
            error: None,
            since: Instant::ZERO,
            unbound_at: Instant::ZERO,
        }
    }

    pub(super) fn is_bound(&self) -> bool {
        self.phase == Phase::Bound
    }

    /// The whole schedule from the start.
    fn announce(&mut self, now: Instant) {
        self.announced = 0;
        self.announce_from = now;
        self.announce_at = now;
    }

    /// (Re)sets the kernel lifetime to what the lease leaves.
    fn set(&mut self, now: Instant, until: Instant, fx: &mut Vec<Effect>) -> bool {
        let Some(seconds) = kernel_lifetime(until.since(now)) else { return false };
        self.set_at = now;
        self.expires = now + Duration::from_secs(u64::from(seconds));
        fx.push(Effect::BindVip { address: self.address, seconds });
        true
    }
}

impl Guard {
    /// Moves every VIP towards bound; true when all are.
    pub(super) fn vips_ready(&mut self, now: Now, until: Instant, fx: &mut Vec<Effect>) -> bool {
        let now = now.boot;
        let mut ready = true;
        for vip in &mut self.vips {
            match vip.phase {
                Phase::Unbound => {
                    ready = false;
                    if self.link_up && !vip.obeyed && now >= vip.probe_from {
                        vip.phase = Phase::Probing;
                        vip.since = now;
                        fx.push(Effect::ProbeVip { address: vip.address });
                    }
                }
                Phase::Probing | Phase::Binding => {
                    ready = false;
                    if now >= vip.since + HAND_LIMIT {
                        vip.phase = Phase::Unbound;
                    }
                }
                Phase::Bound => {
                    if now >= vip.set_at + RENEW_EVERY {
                        vip.set(now, until, fx);
                    }
                    if now >= vip.announce_at {
                        fx.push(Effect::AnnounceVip { address: vip.address, burst: vip.announced == 0 });
                        vip.announced += 1;
                        vip.announce_at = match ANNOUNCE_AFTER.get(vip.announced) {
                            Some(after) => vip.announce_from + *after,
                            None => now + ANNOUNCE_EVERY,
                        };
                    }
                }
            }
        }
        ready && self.link_up
    }

    /// Takes every VIP off.
    pub(super) fn unbind_vips(&mut self, fx: &mut Vec<Effect>) {
        let now = self.at.boot;
        for vip in &mut self.vips {
            if vip.phase != Phase::Unbound {
                vip.phase = Phase::Unbound;
                vip.unbound_at = now;
                fx.push(Effect::UnbindVip { address: vip.address });
            }
        }
    }

    /// Why the VIP keeps the gate shut.
    pub(super) fn vip_reason(&self) -> String {
        if !self.link_up {
            return "the link of the VIP's interface is down".to_owned();
        }
        for vip in &self.vips {
            if let Some(mac) = &vip.conflict {
                return format!("the VIP {} is claimed by {mac}", vip.address);
            }
            if vip.obeyed {
                return format!(
                    "the VIP {} was removed by hand; `portcullis promote` on this node binds it again",
                    vip.address
                );
            }
            if let Some(why) = &vip.error {
                return format!("the VIP {} is not bound: {why}", vip.address);
            }
        }
        "the VIP is being bound".to_owned()
    }

    /// A person wants this node to serve (promote, unfence): what was obeyed before is over.
    pub(super) fn forget_obedience(&mut self) {
        for vip in &mut self.vips {
            vip.obeyed = false;
            vip.probe_from = Instant::ZERO;
        }
    }

    pub(super) fn on_vip(&mut self, now: Now, event: Event, fx: &mut Vec<Effect>) {
        let until = self.lease_deadline();
        match event {
            Event::VipProbed { address, claimed_by } => {
                let Some(vip) = self.vips.iter_mut().find(|v| v.address == address && v.phase == Phase::Probing) else {
                    return;
                };
                let news = vip.conflict != claimed_by;
                vip.conflict = claimed_by.clone();
                match claimed_by {
                    None if vip.set(now.boot, until, fx) => {
                        vip.phase = Phase::Binding;
                        vip.since = now.boot;
                    }
                    None => vip.phase = Phase::Unbound,
                    Some(mac) => {
                        vip.phase = Phase::Unbound;
                        vip.probe_from = now.boot + PROBE_AGAIN;
                        if news {
                            self.note(now, fx, "vip_conflict", format!("{mac} answers for the VIP {address}"));
                        }
                    }
                }
            }
            Event::VipBound { address } => {
                let Some(vip) = self.vips.iter_mut().find(|v| v.address == address && v.phase == Phase::Binding) else {
                    return;
                };
                vip.phase = Phase::Bound;
                vip.error = None;
                vip.announce(now.boot);
                self.note(now, fx, "vip_bound", format!("the VIP {address} is bound"));
            }
            Event::VipBindFailed { address, why } => {
                if let Some(vip) = self.vips.iter_mut().find(|v| v.address == address && v.phase != Phase::Unbound) {
                    vip.phase = Phase::Unbound;
                    vip.probe_from = now.boot + PROBE_AGAIN;
                    vip.error = Some(why.clone());
                    self.note(now, fx, "vip_failed", format!("the VIP {address} cannot be bound: {why}"));
                }
            }
            Event::VipRemoved { address } | Event::VipIs { address, bound: false } => {
                self.on_vip_gone(now, address, fx)
            }
            Event::VipFound { address, mac } => {
                if let Some(vip) = self.vips.iter_mut().find(|v| v.address == address) {
                    vip.own_mac = Some(mac);
                }
            }
            Event::ForeignClaim { address, mac } => {
                // Longer than a holder keeps silent (it asks its witnesses once a poll): one that does not hear our
                // probe (a one-way partition) must not look like nobody.
                let quiet = now.boot + self.setup.poll + CLAIM_QUIET;
                let Some(vip) = self.vips.iter_mut().find(|v| v.address == address) else { return };
                // Where both let go at a heal, nobody claims any more, and one second is enough.
                let again = if vip.is_bound() { now.boot + PROBE_AGAIN } else { quiet };
                vip.probe_from = vip.probe_from.max(again);
                if vip.phase == Phase::Unbound {
                    // It is not ours: this is how its holder is seen.
                    vip.holder_mac = Some(mac);
                    return;
                }
                let news = vip.conflict.as_ref() != Some(&mac);
                vip.conflict = Some(mac.clone());
                // A bind under way is undone as well, whatever the hand answers later.
                let taken_off = vip.phase != Phase::Probing;
                vip.phase = Phase::Unbound;
                if taken_off {
                    vip.unbound_at = now.boot;
                    fx.push(Effect::UnbindVip { address });
                }
                if taken_off || news {
                    self.note(now, fx, "vip_conflict", format!("{mac} claims the VIP {address}; it is not defended"));
                }
            }
            Event::LinkDown => self.link_up = false,
            Event::LinkUp => {
                self.link_up = true;
                self.announce_anew(now);
            }
            _ => {}
        }
    }

    /// The carrier came back, or this node stood still: neighbours may have learnt something else, so every bound VIP
    /// is announced as when it was bound.
    pub(super) fn announce_anew(&mut self, now: Now) {
        for vip in self.vips.iter_mut().filter(|vip| vip.phase == Phase::Bound) {
            vip.announce(now.boot);
        }
    }

    /// VIP only (R3): the witnesses of every bound VIP are asked, from the VIP.
    pub(super) fn ask_neighbours(&mut self, now: Now, fx: &mut Vec<Effect>) {
        if self.setup.mode != Mode::VipOnly || !self.durable.is_holder() || self.fenced().is_some() {
            return;
        }
        let bound: Vec<IpAddr> = self.vips.iter().filter(|vip| vip.is_bound()).map(|vip| vip.address).collect();
        for address in bound {
            let question = self.id();
            self.neighbours.questions.insert(question, (now.boot, address, self.durable.complete));
            let limit = self.setup.poll;
            fx.push(Effect::AskNeighbour { question, address, limit });
        }
    }

    /// ARP only ever prolongs a lease that has not run out, of the epoch it was asked for, on a VIP that stayed bound.
    pub(super) fn on_neighbour(&mut self, now: Now, question: u64, answer: Result<IpAddr, String>) {
        let Some((asked, address, epoch)) = self.neighbours.questions.remove(&question) else { return };
        let stands = epoch == self.durable.complete
            && self.durable.is_holder()
            && self.fenced().is_none()
            && asked >= self.proofs_from
            && self.vips.iter().any(|vip| vip.address == address && vip.is_bound() && vip.announce_from <= asked);
        self.neighbours.asked = self.neighbours.asked.max(Some(asked));
        match answer {
            Ok(witness) => {
                self.neighbours.error = None;
                self.neighbours.witness = Some(witness);
                if stands && self.proofs.neighboured(asked, now.boot, self.lease()) {
                    self.counters.neighbour_proofs += 1;
                }
            }
            Err(why) => self.neighbours.error = Some(why),
        }
    }

    fn on_vip_gone(&mut self, now: Now, address: IpAddr, fx: &mut Vec<Effect>) {
        let Some(vip) = self.vips.iter_mut().find(|v| v.address == address && v.phase == Phase::Bound) else { return };
        vip.phase = Phase::Unbound;
        let own = now.boot < vip.unbound_at + OWN_REMOVAL;
        if now.boot + EXPIRY_SLACK < vip.expires && !own {
            vip.obeyed = true;
            self.note(
                now,
                fx,
                "vip_removed",
                format!("somebody removed the VIP {address}; it stays off until promote"),
            );
        } else {
            vip.error = Some("nothing renewed it: its kernel lifetime ran out".to_owned());
            self.note(now, fx, "vip_expired", format!("the VIP {address} is gone: its kernel lifetime ran out"));
        }
    }
}
