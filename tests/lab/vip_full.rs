//! The VIP in full (C16, C17), and the second wall (C3): several VIPs of both families, who follows them how fast, who
//! answers for them after a heal, and that a dead or frozen daemon leaves neither a VIP nor an open session.

use crate::claims::{LAST_ACK_MS, VIP_GONE_MS};
use crate::ensure;
use crate::harness::Lab;
use crate::harness::client::{Writer, WriterOptions};
use crate::harness::config::Options;
use crate::harness::host::Host;
use crate::harness::net::{self, VIP, address_gone};
use crate::harness::node::{GATE_PORT, Node};
use crate::harness::postgres::SYSTEM_USER;
use crate::harness::sys::{
    Fail, Outcome, be_prompt, enter_netns, in_netns, millis, ms, never, now, run, secs, wait_until,
};
use crate::{alone_in_lab, in_lab};
use portcullis::base::time::{Duration, Instant};
use portcullis::io::arp::PacketSocket;
use portcullis::io::vip::VipHand;
use portcullis::wire::arp::{self, Mac};
use rustix::process::Signal;
use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

const VIP6: &str = "2001:db8:77::100";
/// Three VIPs of two families on one interface.
const THREE: &str = "address = [\"192.0.2.100/24\", \"192.0.2.101/24\", \"2001:db8:77::100/64\"]\n";
const EACH: [&str; 3] = [VIP, "192.0.2.101", VIP6];
/// The first repetition of an announcement comes 0.5 s after the bind: who follows before it has heard the first.
const FIRST_ANNOUNCEMENT_MS: i64 = 450;
/// And the last one 5 s after it.
const LAST_ANNOUNCEMENT_MS: i64 = 5900;
const KNOCK_PORT: u16 = 7777;
/// The client, who asks.
const ASKER4: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 20);
const ASKER6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0x77, 0, 0, 0, 0, 0x20);

/// Hosts of the lab speak IPv6 too.
fn speak_ipv6(lab: &Lab) -> Outcome {
    for (host, last) in [(&lab.a.host, 11), (&lab.b.host, 12), (&lab.client, 20), (&lab.witness.host, 53)] {
        run(&["ip", "-n", host.ns(), "addr", "add", &format!("2001:db8:77::{last}/64"), "dev", "eth0", "nodad"])?;
    }
    Ok(())
}

/// Runs something of ours in a host, on a runtime of its own.
fn with_runtime<T: Send>(ns: &str, work: impl AsyncFnOnce() -> Outcome<T> + Send) -> Outcome<T> {
    in_netns(ns, || tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(work()))
}

fn host_net(address: IpAddr) -> ipnet::IpNet {
    ipnet::IpNet::new(address, if address.is_ipv4() { 32 } else { 128 }).expect("a host's own prefix")
}

/// Who answers for the address on the link, asked from the client; 150 ms.
fn owners(ns: &str, address: &str) -> Outcome<BTreeSet<Mac>> {
    let address: IpAddr = address.parse()?;
    with_runtime(ns, async || {
        let hand = VipHand::new(&host_net(address), Some("eth0")).await?;
        let (index, own) = (hand.vip().interface_index, hand.vip().mac);
        let socket = PacketSocket::open(index, address)?;
        // An ordinary question: to a probe (RFC 5227) a node that is about to bind would yield.
        let frame = match address {
            IpAddr::V4(v4) => arp::request(own, ASKER4, v4),
            IpAddr::V6(v6) => arp::solicitation(own, ASKER6, v6),
        };
        let mut heard = BTreeSet::new();
        socket.send(&frame).await?;
        let hear = async {
            let mut buffer = [0; 512];
            while let Ok(length) = socket.receive(&mut buffer).await {
                heard.extend(arp::foreign_claim(&buffer[..length], address, own, false));
            }
        };
        let _time_is_up = tokio::time::timeout(millis(150), hear).await;
        Ok(heard)
    })
}

fn mac_of(host: &Host) -> Mac {
    let mut mac = [0; 6];
    for (octet, text) in mac.iter_mut().zip(host.plug.mac.split(':')) {
        *octet = u8::from_str_radix(text, 16).expect("the lab's own MAC");
    }
    mac
}

/// A thread of this host that notes what it saw until it is finished.
struct Noting<T> {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Vec<T>>,
}

