//! C4 and C18: the record moves under five hundred open sessions, and under everything that could hold a fence up:
//! PostgreSQL frozen, the disk full, the log stuck, no descriptors, no processes, a witness that only accepts.

use crate::claims::{CUT_MS, LAST_ACK_MS, evidence, sessions_of_last_cut};
use crate::claims_pause::let_the_crowd_in;
use crate::claims_postgres;
use crate::ensure;
use crate::harness::Lab;
use crate::harness::config::Options;
use crate::harness::host::{continue_all, stop_all};
use crate::harness::node::{Node, text_at};
use crate::harness::postgres::Template;
use crate::harness::raw::{Crowd, Habit};
use crate::harness::sys::{Fail, Outcome, millis, ms, never, now, secs, wait_until};
use crate::{alone_in_lab, in_lab};
use portcullis::base::time::Instant;
use rustix::process::Signal;
use rustls::pki_types::CertificateDer;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;

/// The end of a session is courtesy: nothing passes it any more. Five hundred backends that exit at once take
/// the machine
/// a while, and a busy one longer.
const COURTESY_MS: i64 = 10_000;
/// A gate that stays open for so long has had its lease renewed.
const LONGER_THAN_A_LEASE: std::time::Duration = millis(3500);

/// How many sessions of each habit, plain and by TLS: five hundred.
const CROWD: [(Habit, usize, usize); 6] = [
    (Habit::Idle, 190, 40),
    (Habit::InTransaction, 110, 20),
    (Habit::Sleeping, 70, 10),
    (Habit::Asking, 20, 10),
    (Habit::CopyOut, 10, 5),
    (Habit::CopyIn, 10, 5),
];

/// A certificate for the gate, in the configuration of both nodes.
pub(crate) fn with_tls(lab: &Lab) -> Outcome<CertificateDer<'static>> {
    let broken = |error: rcgen::Error| Fail(format!("no certificate: {error}"));
    let key = rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).map_err(broken)?;
    let params = rcgen::CertificateParams::new([crate::harness::witness::SERVICE.to_owned()]).map_err(broken)?;
    let cert = params.self_signed(&key).map_err(broken)?;
    let (cert_file, key_file) = (lab.dir.join("gate.crt"), lab.dir.join("gate.key"));
    std::fs::write(&cert_file, cert.pem())?;
    Template::once()?.write_secret(&key_file, &key.serialize_pem())?;
    for node in lab.nodes() {
        let lines =
            format!("[auth]\ntls_cert_file = \"{}\"\ntls_key_file = \"{}\"\n", cert_file.display(), key_file.display());
        node.reconfigure("[auth]\n", &lines)?;
    }
    Ok(cert.der().clone())
}

/// A few sessions that ask and pour, beside idle ones.
fn witnesses_of_the_cut(lab: &Lab, node: &Node) -> Outcome<Crowd> {
    let members = vec![(Habit::Asking, false), (Habit::Pouring, false), (Habit::Idle, false), (Habit::Sleeping, false)];
    Crowd::open(lab.client.ns(), node.gate()?, members, None)
}

/// Moves the record to the other node by hand: the last answer and the last session must end within the limit. Leaves
/// it moved; returns when that was and both figures.
fn flip(lab: &Lab, what: &str, crowd: &Crowd, limit: i64) -> Outcome<(Instant, i64, i64)> {
    lab.witness.move_record_to(lab.b.address())?;
    let moved = now();
    crowd.wait_ended(secs(60))?;
    let mut worst: Vec<String> = Vec::new();
    for ((habit, tls), seen) in crowd.members.iter().zip(crowd.seen()) {
        let answered = seen.last_answer.map_or(0, |at| ms(moved, at));
        let ended = seen.ended.as_ref().map_or(i64::MAX, |(at, _)| ms(moved, *at));
        if answered > limit || ended > limit + COURTESY_MS {
            worst.push(format!("{habit:?} (TLS {tls}): last answer {answered} ms, ended {ended} ms: {:?}", seen.ended));
        }
    }
    ensure!(
        worst.is_empty(),
        "{what}: {} sessions later than {limit} ms, or not ended {COURTESY_MS} ms after it, first {}",
        worst.len(),
        worst[0]
    );
    let last = crowd.last_answer().map_or(0, |at| ms(moved, at).max(0));
    let ended =
        crowd.seen().iter().filter_map(|seen| seen.ended.as_ref().map(|(at, _)| ms(moved, *at))).max().unwrap_or(0);
    Ok((moved, last, ended))
}

/// Puts the record back. Before W has passed the gate opens again by itself; a machine that took longer to end every
/// session has rightly fenced the node.
fn put_back(lab: &Lab) -> Outcome {
    lab.witness.move_record_to(lab.a.address())?;
    let settled = |status: &serde_json::Value| {
        text_at(status, "/role") == "fenced" || status.pointer("/gate/open") == Some(&true.into())
    };
    lab.a.wait_status(secs(60), "to open again or to be fenced", settled)?;
    if lab.a.role()? == "fenced" { claims_postgres::unfence(lab) } else { Ok(()) }
}

