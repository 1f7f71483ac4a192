//! Claim C5: every way in which DNS can fail, and what the gate makes of it, measured at a client. One pair of daemons
//! goes through all rows of a table; a relay between them and the real server makes most of the faults.
//!
//! "Silent" faults prove nothing: while the peer vouches the gate stays open, and without it the lease runs out, dated
//! from the last question that was answered. "Nothing" cuts within one poll and never fences. Both end by themselves.

use crate::claims::{CUT_MS, LAST_ACK_MS, LEASE_MS, last_cut};
use crate::ensure;
use crate::harness::Lab;
use crate::harness::client::{Target, Writer, WriterOptions};
use crate::harness::config::Options;
use crate::harness::dns_relay::{DnsFault, DnsRelay};
use crate::harness::node::{PEER_PORT, STATUS_PORT, http_here, text_at};
use crate::harness::postgres::Template;
use crate::harness::sys::{Fail, Outcome, millis, ms, never, now, pause, secs, wait_until};
use crate::harness::watch::Watcher;
use crate::in_lab;
use hickory_proto::op::ResponseCode;
use portcullis::base::time::Instant;
use serde_json::Value;
use std::net::SocketAddr;

/// Faults after which the daemon knows no more than before, and a word of what it says then.
const SILENT: [(&str, DnsFault, &str); 14] = [
    ("no answer", DnsFault::Drop, "did not answer"),
    ("SERVFAIL, unsigned", DnsFault::Code(ResponseCode::ServFail), "SERVFAIL"),
    ("REFUSED, unsigned", DnsFault::Code(ResponseCode::Refused), "REFUSED"),
    ("NXDOMAIN, unsigned", DnsFault::Code(ResponseCode::NXDomain), "not signed"),
    ("signature stripped", DnsFault::StripSignature, "not signed"),
    ("MAC corrupted", DnsFault::CorruptMac, "signature is wrong"),
    ("forged, unsigned: \"b at epoch 99\"", DnsFault::ForgeUnsigned, "not signed"),
    ("forged, signed with another secret", DnsFault::ForgeSigned, "signature is wrong"),
    ("a signed answer to another question", DnsFault::OtherQuestion, "did not answer"),
    ("an answer with another id", DnsFault::OtherId, "did not answer"),
    ("answers 2.5 s late", DnsFault::Delay(millis(2500)), "did not answer"),
    ("an older answer replayed", DnsFault::Replay, "signature is wrong"),
    ("signed by a clock 400 s ahead", DnsFault::ServerClock(400), "differ by"),
    ("our clock an hour back: BADTIME", DnsFault::ClientClock(-3600), "BadTime"),
];

/// Faults for which a short outage is tried as well: one of each way to fail (late, at once, after verification).
const SHORT_TOO: [DnsFault; 4] =
    [DnsFault::Drop, DnsFault::Code(ResponseCode::ServFail), DnsFault::StripSignature, DnsFault::Replay];

/// Shorter than lease - poll - poll/4 = 1750 ms (while the lease runs on an old proof, questions go out every poll/4),
/// by what a busy machine needs to end it and to be answered.
const SHORT_MS: u64 = 1200;

/// One line of the table in docs/safety.md.
struct Row {
    fault: String,
    verdict: &'static str,
    gate: String,
    recovery_ms: Option<i64>,
}

/// The pair under test, with a client that writes through a's gate all the time and somebody who looks at the gate.
struct Bench<'l> {
    lab: &'l Lab,
    relay: &'l DnsRelay,
    writer: Writer,
    gate: Watcher<bool>,
    rows: Vec<Row>,
}

