//! The stage: the lab, the story of what was done to it, and what a person does to mend it.
//!
//! **Invariant:** everything done has a deadline; a command that hangs on a frozen node hangs until the mending
//! thaws it.

use super::plan::{Action, Ask, Who};
use crate::harness::Lab;
use crate::harness::host::is_alive;
use crate::harness::node::{Node, PEER_PORT, Said, text_at};
use crate::harness::sys::{Fail, Outcome, millis, ms, now, pause, secs, wait_until};
use crate::harness::witness::SERVICE;
use portcullis::base::time::{Duration, Instant};
use rustix::process::Signal;
use serde_json::Value;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

/// Print each line of a story as it happens too.
pub static TELL_LIVE: AtomicBool = AtomicBool::new(false);

pub struct Stage<'lab> {
    pub lab: &'lab Lab,
    pub start: Instant,
    story: Mutex<Vec<String>>,
    /// What is wrong whatever the clients saw.
    wrong: Mutex<Vec<String>>,
    /// A promote with accepted loss may have taken effect; ends at the last promote after it.
    loss_accepted: Mutex<Option<Instant>>,
    dns_down: AtomicBool,
    edited: AtomicBool,
}

/// How the pair came to serve again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Recovery {
    ByItself,
    Promoted,
    LossAccepted,
}

/// A pair that is whole serves again by itself within this; then the operator acts.
const BY_ITSELF: Duration = secs(8);
/// How often an operator types `rejoin` before giving up.
const REJOINS: u32 = 6;

