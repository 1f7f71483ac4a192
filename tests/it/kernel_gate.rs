//! The second wall against a real kernel: a server, a client and the other node on one bridge, each a network namespace
//! made here and removed at the end, also when a test fails. The wall is made and renewed by a thread that is what the
//! daemon is: user postgres with CAP_NET_ADMIN and CAP_NET_RAW and nothing else.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

use portcullis::base::time::Instant;
use portcullis::io::clock;
use portcullis::io::kernel_gate::{KernelGate, Plan, Stood, remove_leftover};
use rustix::fs::{Gid, Uid};
use rustix::thread::{self as creds, CapabilitySet, CapabilitySets, LinkNameSpaceType};
use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

const GATE: u16 = 6432;
const POSTGRES: u16 = 5432;
const SERVER: [&str; 2] = ["192.0.2.11", "2001:db8:77::11"];
const PEER: [&str; 2] = ["192.0.2.12", "2001:db8:77::12"];

/// Longest wait for something that must happen; only a failing test waits so long.
const PATIENCE: Duration = Duration::from_secs(30);
/// How long a connection or an answer may take that normally comes at once: a busy machine takes its time.
const ANSWERS_COME: Duration = Duration::from_millis(1500);
/// The kernel's grain: a timeout of a set counts in ticks of up to 10 ms.
const TICKS: Duration = Duration::from_millis(20);

fn run(program: &str, words: &[&str]) -> String {
    let output = Command::new(program).args(words).output().unwrap_or_else(|error| panic!("{program}: {error}"));
    assert!(output.status.success(), "{program} {words:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("text")
}

fn ip(line: &str) {
    run("ip", &line.split_whitespace().collect::<Vec<_>>());
}

fn enter(namespace: &str) {
    let file = std::fs::File::open(format!("/run/netns/{namespace}")).expect("namespace");
    creds::move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network)).expect("setns");
}

/// Makes the calling thread what the daemon is.
fn become_postgres(capabilities: CapabilitySet) {
    let passwd = std::fs::read_to_string("/etc/passwd").expect("/etc/passwd");
    let line =
        passwd.lines().find(|line| line.starts_with("postgres:")).expect("packaging/setup.sh makes user postgres");
    let ids: Vec<u32> = line.split(':').skip(2).take(2).map(|id| id.parse().expect("a number")).collect();
    let (uid, gid) = (Uid::from_raw(ids[0]), Gid::from_raw(ids[1]));
    creds::set_keep_capabilities(true).expect("keepcaps");
    creds::set_thread_groups(&[]).expect("setgroups");
    creds::set_thread_res_gid(gid, gid, gid).expect("setresgid");
    creds::set_thread_res_uid(uid, uid, uid).expect("setresuid");
    let sets = CapabilitySets { effective: capabilities, permitted: capabilities, inheritable: CapabilitySet::empty() };
    creds::set_capabilities(None, sets).expect("capset");
}

/// Three hosts on a bridge; the server answers on the gate's port and on PostgreSQL's, the other node on the latter.
struct Lab {
    tag: String,
}

impl Drop for Lab {
    fn drop(&mut self) {
        for role in ["sw", "server", "client", "peer"] {
            let _gone = Command::new("ip").args(["netns", "del", &self.of(role)]).output();
        }
    }
}