impl<T: Send + 'static> Noting<T> {
    fn start(ns: &str, work: impl FnOnce(&AtomicBool) -> Vec<T> + Send + 'static) -> Noting<T> {
        let stop = Arc::new(AtomicBool::new(false));
        let (seen, ns) = (Arc::clone(&stop), ns.to_owned());
        let thread = std::thread::spawn(move || {
            enter_netns(&ns).expect("the host's namespace");
            be_prompt();
            work(&seen)
        });
        Noting { stop, thread }
    }

    fn finish(self) -> Outcome<Vec<T>> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().map_err(|_| Fail("a noting thread panicked".to_owned()))
    }
}

/// When the address came to this node's card, looked at each half millisecond: an address that is not here cannot be
/// bound to. An event of the kernel would be noted later, and make those who follow look quicker than they are.
fn note_bind(node: &Node, vip: &'static str) -> Noting<Instant> {
    Noting::start(node.ns(), move |stop| {
        while !stop.load(Ordering::Relaxed) {
            if UdpSocket::bind((vip, 0)).is_ok() {
                return vec![now()];
            }
            std::thread::sleep(Duration::from_micros(500));
        }
        Vec::new()
    })
}

/// When the client's datagrams for this address arrived here.
fn note_arrivals(node: &Node, vip: &str) -> Noting<Instant> {
    let wildcard = if vip.contains(':') { "[::]" } else { "0.0.0.0" };
    let (bind, vip) = (format!("{wildcard}:{KNOCK_PORT}"), vip.as_bytes().to_vec());
    Noting::start(node.ns(), move |stop| {
        let socket = socket2::Socket::new(
            if bind.starts_with('[') { socket2::Domain::IPV6 } else { socket2::Domain::IPV4 },
            socket2::Type::DGRAM,
            None,
        )
        .expect("socket");
        // One for each VIP; each gets its own by its text.
        socket.set_reuse_port(true).expect("reuse");
        if bind.starts_with('[') {
            socket.set_only_v6(true).expect("v6only");
        }
        socket.bind(&bind.parse::<std::net::SocketAddr>().expect("address").into()).expect("bind");
        let socket = UdpSocket::from(socket);
        socket.set_read_timeout(Some(millis(20))).expect("timeout");
        let (mut seen, mut buffer) = (Vec::new(), [0; 64]);
        while !stop.load(Ordering::Relaxed) {
            match socket.recv(&mut buffer) {
                Ok(length) if buffer[..length] == vip => seen.push(now()),
                _ => {}
            }
        }
        seen
    })
}

/// A busy client: a datagram to the VIP each millisecond, whoever has it.
fn keep_knocking(client: &Host, vip: &'static str) -> Noting<()> {
    Noting::start(client.ns(), move |stop| {
        let socket = UdpSocket::bind(if vip.contains(':') { "[::]:0" } else { "0.0.0.0:0" }).expect("socket");
        while !stop.load(Ordering::Relaxed) {
            let _nobody_there = socket.send_to(vip.as_bytes(), (vip, KNOCK_PORT));
            std::thread::sleep(millis(1));
        }
        Vec::new()
    })
}

/// One switchover to `to`; for each family, how long after the bind the client's traffic arrived there.
fn move_to(lab: &Lab, to: &Node, dark: Option<Duration>) -> Outcome<[i64; 2]> {
    let followed = [VIP, VIP6];
    let binds = followed.map(|vip| note_bind(to, vip));
    let arrivals = followed.map(|vip| note_arrivals(to, vip));
    let clients = followed.map(|vip| keep_knocking(&lab.client, vip));
    if let Some(dark) = dark {
        // What the new holder says of itself is lost from before the bind until `dark` after it.
        let port = &to.host.plug.port;
        for what in ["ether type arp", "icmpv6 type nd-neighbor-advert"] {
            run(&[
                "ip",
                "netns",
                "exec",
                &lab.switch.ns,
                "nft",
                &format!("add rule bridge lab cuts iifname {port} {what} drop"),
            ])?;
        }
        let said = std::thread::scope(|scope| -> Outcome<_> {
            let promote = scope.spawn(|| to.cli(&["promote", "--yes"]));
            wait_until(secs(60), "the VIP on the new holder", || to.has_vip())?;
            std::thread::sleep(dark);
            lab.switch.heal()?;
            promote.join().map_err(|_| Fail("the promote panicked".to_owned()))?
        })?;
        said.expect(0)?;
    } else {
        to.cli(&["promote", "--yes"])?.expect(0)?;
    }
    to.wait_active(secs(60))?;
    // Long enough for a repetition that was needed.
    std::thread::sleep(if dark.is_some() { secs(6) } else { secs(1) });
    for client in clients {
        client.finish()?;
    }
    let mut delays = [0; 2];
    for (((vip, arrivals), bind), delay) in followed.iter().zip(arrivals).zip(binds).zip(&mut delays) {
        let bound = *bind.finish()?.first().ok_or_else(|| format!("{vip} was never bound"))?;
        let arrived = arrivals.finish()?.first().copied();
        *delay = ms(bound, arrived.ok_or_else(|| format!("nothing arrived at {vip} on {}", to.name()))?);
    }
    Ok(delays)
}

