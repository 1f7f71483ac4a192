//! The VIP's hand and sense against a real kernel: three hosts on one bridge, each a network namespace made here and
//! removed at the end, also when a test fails. Everything of ours runs with CAP_NET_ADMIN and CAP_NET_RAW alone.
//!
//! Over 600 lines because every case of one contract stands here beside the few helpers they all share.

use futures_util::TryStreamExt;
use netlink_packet_route::address::{AddressAttribute, AddressProtocol};
use portcullis::base::time::Instant;
use portcullis::io::arp::PacketSocket;
use portcullis::io::clock;
use portcullis::io::links::{EVENTS_WAITING, LinkEvent, LinkWatch};
use portcullis::io::neighbour;
use portcullis::io::vip::{PROBE_TIME, PROTOCOL_MARK, VipHand, find_interface};
use portcullis::wire::arp::{self, Mac};
use rustix::thread::{CapabilitySet, CapabilitySets, LinkNameSpaceType};
use std::net::{IpAddr, UdpSocket};
use std::os::fd::AsFd;
use std::pin::Pin;
use std::process::{Command, Output};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;
use tokio::sync::mpsc;

const VIP4: &str = "192.0.2.100/24";
const VIP6: &str = "2001:db8:77::100/64";
const BOTH: [&str; 2] = [VIP4, VIP6];

/// Longest wait for something that must happen; only a failing test waits so long.
const PATIENCE: Duration = Duration::from_secs(30);
/// How long a question to the link may take whose answer normally comes at once: a busy machine takes its time.
const ANSWERS_COME: Duration = Duration::from_millis(1500);
/// A lifetime in seconds that no test outlives.
const LONG: u32 = 600;

fn sh(program: &str, args: &[&str]) -> Output {
    Command::new(program).args(args).output().unwrap_or_else(|error| panic!("{program}: {error}"))
}