impl Lab {
    fn new() -> Lab {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let lab = Lab { tag: format!("pckg{}-{}", std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed)) };
        let switch = lab.of("sw");
        ip(&format!("netns add {switch}"));
        ip(&format!("-n {switch} link add br0 type bridge forward_delay 0 mcast_snooping 0"));
        ip(&format!("-n {switch} link set br0 up"));
        for (role, number) in [("server", 11), ("peer", 12), ("client", 13)] {
            let namespace = lab.of(role);
            ip(&format!("netns add {namespace}"));
            ip(&format!("-n {switch} link add {role} type veth peer name eth0 netns {namespace}"));
            ip(&format!("-n {switch} link set {role} master br0 up"));
            ip(&format!("-n {namespace} link set lo up"));
            ip(&format!("-n {namespace} address add 192.0.2.{number}/24 dev eth0"));
            ip(&format!("-n {namespace} address add 2001:db8:77::{number}/64 dev eth0 nodad"));
            ip(&format!("-n {namespace} link set eth0 up"));
        }
        lab.echo("server", GATE);
        lab.echo("server", POSTGRES);
        lab.echo("peer", POSTGRES);
        for address in SERVER {
            let deadline = clock::now() + PATIENCE;
            while lab.connect("client", address, GATE).is_err() {
                assert!(clock::now() < deadline, "the bridge does not forward");
            }
        }
        lab
    }

    fn of(&self, role: &str) -> String {
        format!("{}-{role}", self.tag)
    }

    /// A thread in the host, to its end.
    fn inside<T: Send>(&self, role: &str, work: impl FnOnce() -> T + Send) -> T {
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                enter(&self.of(role));
                work()
            });
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// Sends back what it gets, for as long as the test runs.
    fn echo(&self, role: &str, port: u16) {
        let listener = self.inside(role, || TcpListener::bind(("::", port)).expect("bind"));
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                std::thread::spawn(move || {
                    let mut stream = stream;
                    stream.set_nodelay(true).expect("nodelay");
                    let mut buffer = [0; 4096];
                    while let Ok(length @ 1..) = stream.read(&mut buffer) {
                        if stream.write_all(&buffer[..length]).is_err() {
                            break;
                        }
                    }
                });
            }
        });
    }

    fn connect(&self, role: &str, address: &str, port: u16) -> std::io::Result<TcpStream> {
        let target = SocketAddr::new(address.parse().expect("address"), port);
        let stream = self.inside(role, || TcpStream::connect_timeout(&target, ANSWERS_COME))?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(ANSWERS_COME))?;
        Ok(stream)
    }

    /// `Ok` answers, `ConnectionRefused` is a reset, `TimedOut` would be a wall without one.
    fn knock(&self, role: &str, address: &str, port: u16) -> Result<(), ErrorKind> {
        self.connect(role, address, port).map(drop).map_err(|error| error.kind())
    }

    /// What the daemon is does this in the server.
    fn as_daemon<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        self.inside("server", || {
            become_postgres(CapabilitySet::NET_ADMIN | CapabilitySet::NET_RAW);
            work()
        })
    }

    fn gate(&self) -> KernelGate {
        self.as_daemon(|| KernelGate::new(plan())).expect("the wall")
    }

    fn set(&self, gate: &mut KernelGate, millis: Option<u64>) -> Stood {
        self.as_daemon(|| gate.set(millis.map(Duration::from_millis))).expect("set")
    }

    fn nft(&self, words: &[&str]) -> String {
        run("ip", &[&["netns", "exec", &self.of("server"), "nft"], words].concat())
    }
}

fn plan() -> Plan {
    let address = |text: &str| text.parse::<IpAddr>().expect("address");
    Plan { gate: vec![GATE], postgres: POSTGRES, nodes: PEER.map(address).to_vec() }
}

/// A byte there and back; when it was there.
fn round_trip(stream: &mut TcpStream, byte: u8) -> std::io::Result<Instant> {
    stream.write_all(&[byte])?;
    let mut back = [0];
    stream.read_exact(&mut back)?;
    assert_eq!(back[0], byte, "another byte came back");
    Ok(clock::now())
}

/// A conversation that was cut: when the last question that got an answer was asked, when the last answer was read, how
/// it ended and when that was seen. How late a busy machine lets the client read says nothing about the wall; when the
/// question was asked does.
struct Talk {
    asked: Instant,
    answered: Instant,
    end: ErrorKind,
    ended: Instant,
}

/// Talks until it is cut.
fn talk(mut stream: TcpStream) -> Talk {
    let (mut asked, mut answered) = (Instant::ZERO, Instant::ZERO);
    for byte in (0..=u8::MAX).cycle() {
        let asking = clock::now();
        match round_trip(&mut stream, byte) {
            Ok(at) => (asked, answered) = (asking, at),
            Err(error) => return Talk { asked, answered, end: error.kind(), ended: clock::now() },
        }
        std::thread::sleep(Duration::from_millis(3));
    }
    unreachable!("it talks for ever")
}