/// Alone, for the sake of its figures. Target: 50 ms (C16 in docs/safety.md).
#[test]
fn busy_clients_follow_several_vips_of_both_families() {
    alone_in_lab(Options { vip_lines: THREE, ..Options::with_vip("vipfollow") }, |lab| {
        speak_ipv6(lab)?;
        lab.start_pair()?;
        let (a, b, client) = (&lab.a, &lab.b, lab.client.ns());
        let (mac_a, mac_b) = (mac_of(&a.host), mac_of(&b.host));
        for vip in EACH {
            ensure!(owners(client, vip)? == [mac_a].into(), "{vip} is not a's alone");
        }
        let mut worst = [0; 2];
        for to in [b, a, b, a] {
            let delays = move_to(lab, to, None)?;
            eprintln!(
                "figure: vipfollow: to {}: IPv4 {} ms, IPv6 {} ms after the bind",
                to.name(),
                delays[0],
                delays[1]
            );
            worst = [worst[0].max(delays[0]), worst[1].max(delays[1])];
            lab.nodes().iter().find(|node| node.name() == to.name()).ok_or("no node")?.wait_in_sync(secs(60))?;
            let mac = if to.name() == "a" { mac_a } else { mac_b };
            for vip in EACH {
                ensure!(owners(client, vip)? == [mac].into(), "{vip} is not on {} alone", to.name());
            }
        }
        ensure!(
            worst.iter().all(|delay| *delay <= FIRST_ANNOUNCEMENT_MS),
            "a busy client followed {worst:?} ms after the bind"
        );

        // The first announcements are lost, for a second: the repetitions (until 5 s after the bind) are not.
        let delays = move_to(lab, b, Some(secs(1)))?;
        eprintln!("figure: vipfollow: lost for 1 s: IPv4 {} ms, IPv6 {} ms after the bind", delays[0], delays[1]);
        ensure!(
            delays.iter().all(|delay| *delay <= LAST_ANNOUNCEMENT_MS),
            "recovered only {delays:?} ms after the bind"
        );
        b.wait_in_sync(secs(60))?;

        // Somebody else's claim on one of them, IPv6: cut, not defended; and all of them go.
        let thief = mac_of(&lab.witness.host);
        let listener = claims_of(&lab.client, VIP6, mac_b);
        let claimed = now();
        with_runtime(lab.witness.host.ns(), async || {
            let hand = VipHand::new(&host_net(VIP6.parse()?), Some("eth0")).await?;
            let socket = PacketSocket::open(hand.vip().interface_index, VIP6.parse()?)?;
            Ok(socket.send(&arp::unsolicited_advertisement(thief, VIP6.parse()?)).await?)
        })?;
        wait_until(secs(60), "the gate of b cut by a foreign claim", || Ok(!b.gate_is_open()?))?;
        eprintln!("figure: vipfollow: cut {} ms after a foreign claim (looked at every 20 ms)", ms(claimed, now()));
        wait_until(secs(60), "the claimed VIP gone", || Ok(!net::has_address(b.ns(), VIP6)?))?;
        // It comes back once nobody answers for it, and then only says so itself.
        b.wait_active(secs(60))?;
        let defended: Vec<_> =
            listener.finish()?.into_iter().filter(|at| ms(claimed, *at) > 0 && ms(claimed, *at) < 300).collect();
        ensure!(defended.is_empty(), "b defended its VIP against a claim, {} frames", defended.len());

        // A person takes one of three away: obeyed, none is left, nothing is served.
        net::delete_address(b.ns(), "192.0.2.101")?;
        wait_until(secs(60), "the gate of b cut", || Ok(!b.gate_is_open()?))?;
        never(secs(3), "a gate open without all its VIPs", || Ok(b.gate_is_open()? || a.gate_is_open()?))?;
        Ok(())
    });
}