impl<'lab> Stage<'lab> {
    pub fn new(lab: &'lab Lab) -> Stage<'lab> {
        Stage {
            lab,
            start: now(),
            story: Mutex::default(),
            wrong: Mutex::default(),
            loss_accepted: Mutex::default(),
            dns_down: AtomicBool::new(false),
            edited: AtomicBool::new(false),
        }
    }

    pub fn node(&self, who: Who) -> &Node {
        self.lab.nodes()[who & 1]
    }

    pub fn tell(&self, text: &str) {
        let line = format!("{:7.3} s  {}", now().since(self.start).as_secs_f64(), text.trim_end());
        if TELL_LIVE.load(Ordering::Relaxed) {
            println!("  {line}");
        }
        self.story.lock().unwrap_or_else(PoisonError::into_inner).push(line);
    }

    pub fn blame(&self, text: String) {
        self.tell(&format!("VIOLATION: {text}"));
        self.wrong.lock().unwrap_or_else(PoisonError::into_inner).push(text);
    }

    pub fn story(&self) -> String {
        self.story.lock().unwrap_or_else(PoisonError::into_inner).join("\n")
    }

    pub fn wrong(&self) -> Vec<String> {
        self.wrong.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// What was acknowledged before this may be missing: a person said so.
    pub fn loss_accepted_until(&self) -> Option<Instant> {
        *self.loss_accepted.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Does it and writes down that it did; a fault that cannot be made (no power, no daemon) is only written down.
    pub fn perform(&self, action: Action) {
        self.tell(&action.to_string());
        if let Err(error) = self.act(action) {
            self.tell(&format!("  {action}: {error}"));
        }
    }

    fn act(&self, action: Action) -> Outcome {
        use Action::*;
        let (switch, dns) = (&self.lab.switch, &self.lab.witness);
        let [a, b] = [&self.lab.a.host.plug, &self.lab.b.host.plug];
        match action {
            CutWire => switch.cut_between(a, b),
            CutWireFrom(0) => switch.cut_from(a, b),
            CutWireFrom(_) => switch.cut_from(b, a),
            CutPeerChannel => switch.cut_port_between(a, b, PEER_PORT),
            CutOff(n) => {
                switch.cut_between(a, b)?;
                switch.cut_between(&self.node(n).host.plug, &dns.host.plug)
            }
            CutDns(n) => switch.cut_between(&self.node(n).host.plug, &dns.host.plug),
            CutDnsBoth => {
                switch.cut_between(a, &dns.host.plug)?;
                switch.cut_between(b, &dns.host.plug)
            }
            Heal => switch.heal(),
            Freeze(n) => self.node(n).host.freeze().map(drop),
            Thaw(n) => self.node(n).host.thaw().map(drop),
            KillDaemon(n) => self.node(n).kill_daemon(Signal::KILL).map(drop),
            RestartDaemon(n) => {
                self.node(n).stop_daemon()?;
                self.node(n).start_daemon()
            }
            StartDaemon(n) => self.node(n).start_daemon(),
            PowerOff(n) => self.node(n).power_off().map(drop),
            Boot(n) => self.node(n).boot().map(|allowed| self.tell(&format!("  may-start-primary: {allowed}"))),
            KillDns => self.kill_dns(),
            StartDns => self.start_dns(),
            RestartDns => {
                self.kill_dns()?;
                self.start_dns()
            }
            EditTo(n) => {
                self.edited.store(true, Ordering::Relaxed);
                dns.move_record_to(self.node(n).address())
            }
            EditAway => {
                self.edited.store(true, Ordering::Relaxed);
                dns.nsupdate(&format!("update delete {SERVICE} A"))
            }
            EditBack => self.put_record_back(),
            Promote(n, ask) => self.promote(n, ask).map(drop),
            Switchover(n, to) => {
                let said = self.node(n).cli(&["switchover", "--to", self.node(to).name()])?;
                self.quote(n, &said);
                Ok(())
            }
        }
    }

    /// A promote; what it may lose with permission is remembered.
    pub fn promote(&self, who: Who, ask: Ask) -> Outcome<Said> {
        let (node, peer) = (self.node(who), self.node(1 - who));
        let mut words = vec!["promote", "--yes"];
        match ask {
            Ask::AcceptLoss => words.push("--accept-data-loss"),
            // The operator does not lie.
            Ask::PeerIsOff if !peer.host.has_power() => words.extend(["--peer-is-off", peer.name()]),
            Ask::PeerIsOff | Ask::Plain => {}
        }
        let said = node.cli(&words);
        {
            let mut accepted = self.loss_accepted.lock().unwrap_or_else(PoisonError::into_inner);
            let may_count = said.as_ref().is_ok_and(|said| said.code != 3 && said.code != 1);
            if accepted.is_some() || (ask == Ask::AcceptLoss && may_count) {
                *accepted = Some(now());
            }
        }
        let said = said?;
        self.quote(who, &said);
        Ok(said)
    }

    pub fn quote(&self, who: Who, said: &Said) {
        let text = format!("{}{}", said.out, said.err);
        let last: Vec<&str> = text.lines().rev().take(3).collect();
        let last: Vec<&str> = last.into_iter().rev().collect();
        self.tell(&format!(
            "  {}$ {} ended with {} after {} ms: {}",
            self.node(who).name(),
            said.line,
            said.code,
            ms(said.started, said.ended),
            last.join(" / ")
        ));
    }

    fn kill_dns(&self) -> Outcome {
        self.lab.witness.kill()?;
        self.dns_down.store(true, Ordering::Relaxed);
        Ok(())
    }

    fn start_dns(&self) -> Outcome {
        self.lab.witness.start()?;
        self.dns_down.store(false, Ordering::Relaxed);
        Ok(())
    }

    /// The address that the marker names, as the person who edited would put it back.
    fn put_record_back(&self) -> Outcome {
        let marker = self.lab.witness.marker()?.ok_or("no marker")?;
        let active = self.named(&marker).ok_or_else(|| format!("the marker names nobody: {marker}"))?;
        self.lab.witness.move_record_to(self.node(active).address())?;
        self.edited.store(false, Ordering::Relaxed);
        Ok(())
    }

    /// The node that a marker's text names as active.
    pub fn named(&self, marker: &str) -> Option<Who> {
        let name = marker.split_whitespace().find_map(|word| word.strip_prefix("active="))?;
        self.lab.nodes().iter().position(|node| node.name() == name)
    }

    /// Everything that the schedule broke, whole again; nobody is promoted.
    pub fn mend(&self) -> Outcome {
        self.tell("mending everything");
        self.lab.switch.heal()?;
        if self.dns_down.load(Ordering::Relaxed) {
            self.start_dns()?;
        }
        std::thread::scope(|scope| {
            let boots: Vec<_> = [0, 1].map(|who| scope.spawn(move || self.mend_node(who))).into_iter().collect();
            boots.into_iter().try_for_each(|boot| boot.join().unwrap_or_else(|_| Err("mending panicked".into())))
        })?;
        if self.edited.load(Ordering::Relaxed) {
            self.put_record_back()?;
        }
        Ok(())
    }

    fn mend_node(&self, who: Who) -> Outcome {
        let node = self.node(who);
        if !node.host.has_power() {
            let allowed = node.boot()?;
            self.tell(&format!("booted {}; may-start-primary: {allowed}", node.name()));
            return Ok(());
        }
        node.host.thaw()?;
        match node.daemon_pid() {
            Ok(pid) if is_alive(pid) => Ok(()),
            Ok(_) => {
                self.blame(format!("the daemon on {} ended by itself", node.name()));
                node.start_daemon()
            }
            Err(_) => node.start_daemon(),
        }
    }

    /// The one node whose gate is open, if there is one.
    pub fn serving(&self) -> Option<Who> {
        let open = |who: Who| {
            self.node(who).status().is_ok_and(|status| {
                text_at(&status, "/role") == "active" && status.pointer("/gate/open") == Some(&Value::Bool(true))
            })
        };
        match (open(0), open(1)) {
            (true, false) => Some(0),
            (false, true) => Some(1),
            _ => None,
        }
    }

    /// Waits for the pair to serve by itself, then does what an operator would: promote, on the node that the marker
    /// names, then on the other, at last with loss accepted.
    pub fn bring_to_serve(&self) -> Outcome<(Who, Recovery)> {
        if let Ok(who) = self.wait_serving(BY_ITSELF) {
            return Ok((who, Recovery::ByItself));
        }
        for ask in [Ask::Plain, Ask::Plain, Ask::AcceptLoss, Ask::AcceptLoss] {
            let marker = self.lab.witness.marker().ok().flatten().unwrap_or_default();
            let first = self.named(&marker).unwrap_or(0);
            for who in [first, 1 - first] {
                self.start_stopped_postgres();
                self.tell(&format!("operator on {}: promote {ask:?}", self.node(who).name()));
                let _ = self.promote(who, ask);
                if let Ok(who) = self.wait_serving(secs(3)) {
                    let accepted = ask == Ask::AcceptLoss;
                    return Ok((who, if accepted { Recovery::LossAccepted } else { Recovery::Promoted }));
                }
            }
        }
        Err(Fail("after everything was mended, no node could be brought to serve".to_owned()))
    }

    fn wait_serving(&self, deadline: Duration) -> Outcome<Who> {
        let mut found = None;
        wait_until(deadline, "one node to serve", || {
            let (before, first) = (found, self.serving());
            found = first;
            // Twice in a row: not the last breath of one that is about to be cut.
            if before.is_none() || before != first {
                pause(millis(300));
                return Ok(false);
            }
            Ok(true)
        })?;
        found.ok_or_else(|| Fail("nobody serves".to_owned()))
    }

    /// `systemctl start postgresql`, where `may-start-primary` had said no before.
    fn start_stopped_postgres(&self) {
        for node in self.lab.nodes() {
            if node.postgres.sql("postgres", "SELECT 1").is_err() {
                let outcome = node.start_postgres_as_the_unit_does();
                self.tell(&format!("started the PostgreSQL unit on {}: {outcome:?}", node.name()));
            }
        }
    }

    /// The pair whole again: the other node a standby that commits wait for. Returns whether it had to be cloned.
    pub fn restore(&self, active: Who) -> Outcome<bool> {
        let (serving, other) = (self.node(active), self.node(1 - active));
        if other.role().is_ok_and(|role| role != "fenced") && serving.wait_in_sync(secs(6)).is_ok() {
            return Ok(false);
        }
        let mut last = Fail(String::new());
        for _ in 0..REJOINS {
            let said = serving.cli(&["rejoin", other.name()])?;
            self.quote(active, &said);
            match said.expect(0).and_then(|_| serving.wait_in_sync(secs(20))) {
                Ok(_) => return Ok(true),
                Err(error) => last = error,
            }
            // "Try again in a few seconds", as it says itself while the record is being changed.
            pause(secs(2));
        }
        Err(Fail(format!("{} cannot be rejoined: {last}", other.name())))
    }
}