#[test]
fn an_open_session_ends_with_the_lease_when_nobody_renews() {
    let lab = Lab::new();
    let mut gate = lab.gate();
    for lease in [2000u64, 3000].map(Duration::from_millis) {
        lab.set(&mut gate, Some(60_000));
        let mut sessions = Vec::new();
        for address in SERVER {
            for port in [GATE, POSTGRES] {
                sessions.push((address, port, lab.connect("client", address, port).expect("open")));
            }
        }
        let talks: Vec<_> = sessions
            .into_iter()
            .map(|(address, port, stream)| (address, port, std::thread::spawn(|| talk(stream))))
            .collect();
        let before = clock::now();
        lab.as_daemon(|| gate.set(Some(lease))).expect("set");
        let set = clock::now();
        for (address, port, thread) in talks {
            let talk = thread.join().expect("no panic");
            eprintln!(
                "figure: lease {lease:?}, {address} port {port}: last answer after {:?}, reset {:?}",
                talk.answered.since(before),
                talk.ended.since(before)
            );
            let asked = talk.asked.since(set);
            assert!(
                asked <= lease + TICKS,
                "{address} {port}: answered what was asked {asked:?} after {lease:?} began"
            );
            let ended = talk.ended.since(before);
            assert!(ended + TICKS >= lease, "{address} {port}: cut {ended:?} after {lease:?} began");
            assert_eq!(talk.end, ErrorKind::ConnectionReset, "{address} {port}: it ended otherwise");
            assert_eq!(lab.knock("client", address, port), Err(ErrorKind::ConnectionRefused), "{address} {port}");
        }
    }
}

/// A client that only listens is told nothing by a dead server; what the server still sends must not arrive, and the
/// server's end is reset, so that nothing lies in its buffer for later.
#[test]
fn what_the_server_sends_after_the_lease_does_not_leave_it() {
    let lab = Lab::new();
    let (port, lease) = (6440, Duration::from_secs(1));
    let plan = Plan { gate: vec![port], ..plan() };
    let mut gate = lab.as_daemon(|| KernelGate::new(plan)).expect("the wall");
    lab.set(&mut gate, Some(60_000));
    let listener = lab.inside("server", || TcpListener::bind(("0.0.0.0", port)).expect("bind"));
    // Says a word of one octet every 3 ms, and notes when.
    let server = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().expect("accept");
        let (mut sent, begun) = (Vec::new(), clock::now());
        loop {
            sent.push(clock::now());
            if let Err(error) = stream.write_all(b"x") {
                return (sent, error.kind(), clock::now());
            }
            assert!(clock::now().since(begun) < PATIENCE, "the sender is never told");
            std::thread::sleep(Duration::from_millis(3));
        }
    });
    let mut stream = lab.connect("client", SERVER[0], port).expect("open");
    let before = clock::now();
    lab.as_daemon(|| gate.set(Some(lease))).expect("set");
    let set = clock::now();
    let (mut arrived, mut last, mut buffer) = (0, Instant::ZERO, [0; 64]);
    while let Ok(length @ 1..) = stream.read(&mut buffer) {
        (arrived, last) = (arrived + length, clock::now());
    }
    let (sent, error, told) = server.join().expect("no panic");
    let told = told.since(before);
    eprintln!("figure: {lease:?}: last octet received after {:?}, the sender reset after {told:?}", last.since(before));
    assert!(arrived > 0, "nothing arrived");
    let said = sent[arrived - 1].since(set);
    assert!(said <= lease + TICKS, "an octet arrived that was sent {said:?} after {lease:?} began");
    assert!(told + TICKS >= lease, "cut {told:?} after {lease:?} began");
    assert!(matches!(error, ErrorKind::ConnectionReset | ErrorKind::BrokenPipe), "{error:?}");
}

#[test]
fn a_renewed_lease_loses_not_one_byte() {
    let lab = Lab::new();
    let lease = Duration::from_secs(2);
    let mut gate = lab.gate();
    lab.as_daemon(|| gate.set(Some(lease))).expect("set");
    let mut stream = lab.connect("client", SERVER[0], GATE).expect("open");
    let end = clock::now() + Duration::from_secs(7);
    let (trips, longest) = std::thread::scope(|scope| {
        let talking = scope.spawn(move || {
            let (mut trips, mut longest) = (0u32, Duration::ZERO);
            while clock::now() < end {
                let asked = clock::now();
                round_trip(&mut stream, trips.to_le_bytes()[0]).expect("not one byte is lost");
                longest = longest.max(clock::now().since(asked));
                trips += 1;
            }
            (trips, longest)
        });
        lab.as_daemon(|| {
            let mut renewals = 0;
            while clock::now() < end {
                // Some by far before the end, some in a row.
                assert_eq!(gate.set(Some(lease)), Ok(Stood::Yes));
                renewals += 1;
                std::thread::sleep(Duration::from_millis(if renewals % 3 == 0 { 700 } else { 1 }));
            }
        });
        talking.join().expect("no byte was lost")
    });
    eprintln!("figure: {trips} round trips over renewals, the longest {longest:?}");
    // The wall resets what it does not pass, so a gap between two renewals would have ended the session. (The longest
    // round trip tells whether something was sent again, 200 ms later; a busy machine has such without a loss.)
    assert!(trips > 100, "only {trips} round trips");
}