fn ip(args: &str) -> String {
    let words: Vec<&str> = args.split_whitespace().collect();
    let output = sh("ip", &words);
    assert!(output.status.success(), "ip {args}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("text")
}

fn install_what_is_missing() {
    if Command::new("ip").arg("-V").output().is_err() {
        let update = sh("apt-get", &["update"]);
        let install = sh("apt-get", &["install", "-y", "iproute2"]);
        assert!(update.status.success() && install.status.success(), "iproute2 could not be installed");
    }
}

type Job = Pin<Box<dyn Future<Output = ()> + Send>>;

/// A host: a namespace with `eth0` on the bridge, and one thread in it that runs what it is given, on a runtime.
struct Host {
    namespace: String,
    address: IpAddr,
    mac: Mac,
    jobs: Option<mpsc::UnboundedSender<Job>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Host {
    fn new(namespace: String, number: u8, mac: Mac) -> Host {
        let (jobs, mut queue) = mpsc::unbounded_channel::<Job>();
        let inside = namespace.clone();
        let thread = std::thread::spawn(move || {
            let file = std::fs::File::open(format!("/run/netns/{inside}")).expect("namespace");
            rustix::thread::move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network)).expect("setns");
            let two = CapabilitySet::NET_ADMIN | CapabilitySet::NET_RAW;
            let sets = CapabilitySets { effective: two, permitted: two, inheritable: CapabilitySet::empty() };
            rustix::thread::set_capabilities(None, sets).expect("capset");
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime");
            runtime.block_on(async {
                while let Some(job) = queue.recv().await {
                    tokio::spawn(job);
                }
            });
        });
        let address = IpAddr::from([192, 0, 2, number]);
        Host { namespace, address, mac, jobs: Some(jobs), thread: Some(thread) }
    }

    /// Runs a future in the host and waits for its result.
    fn run<T: Send + 'static>(&self, future: impl Future<Output = T> + Send + 'static) -> T {
        let (done, result) = std::sync::mpsc::channel();
        let job = async move {
            let _ = done.send(future.await);
        };
        assert!(self.jobs.as_ref().expect("running").send(Box::pin(job)).is_ok(), "the host's thread is gone");
        result.recv_timeout(Duration::from_secs(60)).expect("the host did not finish its job")
    }

    fn ip(&self, args: &str) -> String {
        ip(&format!("-n {} {args}", self.namespace))
    }

    fn hand(&self, net: &str) -> VipHand {
        let net = net.parse().expect("net");
        self.run(async move { VipHand::new(&net, None).await }).expect("eth0 has the subnet")
    }

    fn bind(&self, hand: &VipHand, seconds: u32) {
        let hand = hand.clone();
        self.run(async move { hand.bind(seconds).await }).expect("bind");
    }

    fn unbind(&self, hand: &VipHand) -> bool {
        let hand = hand.clone();
        self.run(async move { hand.unbind().await }).expect("unbind")
    }

    fn is_bound(&self, hand: &VipHand) -> bool {
        let hand = hand.clone();
        self.run(async move { hand.is_bound().await }).expect("is_bound")
    }

    /// Probes for longer than the daemon does; a holder's answer ends it early.
    fn probe(&self, hand: &VipHand) -> Result<Option<Mac>, String> {
        let hand = hand.clone();
        self.run(async move { hand.probe(ANSWERS_COME).await })
    }

    /// Asks the witnesses from the VIP.
    fn ask(&self, hand: &VipHand, witnesses: &[&str]) -> Result<IpAddr, String> {
        let hand = hand.clone();
        let witnesses: Vec<IpAddr> = witnesses.iter().map(|address| address.parse().expect("address")).collect();
        self.run(async move { neighbour::ask(&hand, &witnesses, ANSWERS_COME).await })
    }

    fn watch(&self, hands: &[&VipHand], waiting: usize) -> Watched {
        let vips: Vec<_> = hands.iter().map(|hand| hand.vip().clone()).collect();
        let (sender, events) = mpsc::channel(waiting);
        let watch = self.run(async move { LinkWatch::start(&vips, sender) });
        Watched { events, _watch: watch }
    }

    /// Makes the kernel learn who has the address, as a client's first packet does.
    fn talk_to(&self, address: IpAddr) {
        self.run(async move {
            let socket = UdpSocket::bind(if address.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" }).expect("socket");
            let _refused = socket.send_to(b"hello", (address, 9));
        });
    }

    /// The MAC this host's kernel has for the address.
    fn neighbour(&self, address: IpAddr) -> Option<String> {
        let line = self.ip(&format!("neigh show {address} dev eth0"));
        let mut words = line.split_whitespace().skip_while(|word| *word != "lladdr");
        words.nth(1).map(str::to_owned)
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        self.jobs = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// A running watch and what it says.
struct Watched {
    events: mpsc::Receiver<LinkEvent>,
    _watch: LinkWatch,
}

impl Watched {
    fn next(&mut self, limit: Duration) -> Option<LinkEvent> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().expect("runtime");
        runtime.block_on(async { tokio::time::timeout(limit, self.events.recv()).await.ok().flatten() })
    }

    /// Waits for the event, passing over others; says when it came.
    fn wait_for(&mut self, wanted: LinkEvent) -> Instant {
        let deadline = clock::now() + PATIENCE;
        let mut others = Vec::new();
        while clock::now() < deadline {
            match self.next(deadline.since(clock::now())) {
                Some(event) if event == wanted => return clock::now(),
                Some(event) => others.push(event),
                None => break,
            }
        }
        panic!("{wanted:?} did not come, but {others:?}");
    }

    fn expect_silence(&mut self, span: Duration) {
        assert_eq!(self.next(span), None);
    }
}

/// A bridge and three hosts on it.
struct Lab {
    a: Host,
    b: Host,
    c: Host,
    // Dropped after the hosts, whose threads stand in them.
    _namespaces: Namespaces,
    switch: String,
}

/// Namespaces that go away with this value, whatever happens.
struct Namespaces(Vec<String>);

impl Drop for Namespaces {
    fn drop(&mut self) {
        for name in &self.0 {
            let _ = Command::new("ip").args(["netns", "del", name]).output();
        }
    }
}

impl Lab {
    fn new() -> Lab {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        install_what_is_missing();
        let tag = format!("pcvip{}-{}", std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed));
        let mut namespaces = Namespaces(Vec::new());
        let mut make = |role: &str| {
            let name = format!("{tag}-{role}");
            ip(&format!("netns add {name}"));
            namespaces.0.push(name.clone());
            name
        };
        let switch = make("sw");
        ip(&format!("-n {switch} link add br0 type bridge forward_delay 0 mcast_snooping 0"));
        ip(&format!("-n {switch} link set br0 up"));
        let mut host = |role: &str, number: u8| {
            let namespace = make(role);
            let mac = [2, 0, 0x5e, 0, 0, number];
            let text = arp::mac_text(mac);
            ip(&format!("-n {switch} link add port-{role} type veth peer name eth0 address {text} netns {namespace}"));
            ip(&format!("-n {switch} link set port-{role} master br0 up"));
            ip(&format!("-n {namespace} link set lo up"));
            ip(&format!("-n {namespace} address add 192.0.2.{number}/24 dev eth0"));
            ip(&format!("-n {namespace} address add 2001:db8:77::{number}/64 dev eth0 nodad"));
            ip(&format!("-n {namespace} link set eth0 up"));
            Host::new(namespace, number, mac)
        };
        let (a, b, c) = (host("a", 11), host("b", 12), host("c", 13));
        let lab = Lab { a, b, c, _namespaces: namespaces, switch };
        // The bridge forwards once its ports do: c reaches the others.
        for other in [&lab.a, &lab.b] {
            eventually("the bridge forwards", || {
                lab.c.talk_to(other.address);
                lab.c.neighbour(other.address) == Some(arp::mac_text(other.mac))
            });
        }
        lab
    }

    /// b claims the IPv4 VIP until a hears it: how long the switch takes to pass frames to a link that has just come up
    /// is not ours.
    fn announces_until_heard(&self, watched: &mut Watched) {
        let hand = self.b.hand(VIP4);
        let claim = LinkEvent::ForeignClaim { address: hand.vip().address, mac: self.b.mac };
        let deadline = clock::now() + PATIENCE;
        loop {
            let announcing = hand.clone();
            self.b.run(async move { announcing.announce().await }).expect("announce");
            if watched.next(Duration::from_millis(200)) == Some(claim) {
                break;
            }
            assert!(clock::now() < deadline, "claims are not heard");
        }
    }

    /// Gives host a another interface on the same link.
    fn second_interface(&self) {
        ip(&format!("-n {} link add port-a1 type veth peer name eth1 netns {}", self.switch, self.a.namespace));
        ip(&format!("-n {} link set port-a1 master br0 up", self.switch));
        self.a.ip("link set eth1 up");
        eventually("eth1 has carrier", || self.a.ip("link show eth1").contains("LOWER_UP"));
    }
}

fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = clock::now() + PATIENCE;
    while !condition() {
        assert!(clock::now() < deadline, "never came true: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Waits until the host answers for the VIP that it has just bound: Linux listens for questions about a new IPv6
/// address a moment later.
fn listens(host: &Host, hand: &VipHand) {
    eventually("the holder listens for the VIP", || {
        hand.vip().address.is_ipv4() || host.ip("maddr show dev eth0").contains("ff02::1:ff00:100")
    });
}

fn added(hand: &VipHand) -> LinkEvent {
    LinkEvent::AddressAdded { address: hand.vip().address, ifindex: hand.vip().interface_index }
}

fn removed(hand: &VipHand) -> LinkEvent {
    LinkEvent::AddressRemoved { address: hand.vip().address }
}

/// The lower bound is the claim (not before its time, less the 20 ms by which Linux rounds an age up); the upper one is
/// only that it goes at all: Linux looks for what has run out once a second at most, later on a busy machine.
#[test]
fn the_kernel_removes_a_vip_that_nobody_renews_and_keeps_one_that_is() {
    const LIFETIME: u32 = 4;
    let lab = Lab::new();
    let hands = BOTH.map(|net| lab.a.hand(net));
    let mut watched = hands.each_ref().map(|hand| lab.a.watch(&[hand], EVENTS_WAITING));
    // Renewed by far before its end it outlives its time, ...
    let began = clock::now();
    let mut bound_at = began;
    hands.iter().for_each(|hand| lab.a.bind(hand, LIFETIME));
    while clock::now().since(began) < Duration::from_secs(LIFETIME.into()) + Duration::from_millis(1500) {
        std::thread::sleep(Duration::from_millis(500));
        assert!(hands.iter().all(|hand| lab.a.is_bound(hand)), "gone {:?} after the bind", clock::now().since(began));
        bound_at = clock::now();
        hands.iter().for_each(|hand| lab.a.bind(hand, LIFETIME));
    }
    // ... and with the last renewal its time runs.
    for (hand, watched) in hands.iter().zip(&mut watched) {
        watched.wait_for(added(hand));
        let lived = watched.wait_for(removed(hand)).since(bound_at);
        eprintln!("figure: {} of {LIFETIME} s lived {lived:?} after its last renewal", hand.vip().address);
        assert!(lived >= Duration::from_millis(u64::from(LIFETIME) * 1000 - 30), "{hand:?} lived only {lived:?}");
        assert!(!lab.a.is_bound(hand));
    }
}

#[test]
fn a_vip_is_bound_as_the_design_says() {
    let lab = Lab::new();
    for net in BOTH {
        let hand = lab.a.hand(net);
        assert!(!lab.a.is_bound(&hand));
        lab.a.bind(&hand, LONG);
        assert!(lab.a.is_bound(&hand));
        let address = hand.vip().address;
        let shown = lab.a.ip(&format!("address show dev eth0 to {address}"));
        let (want, never) = match address {
            IpAddr::V4(_) => (["192.0.2.100/32", "noprefixroute"], "192.0.2.255"),
            IpAddr::V6(_) => (["::100/128", "noprefixroute"], "tentative"),
        };
        assert!(want.iter().all(|word| shown.contains(word)) && !shown.contains(never), "{shown}");
        // What is left of it by the time `ip` looks.
        let valid = seconds_after(&shown, "valid_lft ");
        let preferred = if address.is_ipv4() { valid } else { 0 };
        assert!((LONG - 60..=LONG).contains(&valid), "{shown}");
        assert_eq!(seconds_after(&shown, "preferred_lft "), preferred, "{shown}");
        assert!(lab.a.run(marked_as_ours(address)), "not marked as ours");
        for bad in [0, u32::MAX] {
            let hand = hand.clone();
            assert!(lab.a.run(async move { hand.bind(bad).await }).is_err(), "a lifetime of {bad}");
        }
    }
}

fn seconds_after(shown: &str, word: &str) -> u32 {
    let rest = shown.split_once(word).map(|(_, rest)| rest).and_then(|rest| rest.split_once("sec"));
    rest.and_then(|(number, _)| number.parse().ok()).unwrap_or_else(|| panic!("no seconds after {word:?}: {shown}"))
}

/// IFA_PROTO, which the `ip` of Debian 12 does not show yet.
async fn marked_as_ours(address: IpAddr) -> bool {
    let (connection, handle, _) = rtnetlink::new_connection().expect("netlink");
    tokio::spawn(connection);
    let mut found = handle.address().get().set_address_filter(address).execute();
    let message = found.try_next().await.expect("dump").expect("bound");
    message.attributes.contains(&AddressAttribute::Protocol(AddressProtocol::Other(PROTOCOL_MARK)))
}

#[test]
fn an_operators_deletion_is_told() {
    let lab = Lab::new();
    for net in BOTH {
        let hand = lab.a.hand(net);
        let mut watched = lab.a.watch(&[&hand], EVENTS_WAITING);
        lab.a.bind(&hand, LONG);
        watched.wait_for(added(&hand));
        lab.a.bind(&hand, LONG);
        watched.expect_silence(Duration::from_millis(100)); // a renewal is no news
        let prefix = if hand.vip().address.is_ipv4() { 32 } else { 128 };
        lab.a.ip(&format!("address del {}/{prefix} dev eth0", hand.vip().address));
        let deleted_at = clock::now();
        let delay = watched.wait_for(removed(&hand)).since(deleted_at);
        eprintln!("figure: the deletion of {} was told after {delay:?}", hand.vip().address);
        assert!(!lab.a.is_bound(&hand));
    }
}

#[test]
fn a_link_that_goes_down_or_loses_its_carrier_is_told() {
    let lab = Lab::new();
    let (hand, hand6) = (lab.a.hand(VIP4), lab.a.hand(VIP6));
    let ifindex = hand.vip().interface_index;
    let mut watched = lab.a.watch(&[&hand], EVENTS_WAITING);
    let mut watched6 = lab.a.watch(&[&hand6], EVENTS_WAITING);
    watched.wait_for(LinkEvent::LinkUp { ifindex });
    lab.a.bind(&hand6, LONG);
    watched6.wait_for(added(&hand6));
    // Carrier: the far end goes.
    ip(&format!("-n {} link set port-a down", lab.switch));
    watched.wait_for(LinkEvent::LinkDown { ifindex });
    let asked = lab.a.probe(&hand);
    assert!(asked.as_ref().is_err_and(|text| text.contains("down")), "silence on a dead link is no answer: {asked:?}");
    ip(&format!("-n {} link set port-a up", lab.switch));
    watched.wait_for(LinkEvent::LinkUp { ifindex });
    // The interface itself: IPv6 addresses go with it.
    lab.a.ip("link set eth0 down");
    watched.wait_for(LinkEvent::LinkDown { ifindex });
    watched6.wait_for(removed(&hand6));
    let up = hand.clone();
    assert_eq!(lab.a.run(async move { up.link_is_up().await }), Ok(false));
    lab.a.ip("link set eth0 up");
    watched.wait_for(LinkEvent::LinkUp { ifindex });
    lab.announces_until_heard(&mut watched);
}

#[test]
fn an_interface_that_joins_and_leaves_a_bridge_is_not_gone() {
    let lab = Lab::new();
    let hand = lab.a.hand(VIP4);
    let ifindex = hand.vip().interface_index;
    let mut watched = lab.a.watch(&[&hand], EVENTS_WAITING);
    watched.wait_for(LinkEvent::LinkUp { ifindex });
    lab.a.ip("link add inner type bridge");
    lab.a.ip("link set eth0 master inner");
    lab.a.ip("link set eth0 nomaster"); // the kernel says RTM_DELLINK for the port that it no longer is
    watched.expect_silence(Duration::from_millis(300));
}

#[test]
fn an_interface_that_is_made_anew_is_the_vips_again() {
    let lab = Lab::new();
    let hand = lab.a.hand(VIP4);
    let old = hand.vip().interface_index;
    let mut watched = lab.a.watch(&[&hand], EVENTS_WAITING);
    watched.wait_for(LinkEvent::LinkUp { ifindex: old });
    lab.a.ip("link del eth0");
    watched.wait_for(LinkEvent::LinkDown { ifindex: old });
    let gone = hand.clone();
    assert!(lab.a.run(async move { gone.bind(LONG).await }).is_err_and(|text| text.contains("eth0")));
    ip(&format!("-n {} link add port-a type veth peer name eth0 netns {}", lab.switch, lab.a.namespace));
    ip(&format!("-n {} link set port-a master br0 up", lab.switch));
    lab.a.ip("link set eth0 up");
    let any = VIP4.parse().expect("net");
    let (new, ..) = lab.a.run(async move { find_interface(&any, Some("eth0")).await }).expect("eth0 again");
    assert_ne!(new, old);
    watched.wait_for(LinkEvent::LinkUp { ifindex: new });
    lab.a.bind(&hand, LONG);
    watched.wait_for(LinkEvent::AddressAdded { address: hand.vip().address, ifindex: new });
    lab.announces_until_heard(&mut watched);
}

#[test]
fn a_probe_finds_who_holds_the_vip_and_only_then() {
    let lab = Lab::new();
    for net in BOTH {
        let (hand, other) = (lab.a.hand(net), lab.b.hand(net));
        let began = clock::now();
        let asking = hand.clone();
        assert_eq!(lab.a.run(async move { asking.probe(PROBE_TIME).await }), Ok(None), "{net}: nobody holds it");
        let took = clock::now().since(began);
        eprintln!("figure: a probe of {net} that nobody answered took {took:?}");
        assert!(took >= PROBE_TIME, "{took:?}");
        lab.b.bind(&other, LONG);
        listens(&lab.b, &other);
        assert_eq!(lab.a.probe(&hand), Ok(Some(lab.b.mac)), "{net}");
        assert!(lab.b.unbind(&other));
        assert_eq!(lab.a.probe(&hand), Ok(None), "{net}: it let go");
        // Bound here already: our own kernel's answers are no foreigner's.
        lab.a.bind(&hand, LONG);
        assert_eq!(lab.a.probe(&hand), Ok(None), "{net}: we hold it");
        // Linux answers on every interface for every address: a second one on the link must not look like a foreigner.
        if net == VIP4 {
            lab.second_interface();
            assert_eq!(lab.a.probe(&hand), Ok(None), "{net}: our own other interface answered");
        }
        lab.a.unbind(&hand);
    }
}

#[test]
fn of_two_that_probe_at_once_neither_finds_the_way_free() {
    let lab = Lab::new();
    let (hand, other) = (lab.a.hand(VIP4), lab.b.hand(VIP4));
    // So long that they overlap on a busy machine, too.
    let long = Duration::from_secs(3);
    let both = std::thread::scope(|scope| {
        let first = scope.spawn(|| lab.a.run(async move { hand.probe(long).await }));
        let second = lab.b.run(async move { other.probe(long).await });
        (first.join().expect("no panic"), second)
    });
    // Whoever began to listen first hears the other; at worst one of them has finished its questions before.
    assert!(both.0 == Ok(Some(lab.b.mac)) || both.1 == Ok(Some(lab.a.mac)), "{both:?}");
}

#[test]
fn a_witness_is_one_that_answers_the_vip_while_nobody_else_has_it() {
    let lab = Lab::new();
    for (net, there, not_there) in [(VIP4, "192.0.2.13", "192.0.2.99"), (VIP6, "2001:db8:77::13", "2001:db8:77::99")] {
        let (hand, other) = (lab.a.hand(net), lab.b.hand(net));
        let vip = hand.vip().address;
        let found = Ok(there.parse().expect("address"));
        // Not bound: not asked, since the question alone would move the caches of whoever hears it.
        assert!(lab.a.ask(&hand, &[there]).is_err_and(|text| text.contains("not bound")), "{net}");
        assert_eq!(lab.c.neighbour(vip), None, "{net}: c was taught an address that is not bound");
        lab.a.bind(&hand, LONG);
        let began = clock::now();
        assert_eq!(lab.a.ask(&hand, &[there]), found, "{net}");
        let took = clock::now().since(began);
        eprintln!("figure: the witness of {net} was heard after {took:?}");
        assert!(took >= neighbour::OTHERS_SPEAK, "{net}: another holder had no time to speak: {took:?}");
        // One of several suffices, those of the other family are passed over; silence is no answer.
        assert_eq!(lab.a.ask(&hand, &[not_there, "192.0.2.13", "2001:db8:77::13"]), found, "{net}");
        assert!(lab.a.ask(&hand, &[not_there]).is_err_and(|text| text.contains("answered")), "{net}");
        assert!(lab.a.ask(&hand, &["::1", "127.0.0.1"]).is_err(), "{net}");
        // Another that probes for the VIP meanwhile (the other node does so again and again) asks, and claims nothing.
        std::thread::scope(|scope| {
            let probing = scope.spawn(|| lab.b.probe(&other));
            for _ in 0..3 {
                assert_eq!(lab.a.ask(&hand, &[there]), found, "{net}: beside another's probe");
            }
            assert_eq!(probing.join().expect("no panic"), Ok(Some(lab.a.mac)), "{net}");
        });
        // The gateway, when none is named; none at all when there is no gateway.
        assert!(lab.a.ask(&hand, &[]).is_err_and(|text| text.contains("gateway")), "{net}");
        lab.a.ip(&format!("route add default via {there}"));
        assert_eq!(lab.a.ask(&hand, &[]), found, "{net}: the gateway");
        // Another holder speaks up, however quick the witness is.
        lab.b.bind(&other, LONG);
        listens(&lab.b, &other);
        for _ in 0..5 {
            let said = lab.a.ask(&hand, &[there]);
            assert!(said.as_ref().is_err_and(|text| text.contains(&arp::mac_text(lab.b.mac))), "{net}: {said:?}");
        }
        assert!(lab.b.unbind(&other));
        assert_eq!(lab.a.ask(&hand, &[there]), found, "{net}: it let go");
        // A witness that is one of our own addresses proves nothing.
        let own = if vip.is_ipv4() { "192.0.2.11" } else { "2001:db8:77::11" };
        assert!(lab.a.ask(&hand, &[own]).is_err(), "{net}");
        ip(&format!("-n {} link set port-a down", lab.switch));
        assert!(lab.a.ask(&hand, &[there]).is_err(), "{net}: asked on a dead link");
        ip(&format!("-n {} link set port-a up", lab.switch));
        eventually("carrier", || lab.a.ip("link show eth0").contains("LOWER_UP"));
        lab.a.unbind(&hand);
    }
}

#[test]
fn an_announcement_moves_a_third_hosts_cache() {
    let lab = Lab::new();
    for net in BOTH {
        let (old, new) = (lab.b.hand(net), lab.a.hand(net));
        let vip = old.vip().address;
        let (old_mac, new_mac) = (arp::mac_text(lab.b.mac), arp::mac_text(lab.a.mac));
        let both_announcements: [(&str, bool); 2] = [("announce", false), ("announce_burst", true)];
        for (what, burst) in both_announcements {
            lab.b.bind(&old, LONG);
            eventually("c learns the old holder", || {
                lab.c.talk_to(vip);
                lab.c.neighbour(vip) == Some(old_mac.clone())
            });
            lab.b.unbind(&old);
            lab.a.bind(&new, LONG);
            assert_eq!(lab.c.neighbour(vip), Some(old_mac.clone()), "binding alone tells nobody");
            let hand = new.clone();
            let announced = clock::now();
            lab.a
                .run(async move { if burst { hand.announce_burst().await } else { hand.announce().await } })
                .expect("announced");
            eventually(what, || lab.c.neighbour(vip) == Some(new_mac.clone()));
            // By itself an entry is doubted 15 s after its last confirmation at the earliest (half of 30 s).
            let took = clock::now().since(announced);
            eprintln!("figure: {what} moved the entry of {net} after {took:?}");
            assert!(took < Duration::from_secs(10), "{what} took {took:?}; the cache moved for another reason");
            lab.a.unbind(&new);
            lab.c.ip(&format!("neigh flush to {vip} dev eth0"));
        }
    }
}

#[test]
fn each_form_of_gratuitous_arp_moves_a_fresh_cache_entry_by_itself() {
    let lab = Lab::new();
    let hand = lab.b.hand(VIP4);
    let IpAddr::V4(vip) = hand.vip().address else { panic!("IPv4") };
    let ours = lab.a.hand(VIP4).vip().clone();
    let forms: [(&str, Vec<u8>); 2] =
        [("request", arp::gratuitous_request(ours.mac, vip)), ("reply", arp::gratuitous_reply(ours.mac, vip))];
    for (form, frame) in forms {
        lab.b.bind(&hand, LONG);
        eventually("c learns the old holder", || {
            lab.c.talk_to(vip.into());
            lab.c.neighbour(vip.into()) == Some(arp::mac_text(lab.b.mac))
        });
        lab.b.unbind(&hand);
        let index = ours.interface_index;
        lab.a.run(async move { PacketSocket::open(index, vip.into())?.send(&frame).await }).expect("sent");
        eventually(form, || lab.c.neighbour(vip.into()) == Some(arp::mac_text(lab.a.mac)));
        lab.c.ip(&format!("neigh flush to {vip} dev eth0"));
    }
}

#[test]
fn a_foreign_claim_is_told_and_our_own_frames_are_not() {
    let lab = Lab::new();
    lab.second_interface(); // its frames are ours
    for net in BOTH {
        let (hand, other) = (lab.a.hand(net), lab.b.hand(net));
        let address = hand.vip().address;
        let mut watched = lab.a.watch(&[&hand], EVENTS_WAITING);
        watched.wait_for(LinkEvent::LinkUp { ifindex: hand.vip().interface_index });
        let any = net.parse().expect("net");
        let eth1 = lab.a.run(async move { VipHand::new(&any, Some("eth1")).await }).expect("eth1");
        for own in [hand.clone(), eth1] {
            lab.a.run(async move { own.announce_burst().await }).expect("announce");
        }
        watched.expect_silence(Duration::from_millis(100));
        let announcing = other.clone();
        lab.b.run(async move { announcing.announce_burst().await }).expect("announce");
        let sent = clock::now();
        let heard = watched.wait_for(LinkEvent::ForeignClaim { address, mac: lab.b.mac }).since(sent);
        eprintln!("figure: a foreign claim on {net} was told {heard:?} after the burst");
        // A whole burst is one claim; a probe is a question, not a claim.
        let asking = other.clone();
        assert_eq!(lab.b.run(async move { asking.probe(PROBE_TIME).await }), Ok(None));
        watched.expect_silence(Duration::from_millis(100));
    }
}

#[test]
fn every_stale_instance_is_removed_whoever_bound_it() {
    let lab = Lab::new();
    lab.a.ip("link add other type veth peer name far");
    for (net, stale) in [(VIP4, ["/24", "/32"]), (VIP6, ["/64", "/128"])] {
        let hand = lab.a.hand(net);
        let address = hand.vip().address;
        for (device, prefix) in [("eth0", stale[0]), ("other", stale[1])] {
            lab.a.ip(&format!("address add {address}{prefix} dev {device}"));
        }
        assert!(lab.a.is_bound(&hand) || address.is_ipv6(), "for ever, by hand");
        if address.is_ipv4() {
            lab.a.bind(&hand, LONG); // and a /32 of ours beside the /24
        }
        assert!(lab.a.unbind(&hand));
        assert_eq!(lab.a.ip(&format!("address show to {address}")), "");
        assert!(!lab.a.unbind(&hand), "there is none left");
        assert!(lab.a.ip("address show dev eth0").contains("192.0.2.11/24"), "the host keeps its own");
    }
}

#[test]
fn the_interface_is_the_named_one_or_the_one_with_the_subnet() {
    let lab = Lab::new();
    let find = |net: &str, name: Option<&'static str>| {
        let net = net.parse().expect("net");
        lab.a.run(async move { find_interface(&net, name).await })
    };
    let eth0 = find(VIP4, None).expect("found");
    assert_eq!((eth0.1.as_str(), eth0.2), ("eth0", lab.a.mac));
    assert_eq!(find(VIP6, None).as_ref(), Ok(&eth0));
    assert_eq!(find("198.51.100.7/24", Some("eth0")).as_ref(), Ok(&eth0), "a name needs no subnet");
    assert!(find("198.51.100.7/24", None).is_err_and(|text| text.contains("interface")));
    assert!(find(VIP4, Some("eth7")).is_err_and(|text| text.contains("eth7")));
    // A left-over instance on another interface does not mislead; a second interface in the subnet is ambiguous.
    lab.a.ip("link add other type veth peer name far");
    lab.a.ip("address add 192.0.2.100/32 dev other");
    assert_eq!(find(VIP4, None).as_ref(), Ok(&eth0));
    lab.a.ip("address add 192.0.2.61/24 dev other");
    assert!(find(VIP4, None).is_err_and(|text| text.contains("eth0") && text.contains("other")));
}

#[test]
fn events_lost_by_the_kernel_are_owned_up_to_and_told_anew() {
    let lab = Lab::new();
    lab.a.ip("link add other type veth peer name far");
    let hand = lab.a.hand(VIP4);
    let ifindex = hand.vip().interface_index;
    let mut watched = lab.a.watch(&[&hand], EVENTS_WAITING);
    lab.a.bind(&hand, LONG);
    watched.wait_for(added(&hand));
    let batch = tempfile::NamedTempFile::new().expect("file");
    let lines: Vec<String> =
        (0..3000).map(|n| format!("address add 10.1.{}.{}/32 dev other", n / 250, n % 250)).collect();
    std::fs::write(batch.path(), lines.join("\n")).expect("batch");
    let path = batch.path().to_owned();
    let namespace = lab.a.namespace.clone();
    // The host's only thread does this itself, so nobody reads the watching socket meanwhile; the deletion is among
    // what is lost.
    lab.a.run(async move {
        for command in
            [vec!["-batch", path.to_str().expect("text")], vec!["address", "del", "192.0.2.100/32", "dev", "eth0"]]
        {
            let output = sh("ip", &[&["-n", namespace.as_str()], command.as_slice()].concat());
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        }
    });
    watched.wait_for(LinkEvent::Overrun);
    watched.wait_for(removed(&hand));
    watched.wait_for(LinkEvent::LinkUp { ifindex });
}

#[test]
fn a_consumer_that_was_too_slow_hears_of_it_and_then_what_is_true() {
    let lab = Lab::new();
    let hand = lab.a.hand(VIP4);
    let ifindex = hand.vip().interface_index;
    let mut watched = lab.a.watch(&[&hand], 2);
    for _ in 0..5 {
        lab.a.bind(&hand, LONG);
        lab.a.unbind(&hand);
    }
    lab.a.bind(&hand, LONG);
    watched.wait_for(LinkEvent::Overrun);
    watched.wait_for(added(&hand));
    watched.wait_for(LinkEvent::LinkUp { ifindex });
}