/// When this MAC claimed the address, as heard at this host.
fn claims_of(host: &Host, address: &'static str, mac: Mac) -> Noting<Instant> {
    Noting::start(host.ns(), move |stop| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime");
        runtime.block_on(async {
            let address: IpAddr = address.parse().expect("address");
            let hand = VipHand::new(&host_net(address), Some("eth0")).await.expect("eth0");
            let socket = PacketSocket::open(hand.vip().interface_index, address).expect("packet socket");
            let (mut heard, mut buffer) = (Vec::new(), [0; 512]);
            while !stop.load(Ordering::Relaxed) {
                if let Ok(Ok(length)) = tokio::time::timeout(millis(20), socket.receive(&mut buffer)).await
                    && arp::foreign_claim(&buffer[..length], address, [0; 6], false) == Some(mac)
                {
                    heard.push(now());
                }
            }
            heard
        })
    })
}

/// A connection that says an octet every 20 ms; when it was cut, and how.
fn trickle(ns: &str, address: &str, port: u16) -> Outcome<Noting<(Instant, std::io::ErrorKind)>> {
    let target: std::net::SocketAddr = format!("{address}:{port}").parse()?;
    let mut stream = in_netns(ns, || Ok(TcpStream::connect_timeout(&target, secs(5))?))?;
    stream.set_nodelay(true)?;
    // The beginning of a start-up message that is never complete: both PostgreSQL and the gate wait for the rest.
    stream.write_all(&9000u32.to_be_bytes())?;
    stream.set_read_timeout(Some(millis(20)))?;
    Ok(Noting::start(ns, move |stop| {
        let mut buffer = [0; 64];
        while !stop.load(Ordering::Relaxed) {
            match stream.write_all(&[0]).and_then(|()| stream.read(&mut buffer)) {
                Ok(0) => return vec![(now(), std::io::ErrorKind::UnexpectedEof)],
                Ok(_) => {}
                Err(error) if matches!(error.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut) => {
                }
                Err(error) => return vec![(now(), error.kind())],
            }
        }
        Vec::new()
    }))
}

fn has_table(node: &Node) -> Outcome<bool> {
    Ok(run(&["ip", "netns", "exec", node.ns(), "nft", "list", "tables"])?.contains("inet portcullis"))
}

