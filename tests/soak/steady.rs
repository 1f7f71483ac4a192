//! An hour (or less) of nothing worse than bad weather: lost packets, a DNS server that restarts, short stalls. The
//! gate must not be cut once, and no client may see an error.

use crate::harness::Lab;
use crate::harness::host::is_alive;
use crate::harness::sys::{Fail, Outcome, millis, ms, now, pause, secs};
use crate::harness::witness::{SERVICE, addresses_in, ask_here};
use crate::play::clients::{Client, Clients, Habit};
use crate::play::eyes::Eyes;
use crate::play::plan::Rng;
use crate::play::trace::Look;
use hickory_proto::rr::RecordType;
use portcullis::base::time::{Duration, Instant};

pub struct Weather {
    pub minutes: u64,
    pub loss_percent: u32,
    pub seed: u64,
}

/// What the time came to.
pub struct Report {
    pub violations: Vec<String>,
    pub figures: Vec<String>,
}

/// Shorter than what is left of a lease between two proofs.
const STALL: Duration = millis(200);

/// The whole time; `say` gets one line a minute.
pub fn steady(lab: &Lab, weather: &Weather, mut say: impl FnMut(&str)) -> Outcome<Report> {
    let mut rng = Rng::new(weather.seed);
    let gate = front_door(lab)?;
    let client = |id: u32, habit: Habit| Client {
        id,
        node: 0,
        ns: lab.client.ns().to_owned(),
        gate: gate.clone(),
        habit,
        every: millis(20),
        patience: secs(30),
    };
    let before = counters(lab)?;
    let eyes = Eyes::open(lab)?;
    let clients = Clients::start(&lab.switch.ns, vec![client(1, Habit::Durable), client(2, Habit::Read)])?;
    clients.wait_answer_of(0, now(), secs(10))?;
    if weather.loss_percent > 0 {
        lab.switch.lose(weather.loss_percent)?;
    }
    let start = now();
    let end = start + secs(weather.minutes * 60);
    let mut sky = Sky { restarts: 0, stalls: 0, next_restart: start + first_restart(weather), next_stall: start };
    let mut told = 0;
    let mut broken = None;
    while now() < end && broken.is_none() {
        broken = sky.turn(lab, &mut rng, start, end).err();
        let minutes = now().since(start).as_secs() / 60;
        if minutes > told {
            told = minutes;
            let looks = eyes.looks();
            let lease = least_lease(&looks).map_or(0, |(lease, _)| lease);
            let (acks, errors) = clients.with_log(|log| (log.acks.len(), log.errors.len()));
            let [cuts, _] = counters(lab).unwrap_or_default();
            say(&format!(
                "{minutes} min: {acks} answers, {errors} errors, {cuts} cuts, least lease {lease} ms, {} DNS \
                 restarts, {} stalls",
                sky.restarts, sky.stalls
            ));
        }
        pause(millis(100));
    }
    let log = clients.finish();
    let looks = eyes.finish();
    lab.switch.heal()?;
    let mut violations = Vec::new();
    violations.extend(broken.map(|error| format!("the weather machine: {error}")));
    for (index, node) in lab.nodes().into_iter().enumerate() {
        let alive = node.daemon_pid().is_ok_and(is_alive);
        if !alive {
            violations.push(format!("the daemon on {} ended by itself", node.name()));
        }
        let cuts = looks.iter().filter(|look| look.node == index).map(|look| look.cuts).max().unwrap_or_default();
        if cuts > before[index] {
            violations.push(format!("the gate of {} was cut {} times", node.name(), cuts - before[index]));
        }
    }
    let shut = looks.iter().filter(|look| look.node == 0 && !look.open).count();
    if shut > 0 {
        violations.push(format!("{shut} looks found the gate of a not open"));
    }
    let at = |when: Instant| when.since(start).as_secs();
    for (when, id, error) in log.errors.iter().take(20) {
        violations.push(format!("client {id} at {} s: {error}", at(*when)));
    }
    violations.extend(log.strangers.iter().take(5).cloned());
    let there = lab.a.postgres.numbers_of(1)?;
    let lost = log.acks.iter().filter(|ack| ack.client == 1 && !there.contains(&ack.n)).count();
    if lost > 0 {
        violations.push(format!("{lost} acknowledged writes are missing"));
    }
    let (lease, when) = least_lease(&looks).unwrap_or_default();
    let slowest = log.acks.iter().map(|ack| ms(ack.asked, ack.at)).max().unwrap_or_default();
    let seconds = now().since(start).as_secs();
    Ok(Report {
        violations,
        figures: vec![
            format!("steady: {seconds} s with {} % loss on every port", weather.loss_percent),
            format!("steady: {} DNS restarts, {} stalls of {} ms", sky.restarts, sky.stalls, STALL.as_millis()),
            format!("steady: gate cuts {}", counters(lab)?[0] - before[0]),
            format!("steady: {} statements answered, {} client errors", log.acks.len(), log.errors.len()),
            format!("steady: slowest answer {slowest} ms"),
            format!("steady: least lease remaining {lease} ms (at {} s), of {} looks", at(when), looks.len()),
        ],
    })
}

/// The address that the service name has, as a client finds it.
fn front_door(lab: &Lab) -> Outcome<String> {
    let server = format!("{}:53", lab.witness.address());
    let data = crate::harness::sys::in_netns(lab.client.ns(), || ask_here(&server, SERVICE, RecordType::A))?;
    addresses_in(&data).into_iter().next().ok_or_else(|| Fail("the service name has no address".to_owned()))
}

/// Cuts that each daemon has counted.
fn counters(lab: &Lab) -> Outcome<[u64; 2]> {
    let of = |node: &crate::harness::node::Node| -> Outcome<u64> {
        Ok(node.status()?["counters"]["gate_cuts"].as_u64().unwrap_or_default())
    };
    Ok([of(&lab.a)?, of(&lab.b)?])
}

/// The least that was left of the active node's lease in any look, and when.
fn least_lease(looks: &[Look]) -> Option<(u64, Instant)> {
    looks.iter().filter(|look| look.node == 0).map(|look| (look.lease_ms, look.answered)).min()
}

/// Restarts are five minutes apart, in the last ten minutes one; a short run is all last minutes.
fn first_restart(weather: &Weather) -> Duration {
    if weather.minutes > 10 { secs(300) } else { secs(30) }
}

struct Sky {
    restarts: u32,
    stalls: u32,
    next_restart: Instant,
    next_stall: Instant,
}

impl Sky {
    /// Whatever is due now.
    fn turn(&mut self, lab: &Lab, rng: &mut Rng, start: Instant, end: Instant) -> Outcome {
        let at = now();
        if at >= self.next_restart {
            lab.witness.kill()?;
            // Mostly at once, as `systemctl restart`; sometimes it takes its time, but less than lease - poll.
            pause(millis(rng.below(2) * rng.below(1500)));
            lab.witness.start()?;
            self.restarts += 1;
            let last_minutes = end.since(now()) <= secs(600);
            self.next_restart = now() + if last_minutes { secs(60) } else { secs(300) };
        }
        if at >= self.next_stall && at > start {
            let hosts = [&lab.a.host, &lab.b.host, &lab.witness.host];
            let host = hosts[usize::try_from(rng.below(3)).unwrap_or_default()];
            host.freeze()?;
            pause(STALL);
            host.thaw()?;
            self.stalls += 1;
            self.next_stall = now() + millis(10_000 + rng.below(20_000));
        }
        Ok(())
    }
}