impl<'l> Bench<'l> {
    fn new(lab: &'l Lab) -> Outcome<Bench<'l>> {
        lab.start_pair()?;
        let a = &lab.a;
        let relay = lab.relay.as_ref().ok_or("this lab has no relay")?;
        // Acknowledged without waiting for the standby: the gate alone is measured.
        let setup = "SET synchronous_commit = off".to_owned();
        let options = WriterOptions { setup, target: Target::Always(a.gate()?), ..WriterOptions::once(1, a.gate()?) };
        let writer = Writer::start_flowing(lab.client.ns(), options)?;
        let target = SocketAddr::from(([127, 0, 0, 1], STATUS_PORT));
        let gate = Watcher::start(a.ns(), move || {
            let status: Value = serde_json::from_str(&http_here(target, "/status.json")?.1)?;
            Ok(status.pointer("/gate/open") == Some(&Value::Bool(true)))
        })?;
        Ok(Bench { lab, relay, writer, gate, rows: Vec::new() })
    }

    fn counter(&self, name: &str) -> Outcome<u64> {
        let counter = self.lab.a.status()?.pointer(&format!("/counters/{name}")).and_then(Value::as_u64);
        counter.ok_or_else(|| Fail(format!("no counter {name}")))
    }

    fn last_ack(&self) -> Outcome<Instant> {
        Ok(self.writer.log().last_ack().ok_or("no acknowledgement")?.at)
    }

    fn cut_peer(&self) -> Outcome {
        let (a, b) = (&self.lab.a.host.plug, &self.lab.b.host.plug);
        self.lab.switch.cut_port_between(a, b, PEER_PORT)
    }

    /// A question asked after the moment got its honest answer: the lease no longer hangs on what came before.
    fn wait_proof_after(&self, moment: Instant) -> Outcome {
        wait_until(secs(60), "a question with an honest answer", || {
            Ok(self.relay.last_proof_asked(self.lab.a.address()).is_some_and(|asked| asked > moment))
        })
        .map(drop)
    }

    /// When the gate was first seen shut after the moment.
    fn wait_shut(&self, moment: Instant) -> Outcome<Instant> {
        let mut seen = None;
        wait_until(secs(60), "the gate of a shut", || {
            seen = self.gate.first_after(moment, |open| !open);
            Ok(seen.is_some())
        })?;
        Ok(seen.ok_or("shut, but not seen")?.answered)
    }

    /// From the end of a fault to the first acknowledgement, in milliseconds.
    fn recovery(&self, ended: Instant) -> Outcome<i64> {
        let first = self.writer.wait_ack_via(self.lab.a.gate()?, ended, secs(60))?;
        let took = ms(ended, first);
        // The status lags behind the gate by up to 200 ms; the next row must not see this one's.
        wait_until(secs(60), "the status to show the open gate", || {
            Ok(self.gate.first_after(first, |open| *open).is_some())
        })?;
        Ok(took)
    }

    /// While the peer vouches, a silent witness costs nothing, however it is silent.
    fn all_silent_faults_one_after_another(&self) -> Outcome {
        let (cuts, begun) = (self.counter("gate_cuts")?, now());
        for (name, fault, _) in SILENT {
            self.relay.set(fault);
            wait_until(secs(60), &format!("questions that meet: {name}"), || {
                Ok(self.relay.met(self.lab.a.address()) >= 3)
            })?;
        }
        let lasted = ms(begun, now());
        self.relay.set(DnsFault::Pass);
        let (gap, _) = self.writer.log().longest_gap();
        ensure!(self.counter("gate_cuts")? == cuts, "the gate was cut while the peer vouched");
        ensure!(gap < millis(LEASE_MS.unsigned_abs()), "an outage of {gap:?} while the peer vouched");
        ensure!(self.writer.log().errors.is_empty(), "client errors: {:?}", self.writer.log().errors);
        println!(
            "figure: {lasted} ms without one honest DNS answer ({} faults), peer reachable: 0 cuts, longest gap {} ms",
            SILENT.len(),
            gap.as_millis()
        );
        Ok(())
    }

    /// An outage shorter than the lease allows is no outage, though the peer is silent too.
    fn short_outage(&self, name: &str, fault: DnsFault) -> Outcome {
        let cuts = self.counter("gate_cuts")?;
        let begun = self.relay.set(fault);
        pause(millis(SHORT_MS));
        let ended = self.relay.set(DnsFault::Pass);
        self.wait_proof_after(ended)?;
        ensure!(self.counter("gate_cuts")? == cuts, "{name}: a false cut for an outage of {} ms", ms(begun, ended));
        Ok(())
    }

    /// The peer is silent too: the gate lapses with the lease of the last answered question, and comes back.
    fn lapse(
        &mut self,
        (name, word): (&str, &str),
        begin: impl FnOnce() -> Outcome,
        end: impl FnOnce() -> Outcome,
    ) -> Outcome {
        let a = &self.lab.a;
        let begun = now();
        begin()?;
        let shut = self.wait_shut(begun)?;
        let last = self.last_ack()?;
        let asked = self.relay.last_proof_asked(a.address()).ok_or("no question was answered")?;
        let status = a.status()?;
        ensure!(text_at(&status, "/gate/state") == "lapsed", "{name}: the gate is {}", text_at(&status, "/gate/state"));
        let (shut_ms, ack_ms) = (ms(asked, shut), ms(asked, last));
        // The relay hears a question after it was dated, on a busy machine some time after.
        ensure!(shut_ms >= LEASE_MS - 500, "{name}: shut {shut_ms} ms after the last answered question: too early");
        ensure!(ack_ms <= LAST_ACK_MS, "{name}: acknowledged {ack_ms} ms after the last answered question");
        // A question without an answer is given up later than the lease ends.
        a.wait_status(secs(60), &format!("to say \"{word}\" of the witness"), |status| {
            text_at(status, "/witness/servers/0/error").contains(word)
        })?;
        let ended = now();
        end()?;
        let recovery_ms = self.recovery(ended)?;
        self.rows.push(Row {
            fault: name.to_owned(),
            verdict: "silent",
            gate: format!("lapsed {shut_ms} ms after the last answered question, last ack at {ack_ms} ms"),
            recovery_ms: Some(recovery_ms),
        });
        self.wait_proof_after(ended)
    }

    /// Answers that count, though not the easy way: the gate stays open for longer than a lease.
    fn stays_open(&mut self, name: &str, fault: DnsFault) -> Outcome {
        let cuts = self.counter("gate_cuts")?;
        let begun = self.relay.set(fault);
        pause(millis(4500));
        ensure!(self.counter("gate_cuts")? == cuts, "{name}: the gate was cut");
        ensure!(self.relay.met(self.lab.a.address()) >= 6, "{name}: hardly a question met it");
        let gate = format!("open for all of {} ms", ms(begun, now()));
        self.rows.push(Row { fault: name.to_owned(), verdict: "here", gate, recovery_ms: None });
        Ok(())
    }

    /// The record itself is changed at the real server: cut within a poll, lapsed, open again when it is right again.
    fn record_says(&mut self, name: &str, verdict: &'static str, change: &str, stands: u64, peer: &str) -> Outcome {
        let (a, dns) = (&self.lab.a, &self.lab.witness);
        let marker = dns.marker()?.ok_or("there is no marker")?;
        let begun = now();
        dns.nsupdate(change)?;
        let changed = now();
        self.wait_shut(begun)?;
        let last = self.last_ack()?;
        let cut_ms = ms(changed, last);
        ensure!(cut_ms <= CUT_MS, "{name}: acknowledged {cut_ms} ms after the record changed");
        ensure!(last_cut(a)?.contains("): the record at "), "{name}: cut otherwise: {}", last_cut(a)?);
        never(secs(stands), &format!("{name}: a gate open, or a fence"), || {
            Ok(a.gate_is_open()? || a.role()? == "fenced")
        })?;
        ensure!(a.gate_state()? == "lapsed", "{name}: the gate is {}", a.gate_state()?);
        ensure!(!a.postgres.is_read_only()?, "{name}: the primary was demoted");
        dns.nsupdate(&format!(
            "update delete db.example.org\nupdate add db.example.org 5 A {}\n\
             update delete _portcullis.db.example.org TXT\nupdate add _portcullis.db.example.org 5 TXT \"{marker}\"",
            a.address()
        ))?;
        let recovery_ms = self.recovery(now())?;
        let gate = format!("last ack {cut_ms} ms after the change ({peer})");
        self.rows.push(Row { fault: name.to_owned(), verdict, gate, recovery_ms: Some(recovery_ms) });
        Ok(())
    }

    /// Nothing of all this has left a trace, and the figures.
    fn close(self) -> Outcome {
        let status = self.lab.a.status()?;
        ensure!(text_at(&status, "/role") == "active", "a is {} in the end", text_at(&status, "/role"));
        println!("figure: | fault | verdict | gate | recovery |");
        for Row { fault, verdict, gate, recovery_ms } in &self.rows {
            let recovery = recovery_ms.map_or("-".to_owned(), |ms| format!("{ms} ms"));
            println!("figure: | {fault} | {verdict} | {gate} | {recovery} |");
        }
        Ok(())
    }
}

fn with_relay(name: &'static str) -> Options {
    Options { relay: true, ..Options::new(name) }
}

#[test]
fn dns_that_proves_nothing_costs_nothing_while_the_peer_vouches_and_lapses_at_the_lease_without_it() {
    in_lab(with_relay("dnssilent"), |lab| {
        let mut bench = Bench::new(lab)?;
        let relay = bench.relay;
        let set = |fault| {
            relay.set(fault);
            Ok(())
        };
        bench.all_silent_faults_one_after_another()?;
        bench.cut_peer()?;
        bench.wait_proof_after(now())?;
        for (name, fault, word) in SILENT {
            if SHORT_TOO.contains(&fault) {
                bench.short_outage(name, fault)?;
            }
            bench.lapse((name, word), || set(fault), || set(DnsFault::Pass))?;
        }
        bench.close()
    });
}

#[test]
fn dns_that_says_nothing_cuts_never_fences_and_opens_by_itself() {
    in_lab(with_relay("dnsnothing"), |lab| {
        let mut bench = Bench::new(lab)?;
        let (relay, a) = (bench.relay, &lab.a);
        let set = |fault| {
            relay.set(fault);
            Ok(())
        };
        let foreign = "update delete db.example.org A\nupdate add db.example.org 5 A";
        let no_address = "update delete db.example.org A";
        let moved = format!("{foreign} {}", lab.b.address());
        let changes = [
            (
                "no such name (signed NXDOMAIN)",
                "nothing",
                "update delete db.example.org\nupdate delete _portcullis.db.example.org",
                0,
            ),
            ("two address records", "nothing", "update add db.example.org 5 A 192.0.2.12", 0),
            ("the address of no node", "nothing", &format!("{foreign} 192.0.2.66"), 0),
            (
                "an alias (CNAME)",
                "nothing",
                "update delete db.example.org\nupdate add db.example.org 5 CNAME x.example.org.",
                0,
            ),
            ("the marker missing", "nothing", "update delete _portcullis.db.example.org TXT", 0),
            (
                "the marker unreadable",
                "nothing",
                "update delete _portcullis.db.example.org TXT\n\
                 update add _portcullis.db.example.org 5 TXT \"v=1 epoch=x\"",
                0,
            ),
            // Put back as soon as it has cut: W is not much longer than a poll and a look on a busy machine.
            ("the peer's address, put back within W", "elsewhere", &moved, 0),
        ];
        bench.record_says("the address deleted for 10 s", "nothing", no_address, 10, "peer vouches")?;
        for (name, verdict, change, stands) in changes {
            bench.record_says(name, verdict, change, stands, "peer vouches")?;
        }
        bench.cut_peer()?;
        bench.wait_proof_after(now())?;
        for (name, verdict, change, stands) in changes {
            bench.record_says(name, verdict, change, stands, "peer silent")?;
        }

        // Slow and truncated answers count, and are as old as their questions.
        bench.stays_open("UDP answers truncated, TCP passes", DnsFault::TruncateUdp)?;
        bench.stays_open("answers 1.5 s late", DnsFault::Delay(millis(1500)))?;
        bench.lapse(("then none at all", "did not answer"), || set(DnsFault::Drop), || set(DnsFault::Pass))?;
        // The real server turns the question away, for its own reasons and for the key's.
        let (none, any) = (|| lab.witness.allow_query("none"), || lab.witness.allow_query("any"));
        bench.lapse(("REFUSED by the server's ACL", "REFUSED"), none, any)?;
        let (wrong, right) = (|| set(DnsFault::WrongKey), || set(DnsFault::Pass));
        bench.lapse(("signed with a wrong secret: BADSIG", "BadSig"), wrong, right)?;
        lab.switch.heal()?;

        // A daemon that starts with a wrong key opens nothing: a witness that never confirmed its epoch is silence.
        let key_file = lab.dir.join("tsig.key");
        a.stop_daemon()?;
        Template::once()?.write_secret(&key_file, "d3Jvbmc=\n")?;
        a.start_daemon()?;
        never(millis(LEASE_MS.unsigned_abs() + 1000), "a gate opened with a wrong key", || a.gate_is_open())?;
        let said = text_at(&a.status()?, "/witness/servers/0/error");
        ensure!(said.contains("NOTAUTH"), "the status says \"{said}\"");
        a.stop_daemon()?;
        Template::once()?.write_secret(&key_file, &format!("{}\n", lab.witness.key()))?;
        a.start_daemon()?;
        a.wait_active(secs(60))?;
        bench.close()
    });
}