#[test]
fn a_frozen_or_killed_daemon_leaves_no_open_session_behind_the_second_wall() {
    in_lab(Options { fence: "kernel_gate = true\n", ..Options::with_vip("wall") }, |lab| {
        // In sync with the wall up: the standby needs PostgreSQL's port before there is any lease (R6).
        lab.start_pair()?;
        let (a, b, client) = (&lab.a, &lab.b, lab.client.ns());
        ensure!(has_table(a)? && has_table(b)?, "a wall is missing");
        ensure!(!net::connects(client, b.address(), 5432)?, "the standby's PostgreSQL is open to a client");
        ensure!(!net::connects(client, b.address(), GATE_PORT)?, "the passive node's gate is open to a client");
        for (what, signal) in [("SIGSTOP", Signal::STOP), ("kill -9", Signal::KILL)] {
            wait_until(secs(60), "the gate open to the client", || net::connects(client, VIP, GATE_PORT))?;
            // To the gate, and round it to PostgreSQL itself. By the node's own address: a session by the VIP dies with
            // the VIP, before the lease, and nobody is left to tell the client.
            let doors = [(a.address(), GATE_PORT), (a.address(), 5432)];
            let mut sessions = Vec::new();
            for (address, port) in doors {
                sessions.push((address, port, trickle(client, address, port)?));
            }
            let standby = trickle(b.ns(), a.address(), 5432)?;
            std::thread::sleep(millis(300));
            let hit = a.kill_daemon(signal)?;
            let gone = address_gone(a.ns(), VIP, secs(60))?;
            eprintln!("figure: wall: {what}: the VIP gone after {} ms", ms(hit, gone));
            ensure!(ms(hit, gone) <= VIP_GONE_MS, "{what}: the VIP left {} ms later", ms(hit, gone));
            wait_until(secs(60), "the wall shut", || {
                Ok(!net::connects(client, a.address(), GATE_PORT)? && !net::connects(client, a.address(), 5432)?)
            })?;
            for (address, port, session) in sessions {
                // It says something every 20 ms, and so hears of it a moment after it happened.
                let patience = now() + secs(30);
                while !session.thread.is_finished() && now() < patience {
                    std::thread::sleep(millis(5));
                }
                let cut = session.finish()?;
                let (at, how) = cut.first().ok_or_else(|| format!("{what}: {address}:{port} was never cut"))?;
                eprintln!(
                    "figure: wall: {what}: the open session to {address}:{port} cut after {} ms, {how}",
                    ms(hit, *at)
                );
                ensure!(ms(hit, *at) <= LAST_ACK_MS, "{what}: {address}:{port} was cut after {} ms", ms(hit, *at));
            }
            ensure!(standby.finish()?.is_empty(), "{what}: the standby's connection was cut");
            ensure!(has_table(a)?, "the wall fell with its daemon");
            if signal == Signal::STOP {
                a.kill_daemon(Signal::CONT)?;
            } else {
                a.start_daemon()?;
            }
            a.wait_active(secs(60))?;
            wait_until(secs(60), "the gate open to the client again", || net::connects(client, VIP, GATE_PORT))?;
        }
        // A cut with words: the wall lets clients read why the gate was shut.
        let writer = Writer::start_flowing(client, WriterOptions::once(1, a.gate()?))?;
        a.cli(&["fence"])?.expect(0)?;
        wait_until(secs(60), "the session told", || Ok(!writer.log().errors.is_empty()))?;
        let errors = writer.finish().errors;
        ensure!(errors.iter().any(|(_, text)| text.contains("57P0")), "the client was told {errors:?}");
        wait_until(secs(60), "the gate shut", || Ok(!net::connects(client, a.address(), GATE_PORT)?))?;
        // Somebody reloads his packet filter: it stands again.
        run(&["ip", "netns", "exec", b.ns(), "nft", "flush", "ruleset"])?;
        wait_until(secs(60), "the wall of the passive node to stand again", || has_table(b))?;
        // A second daemon, started by mistake, does not get as far as the wall of the first.
        a.cli(&["daemon"])?.expect(2)?;
        ensure!(has_table(a)?, "a start that failed took the wall of the running daemon away");
        // A clean stop takes it away.
        for node in lab.nodes() {
            node.stop_daemon()?;
            ensure!(!has_table(node)?, "{} left its wall behind", node.name());
        }
        // Where it cannot be made, nothing runs without it.
        let said = a.cli_as(SYSTEM_USER, &["daemon"])?.expect(2)?;
        ensure!(said.err.contains("CAP_NET_ADMIN"), "{}", said.err);
        Ok(())
    });
}