/// The gate of a stays open, its lease renewed, for longer than a lease.
fn renewals_go_on(lab: &Lab, what: &str) -> Outcome {
    never(LONGER_THAN_A_LEASE, &format!("{what}: a shut gate"), || Ok(!lab.a.gate_is_open()?))
}

fn five_hundred_sessions(lab: &Lab, root: CertificateDer<'static>) -> Outcome {
    let a = &lab.a;
    let mut members = Vec::new();
    for (habit, plain, tls) in CROWD {
        members.extend(std::iter::repeat_n((habit, false), plain));
        members.extend(std::iter::repeat_n((habit, true), tls));
    }
    let count = members.len();
    let begun = now();
    let crowd = Crowd::open(lab.client.ns(), a.gate()?, members, Some(root))?;
    let opened = ms(begun, now());
    wait_until(secs(60), "all sessions counted", || Ok(a.status()?.pointer("/gate/sessions") == Some(&count.into())))?;
    crowd.wait_answer_after(now(), secs(60))?;
    let (_, last, ended) = flip(lab, "500 sessions", &crowd, CUT_MS)?;
    ensure!(count == 500 && sessions_of_last_cut(a)? == 500, "the cut tells of {} sessions", sessions_of_last_cut(a)?);
    let told =
        crowd.seen().iter().filter(|seen| seen.ended.as_ref().is_some_and(|(_, text)| text.contains("57P01"))).count();
    put_back(lab)?;
    eprintln!(
        "figure: C4 {count} sessions (opened in {opened} ms): last answer {last} ms, last session ended {ended} \
        ms after the \
         record moved (limit {CUT_MS} ms); {told} were told why"
    );
    Ok(())
}

fn postgres_stands_still(lab: &Lab) -> Outcome {
    let a = &lab.a;
    let crowd = witnesses_of_the_cut(lab, a)?;
    crowd.wait_answer_after(now(), secs(60))?;
    let mut frozen = vec![a.postgres.postmaster(&a.host)?];
    for title in ["walsender", "postgres: load app", "checkpointer"] {
        let found = a.host.titled(title)?;
        ensure!(!found.is_empty(), "nothing is called {title}: {:?}", a.host.exec("", &["ps", "-eo", "args"]));
        frozen.extend(found.into_iter().take(2));
    }
    stop_all(&frozen)?;
    renewals_go_on(lab, "PostgreSQL frozen")?;
    let (_, last, ended) = flip(lab, "PostgreSQL frozen", &crowd, CUT_MS)?;
    continue_all(&frozen);
    put_back(lab)?;
    eprintln!(
        "figure: C18 postmaster, backends, walsender frozen: last answer {last} ms, last session {ended} ms \
        after the flip"
    );
    Ok(())
}

/// The disk of `state_dir`, the log and the table of processes are full; afterwards the record stays moved, so that the
/// fence cannot be latched until there is room again.
fn disk_log_and_processes_are_full(lab: &Lab) -> Outcome {
    let a = &lab.a;
    let state = a.dir.join("state").display().to_string();
    // A pipe that nobody reads, full.
    a.stop_daemon()?;
    let pipe = lab.dir.join("stuck.pipe");
    crate::harness::sys::run(&["mkfifo", "-m", "0666", &pipe.display().to_string()])?;
    let flags = i32::try_from(rustix::fs::OFlags::NONBLOCK.bits()).map_err(|error| Fail(error.to_string()))?;
    let mut stuck = std::fs::OpenOptions::new().read(true).write(true).custom_flags(flags).open(&pipe)?;
    a.start_daemon_with_log(&pipe)?;
    a.wait_active(secs(60))?;
    a.wait_in_sync(secs(60))?;
    while stuck.write(&[b'x'; 4096]).is_ok() {}
    while stuck.write(b"x").is_ok() {}
    let fill = format!(
        "dd if=/dev/zero of={state}/fill bs=4k 2>/dev/null; dd if=/dev/zero of={state}/fill2 bs=1 count=4096 \
        2>/dev/null; true"
    );
    a.host.exec("", &["sh", "-c", &fill])?;
    let limit = crate::harness::host::processes_limit(a.daemon_pid()?, 1)?;
    let crowd = witnesses_of_the_cut(lab, a)?;
    renewals_go_on(lab, "full disk, stuck log, no processes")?;
    let (moved, last, ended) = flip(lab, "full disk, stuck log, no processes", &crowd, CUT_MS)?;
    // Left moved for W: fenced, though it cannot be written.
    a.wait_role("fenced", secs(60))?;
    let fenced = ms(moved, now());
    never(secs(1), "a gate open behind a fence that could not be written", || a.gate_is_open())?;
    crate::harness::host::processes_limit(a.daemon_pid()?, limit)?;
    a.host.exec("", &["sh", "-c", &format!("rm {state}/fill {state}/fill2")])?;
    // With room again the latch reaches the disk: it outlives the daemon.
    wait_until(secs(60), "the latch on the disk", || {
        Ok(String::from_utf8_lossy(&std::fs::read(a.state_seen_from_here("journal")?)?).contains("Fenced"))
    })?;
    a.kill_daemon(Signal::KILL)?;
    drop(stuck);
    a.start_daemon()?;
    a.wait_role("fenced", secs(60))?;
    wait_until(secs(60), "PostgreSQL read-only", || a.postgres.is_read_only())?;
    lab.witness.move_record_to(a.address())?;
    claims_postgres::unfence(lab)?;
    eprintln!(
        "figure: C18 state_dir full, log stuck, no processes: renewed for 3.5 s; last answer {last} ms, last \
        session {ended} \
         ms after the flip; fenced after {fenced} ms, latched when there was room"
    );
    Ok(())
}