#[test]
fn without_a_lease_only_loopback_and_the_other_node_reach_postgresql() {
    let lab = Lab::new();
    let mut gate = lab.gate();
    let refused = Err(ErrorKind::ConnectionRefused);
    let check = |open: bool| {
        let others = if open { Ok(()) } else { refused };
        for address in SERVER {
            assert_eq!(lab.knock("client", address, GATE), others, "client to the gate at {address}, lease {open}");
            assert_eq!(lab.knock("client", address, POSTGRES), others, "client to PostgreSQL at {address}");
            assert_eq!(lab.knock("peer", address, GATE), others, "the other node is a client of the gate at {address}");
            assert_eq!(lab.knock("peer", address, POSTGRES), Ok(()), "replication at {address}, lease {open}");
            assert_eq!(lab.knock("server", address, POSTGRES), Ok(()), "PostgreSQL from its own host at {address}");
            assert_eq!(lab.knock("server", address, GATE), others, "a local client at {address} is a client");
        }
        for loopback in ["127.0.0.1", "::1"] {
            assert_eq!(lab.knock("server", loopback, POSTGRES), Ok(()), "PostgreSQL over {loopback}");
            assert_eq!(lab.knock("server", loopback, GATE), others, "the gate over {loopback}");
        }
        for address in PEER {
            assert_eq!(lab.knock("server", address, POSTGRES), Ok(()), "this host to the other node's PostgreSQL");
        }
    };
    check(false);
    lab.set(&mut gate, Some(60_000));
    check(true);
    // Taken back at once, not at the end of what was set before; an open session to the gate too, replication not.
    let mut client = lab.connect("client", SERVER[0], GATE).expect("open");
    let mut standby = lab.connect("peer", SERVER[0], POSTGRES).expect("open");
    lab.set(&mut gate, None);
    assert_eq!(round_trip(&mut client, 1).map_err(|error| error.kind()), Err(ErrorKind::ConnectionReset));
    assert!(round_trip(&mut standby, 2).is_ok(), "replication was cut");
    check(false);
    // Less than a millisecond is nothing.
    lab.as_daemon(|| gate.set(Some(Duration::from_micros(900)))).expect("set");
    check(false);
    lab.as_daemon(|| gate.remove()).expect("removed");
    assert_eq!(lab.knock("client", SERVER[0], GATE), Ok(()), "the wall stands although its table is gone");
}