/// C17: both were told to serve (a person asserted that the other is off, and was wrong) while they could not hear each
/// other; when they can again, one of them lets go, whoever hears whom.
fn heal_with_two_claimants(name: &'static str, still_deaf: Option<[usize; 2]>) {
    alone_in_lab(Options::vip_only(name), |lab| {
        lab.start_servers()?;
        let (a, b, client) = (&lab.a, &lab.b, lab.client.ns());
        b.start_daemon()?;
        a.start_daemon()?;
        wait_until(secs(60), "the first epoch", || Ok(a.cli(&["promote", "--yes"])?.code == 0))?;
        a.wait_active(secs(60))?;
        a.wait_in_sync(secs(60))?;
        let (mac_a, mac_b) = (mac_of(&a.host), mac_of(&b.host));
        ensure!(owners(client, VIP)? == [mac_a].into(), "the VIP is not a's alone");
        // They hear the witness and the client, but not each other.
        lab.switch.cut_between(&a.host.plug, &b.host.plug)?;
        wait_until(secs(60), "a takeover on a person's wrong word", || {
            Ok(b.cli(&["promote", "--yes", "--accept-data-loss", "--peer-is-off", "a"])?.code == 0)
        })?;
        let two = owners(client, VIP)?;
        ensure!(two == [mac_a, mac_b].into(), "there are no two claimants to heal: {two:?}");
        let mut rules = "flush chain bridge lab cuts".to_owned();
        if let Some([from, to]) = still_deaf {
            let ports = [&a.host.plug.port, &b.host.plug.port];
            rules.push_str(&format!("; add rule bridge lab cuts iifname {} oifname {} drop", ports[from], ports[to]));
        }
        run(&["ip", "netns", "exec", &lab.switch.ns, "nft", &rules])?;
        let healed = now();
        let mut last_wrong = healed;
        // Until exactly one has answered for as long as a lease and a bit.
        while ms(last_wrong, now()) < 4000 {
            if owners(client, VIP)?.len() != 1 {
                last_wrong = now();
            }
            ensure!(ms(healed, last_wrong) <= 30_000, "not exactly one answers, 30 s after the heal");
        }
        eprintln!("figure: {name}: exactly one owner from {} ms after the heal on", ms(healed, last_wrong));
        ensure!(!(a.gate_is_open()? && b.gate_is_open()?), "both serve");
        lab.switch.heal()?;
        if still_deaf.is_none() {
            ensure!(owners(client, VIP)? == [mac_b].into(), "not the later epoch's node has the VIP");
            a.wait_role("fenced", secs(60))?;
            ensure!(!a.has_vip()?, "the fenced node has the VIP");
        }
        Ok(())
    });
}

#[test]
fn after_a_heal_with_two_claimants_one_answers() {
    heal_with_two_claimants("vipheal", None);
}

#[test]
fn after_a_heal_that_only_the_old_holder_hears_one_answers() {
    heal_with_two_claimants("viphealab", Some([0, 1]));
}

#[test]
fn after_a_heal_that_only_the_new_holder_hears_one_answers() {
    heal_with_two_claimants("viphealba", Some([1, 0]));
}

/// One-way partitions at the switch: the active node hears all and is heard by none, and the other way round.
#[test]
fn a_one_way_partition_ends_the_lease_and_the_vip() {
    in_lab(Options::with_vip("vipone"), |lab| {
        lab.start_pair()?;
        let (a, b, client) = (&lab.a, &lab.b, lab.client.ns());
        let port = &lab.a.host.plug.port;
        for (id, side) in [(1, "iifname"), (2, "oifname")] {
            a.wait_active(secs(60))?;
            // A session on a itself whose commits do not wait for the standby: the gate alone can stop it.
            let setup = "SET synchronous_commit = local".to_owned();
            let writer = Writer::start_flowing(a.ns(), WriterOptions { setup, ..WriterOptions::once(id, a.gate()?) })?;
            let rule = format!("add rule bridge lab cuts {side} {port} drop");
            run(&["ip", "netns", "exec", &lab.switch.ns, "nft", &rule])?;
            let cut = now();
            wait_until(secs(60), "the gate of a shut", || Ok(!a.gate_is_open()?))?;
            let shut = now();
            let gone = address_gone(a.ns(), VIP, secs(60))?;
            eprintln!("figure: vipone: {side}: gate {} ms, VIP {} ms after the cut", ms(cut, shut), ms(cut, gone));
            let last = writer.finish().last_ack().ok_or("no acknowledgement")?.at;
            ensure!(ms(cut, last) <= LAST_ACK_MS, "{side}: acknowledged {} ms after the cut", ms(cut, last));
            ensure!(ms(cut, gone) <= VIP_GONE_MS, "{side}: the VIP left {} ms after the cut", ms(cut, gone));
            never(secs(2), "anybody serving", || Ok(a.gate_is_open()? || b.gate_is_open()? || b.has_vip()?))?;
            lab.switch.heal()?;
            let healed = now();
            a.wait_active(secs(60))?;
            eprintln!("figure: vipone: {side}: open again {} ms after the heal", ms(healed, now()));
            ensure!(owners(client, VIP)? == [mac_of(&a.host)].into(), "{side}: the VIP is not a's alone");
        }
        Ok(())
    });
}