fn no_descriptors(lab: &Lab) -> Outcome {
    let a = &lab.a;
    let crowd = witnesses_of_the_cut(lab, a)?;
    crowd.wait_answer_after(now(), secs(60))?;
    let pid = a.daemon_pid()?;
    let limit = crate::harness::host::descriptors_limit(pid, 4)?;
    // Its status page cannot be asked: the sessions tell.
    let until = now() + LONGER_THAN_A_LEASE;
    while now() < until {
        crowd.wait_answer_after(now(), secs(60))?;
    }
    let (_, last, ended) = flip(lab, "no descriptors", &crowd, CUT_MS)?;
    crate::harness::host::descriptors_limit(pid, limit)?;
    put_back(lab)?;
    eprintln!(
        "figure: C18 no descriptors: renewed for 3.5 s; last answer {last} ms, last session {ended} ms after the flip"
    );
    Ok(())
}

/// A witness that takes connections and never answers proves nothing: the peer's pledges carry the lease; without them
/// it runs out.
fn a_witness_that_only_accepts(lab: &Lab) -> Outcome {
    let (a, b) = (&lab.a, &lab.b);
    let crowd = witnesses_of_the_cut(lab, a)?;
    lab.witness.freeze()?;
    renewals_go_on(lab, "a frozen witness")?;
    ensure!(crate::harness::net::connects(lab.client.ns(), lab.witness.address(), 53)?, "the witness should accept");
    let peer = [b.daemon_pid()?];
    let frozen = stop_all(&peer)?;
    let limit = LAST_ACK_MS;
    let ended = crowd.wait_ended(secs(60))?;
    let last = crowd.last_answer().ok_or("no answer")?;
    ensure!(
        ms(frozen, last) <= limit && ms(frozen, ended) <= limit + COURTESY_MS,
        "last answer {} ms, last session {} ms after both voters froze",
        ms(frozen, last),
        ms(frozen, ended)
    );
    continue_all(&peer);
    lab.witness.thaw()?;
    a.wait_active(secs(60))?;
    eprintln!(
        "figure: C18 witness accepts and never answers: renewed for 3.5 s by the peer; peer frozen too: last \
        answer {} ms, last \
         session {} ms later (limit {limit} ms)",
        ms(frozen, last),
        ms(frozen, ended)
    );
    Ok(())
}

/// Many connections to a PostgreSQL that allows as many; a standby must allow them too, and first.
fn with_connections(lab: &Lab, count: usize) -> Outcome {
    for node in [&lab.b, &lab.a] {
        node.postgres.append("postgresql.conf", &format!("max_connections = {count}\n"))?;
        node.postgres.stop(&node.host, "fast")?;
        node.postgres.start(&node.host)?;
    }
    Ok(())
}

fn start_daemons(lab: &Lab) -> Outcome {
    for node in [&lab.b, &lab.a] {
        node.start_daemon()?;
    }
    lab.a.wait_active(secs(60))?;
    lab.a.wait_in_sync(secs(60)).map(drop)
}

/// Alone: five hundred backends take both cores, and would be late for the others' measurements as well.
#[test]
fn claim_4_a_moved_record_ends_five_hundred_sessions() {
    // One user's sessions on one database, each with a backend of its own.
    let extra = "[pool]\nsize = 600\n";
    alone_in_lab(Options { extra, ..Options::new("sessions") }, |lab| {
        lab.start_servers()?;
        let_the_crowd_in(lab)?;
        let root = with_tls(lab)?;
        with_connections(lab, 600)?;
        start_daemons(lab)?;
        five_hundred_sessions(lab, root)?;
        evidence(&lab.a).map(drop)
    });
}

#[test]
fn claim_18_the_fence_waits_for_nothing() {
    in_lab(Options::new("busy"), |lab| {
        lab.start_servers()?;
        let_the_crowd_in(lab)?;
        let state = lab.a.dir.join("state").display().to_string();
        let mount = format!("mount -t tmpfs -o size=256k,mode=0700 tmpfs {state} && chown postgres: {state}");
        lab.a.host.exec("", &["sh", "-c", &mount])?;
        start_daemons(lab)?;
        postgres_stands_still(lab)?;
        a_witness_that_only_accepts(lab)?;
        no_descriptors(lab)?;
        ensure!(text_at(&lab.a.status()?, "/role") == "active", "a should serve");
        evidence(&lab.a)?;
        disk_log_and_processes_are_full(lab)?;
        claims_postgres::the_old_primary_is_taken_out(lab)
    });
}