#[test]
fn a_table_of_a_former_life_is_replaced_and_others_are_left_alone() {
    let lab = Lab::new();
    // Somebody else's, one of them under our name in another family.
    lab.nft(&["add table inet other; add set inet other s { type ipv4_addr; flags timeout; }; \
         add element inet other s { 198.51.100.7 }; \
         add chain inet other input { type filter hook input priority 5; policy accept; }; \
         add rule inet other input tcp dport 1 counter drop; \
         add table ip portcullis; add chain ip portcullis c; add rule ip portcullis c ip saddr 198.51.100.8 drop"]);
    let others = lab.nft(&["-s", "list", "ruleset"]);
    // A former life's lease, for ever, and a rule that lets everybody in.
    lab.nft(&["add table inet portcullis; add set inet portcullis lease { type inet_proto; flags timeout; }; \
         add element inet portcullis lease { tcp }; add chain inet portcullis old; \
         add rule inet portcullis old accept"]);
    let mut gate = lab.gate();
    assert_eq!(lab.knock("client", SERVER[0], GATE), Err(ErrorKind::ConnectionRefused), "the old lease still counts");
    let shown = lab.nft(&["list", "table", "inet", "portcullis"]);
    assert!(!shown.contains("chain old") && !shown.contains("elements = { tcp"), "{shown}");
    lab.set(&mut gate, Some(60_000));
    let shown = lab.nft(&["list", "table", "inet", "portcullis"]);
    eprintln!("{shown}");
    // As an administrator reads it.
    for words in [
        "elements = { tcp timeout 1m expires ",
        "elements = { 192.0.2.12 }",
        "elements = { 2001:db8:77::12 }",
        "type filter hook input priority filter; policy accept;",
        "type filter hook output priority filter; policy accept;",
        "tcp flags rst accept",
        "tcp dport 5432 iifname \"lo\" accept",
        "tcp dport 5432 ip saddr @nodes4 accept",
        "tcp dport 5432 ip6 saddr @nodes6 accept",
        "tcp sport 5432 oifname \"lo\" accept",
        "tcp sport 5432 ip daddr @nodes4 accept",
        "tcp dport 6432 jump wall",
        "tcp sport 6432 jump wall",
        "tcp sport 5432 jump wall",
        "meta l4proto @lease accept",
        "reject with tcp reset",
    ] {
        assert!(shown.contains(words), "{words} is not in\n{shown}");
    }
    lab.as_daemon(|| gate.remove()).expect("removed");
    assert_eq!(lab.nft(&["-s", "list", "ruleset"]), others, "another table was touched");
    // The same where the configuration has no wall any more.
    assert_eq!(lab.as_daemon(remove_leftover), Ok(false));
    lab.gate();
    assert_eq!(lab.as_daemon(remove_leftover), Ok(true));
    assert_eq!(lab.nft(&["-s", "list", "ruleset"]), others, "another table was touched");
}

#[test]
fn a_table_that_somebody_took_away_stands_again_with_the_next_word() {
    let lab = Lab::new();
    let mut gate = lab.gate();
    lab.set(&mut gate, Some(60_000));
    for (word, after) in [(None, Err(ErrorKind::ConnectionRefused)), (Some(60_000), Ok(()))] {
        lab.nft(&["flush", "ruleset"]);
        assert_eq!(lab.set(&mut gate, word), Stood::No);
        assert_eq!(lab.knock("client", SERVER[0], GATE), after);
        assert_eq!(lab.set(&mut gate, word), Stood::Yes);
        lab.set(&mut gate, None);
        assert_eq!(lab.knock("client", SERVER[0], GATE), Err(ErrorKind::ConnectionRefused), "the wall does not stand");
    }
}

/// The wall stands though its maker is gone, and shuts by itself.
#[test]
fn the_wall_outlives_the_socket_that_made_it() {
    let lab = Lab::new();
    let mut gate = lab.gate();
    let lease = Duration::from_secs(3);
    let before = clock::now();
    lab.as_daemon(|| gate.set(Some(lease))).expect("set");
    let set = clock::now();
    drop(gate);
    // When the last knock that was let in began: how long a refused one takes is the machine's business.
    let mut let_in = None;
    loop {
        let knocks = clock::now();
        match lab.knock("client", SERVER[0], GATE) {
            Ok(()) => let_in = Some(knocks),
            // It may shut between the handshake and the answer.
            Err(kind) => break assert!(matches!(kind, ErrorKind::ConnectionRefused | ErrorKind::ConnectionReset)),
        }
        assert!(clock::now().since(set) < PATIENCE, "it never shut");
    }
    let (let_in, refused) = (let_in.expect("shut at once").since(set), clock::now().since(before));
    assert!(let_in <= lease + TICKS, "let in {let_in:?} after it was set");
    assert!(refused + TICKS >= lease, "refused {refused:?} after it was set");
}

#[test]
fn without_the_capability_it_says_so() {
    let lab = Lab::new();
    let made = lab.inside("server", || {
        become_postgres(CapabilitySet::NET_RAW);
        (KernelGate::new(plan()).map(drop), remove_leftover())
    });
    assert!(made.0.as_ref().is_err_and(|text| text.contains("CAP_NET_ADMIN")), "{made:?}");
    assert_eq!(made.1, Ok(false), "where none is configured, none is missed");
    assert_eq!(lab.knock("client", SERVER[0], GATE), Ok(()), "half a wall was made");
}
