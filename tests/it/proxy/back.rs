//! Clients that go to the other node at a switchover and come back at the next, and those that connect while it holds:
//! two gates in one process, both before the shared cluster, and the peer channel between them in both directions.

use crate::front::{Front, Setup, eventually, free_port, output, shut_with};
use crate::raw::*;
use crate::tls::{Pki, by_hand, receive};
use portcullis::base::config::{Pool, PoolMode, Secret};
use portcullis::base::ids::{Epoch, NodeName};
use portcullis::io::clock;
use portcullis::serve::forward::Forwarder;
use portcullis::serve::peer::{PeerClient, PeerCounters, PeerIdentity, listen_with};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Notify;
use tokio::task::JoinHandle;

const NAMES: [&str; 2] = ["alp", "midna"];

/// One of them serves, at an epoch that rises with every switchover.
struct Pair {
    fronts: [Front; 2],
    forwarders: [Arc<Forwarder>; 2],
    tasks: Vec<JoinHandle<()>>,
    active: usize,
    epoch: Epoch,
}

impl Drop for Pair {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

fn name(node: usize) -> NodeName {
    NAMES[node].parse().unwrap()
}

fn identity(me: usize) -> Arc<PeerIdentity> {
    Arc::new(PeerIdentity::new(&Secret::new(vec![7; 32]), &name(me), &[name(1 - me)]).unwrap())
}

/// What of it differs from test to test.
#[derive(Default)]
struct Options<'a> {
    mode: Option<PoolMode>,
    /// `service.passive = "forward"`.
    forward: bool,
    /// Each gate's own certificate.
    pki: Option<[&'a Pki; 2]>,
}

impl Pair {
    /// alp serves.
    async fn start(options: Options<'_>) -> Pair {
        let channels = [(); 2].map(|()| SocketAddr::from(([127, 0, 0, 1], free_port())));
        let to = |me: usize| Arc::new(PeerClient::new(identity(me), name(1 - me), channels[1 - me]));
        let forwarders = [0, 1].map(|me| Forwarder::new(to(me), options.forward, 1000));
        let mode = options.mode.unwrap_or(PoolMode::Transaction);
        let front = async |me: usize| {
            let pool = Pool { mode, size: 3, threads: 2, ..Pool::default() };
            let (forward, tls) = (Some(Arc::clone(&forwarders[me])), options.pki.map(|pki| pki[me].acceptor(None)));
            shut_with(Setup { pool, forward, tls, ..Setup::default() }).await
        };
        let fronts = [front(0).await, front(1).await];
        let listening = |me: usize| {
            let handler = |_, question: u64| async move { question };
            let tunnels = fronts[me].commands.tunnels(name(1 - me));
            tokio::spawn(listen_with(channels[me], identity(me), Arc::new(PeerCounters::default()), tunnels, handler))
        };
        let tasks = vec![listening(0), listening(1)];
        let pair = Pair { fronts, forwarders, tasks, active: 0, epoch: Epoch(1) };
        pair.open(0).await;
        pair.forwarders[1].serves(Some(pair.epoch));
        pair
    }

    async fn open(&self, node: usize) {
        self.fronts[node].gate.at_epoch(self.epoch);
        self.fronts[node].extend(Duration::from_secs(3600));
        eventually("its door", async || self.fronts[node].gate.is_listening()).await;
    }

    fn old(&self) -> &Front {
        &self.fronts[self.active]
    }

    /// Everybody has come to rest, and nothing passes any more; the other node has refused.
    async fn hold(&self) {
        self.begin_to_hold().await;
        self.suspend();
    }

    async fn begin_to_hold(&self) {
        self.old().gate.pause_to_carry();
        eventually("they come to rest", async || self.old().gate.unsettled() == 0).await;
    }

    fn suspend(&self) {
        let until = clock::now() + Duration::from_secs(600);
        self.old().gate.suspend(until, &format!("portcullis: switchover to {}", NAMES[1 - self.active]));
        self.forwarders[1 - self.active].takes_back(self.epoch);
    }

    /// The other node is open, and the old one hears of it.
    async fn carry_over(&mut self) {
        let old = self.active;
        (self.active, self.epoch) = (1 - old, Epoch(self.epoch.0 + 1));
        self.open(self.active).await;
        let reason = format!("portcullis: the active node is {}", NAMES[self.active]);
        self.fronts[old].gate.carry_over(self.epoch, &reason);
        self.fronts[old].gate.resume();
        self.forwarders[old].serves(Some(self.epoch));
    }

    async fn switch_over(&mut self) {
        self.hold().await;
        self.carry_over().await;
    }

    /// Sessions of the gates, and clients that are forwarded.
    fn counts(&self) -> ([u64; 2], [u64; 2]) {
        let counts = |of: fn(&Front) -> u64| [of(&self.fronts[0]), of(&self.fronts[1])];
        (counts(|front| front.gate.sessions()), counts(|front| front.commands.forwarded()))
    }

    /// As many sessions at the gate of the active node alone.
    async fn are_all_there(&self, sessions: u64, forwarded: u64) {
        let there = |one: u64| if self.active == 0 { [one, 0] } else { [0, one] };
        let through = |one: u64| if self.active == 0 { [0, one] } else { [one, 0] };
        let wanted = (there(sessions), through(forwarded));
        eventually("they are where they belong", async || self.counts() == wanted).await;
    }
}

async fn furnish(raw: &mut Raw) {
    for sql in ["set my.tenant = 'it''s'", "set search_path = pg_catalog, \"a b\"", "set application_name = 'held'"] {
        assert_eq!(raw.ask(&query(sql)).await.replace('S', ""), "Ci");
    }
    let named = [parse("one", "select current_setting('my.tenant') || 1"), SYNC.to_vec()].concat();
    assert_eq!(raw.ask(&named).await, "1i");
}

async fn is_furnished(raw: &mut Raw) {
    for (sql, wanted) in [
        ("show search_path", "pg_catalog, \"a b\""),
        ("select current_setting('my.tenant')", "it's"),
        ("show application_name", "held"),
    ] {
        assert_eq!(value(raw, sql).await, wanted, "{sql}");
    }
    assert_eq!(raw.ask(&run("one")).await, "2DCi");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_goes_there_and_back_any_number_of_times() {
    for mode in [PoolMode::Transaction, PoolMode::Session] {
        let mut pair = Pair::start(Options { mode: Some(mode), ..Options::default() }).await;
        let mut raw = Raw::trusty(&pair.fronts[0]).await;
        furnish(&mut raw).await;
        let mut idle = Raw::trusty(&pair.fronts[0]).await;
        let mut other: Option<Raw> = None;
        for round in 1..=5 {
            pair.hold().await;
            // Asked while it is held: answered once, by the other gate.
            raw.send(&run("one")).await;
            assert!(raw.is_silent_for(Duration::from_millis(100)).await, "{mode:?} {round}: nothing passes");
            pair.carry_over().await;
            assert_eq!(raw.until_ready().await, "2DCi", "{mode:?} {round}");
            is_furnished(&mut raw).await;
            assert_eq!(value(&mut idle, "select 6 * 7").await, "42");
            if let Some(other) = &mut other {
                assert_eq!(value(other, "select 7 * 7").await, "49");
            } else {
                // Whose socket is at the other node.
                other = Some(Raw::trusty(&pair.fronts[1]).await);
            }
            let through = if pair.active == 1 { 2 } else { 1 };
            pair.are_all_there(3, through).await;
        }
        // At home, and its key is its own still.
        pair.switch_over().await;
        raw.send(&query("select pg_sleep(600)")).await;
        eventually("it is busy", async || pair.fronts[0].gate.busy() == 1).await;
        let asleep = "select count(*) from pg_stat_activity where wait_event = 'PgSleep' and application_name = 'held'";
        eventually("it sleeps", async || pair.fronts[0].pg.admin(asleep).unwrap() == "1").await;
        raw.cancel(&pair.fronts[0]).await;
        assert_eq!(raw.error().await.0, "57014");
        for mut raw in [Some(raw), Some(idle), other].into_iter().flatten() {
            let _gone_already = raw.stream.write_all(&message(b'X', b"")).await;
        }
        pair.are_all_there(0, 0).await;
    }
}

/// None waits for its turn in vain, and nothing is left behind.
#[tokio::test(flavor = "multi_thread")]
async fn many_go_and_come_back_at_once() {
    let mut pair = Pair::start(Options::default()).await;
    let mut raws = Vec::new();
    for _ in 0..90 {
        raws.push(Raw::trusty(&pair.fronts[0]).await);
    }
    for _ in 0..4 {
        pair.hold().await;
        for raw in &mut raws {
            raw.send(&query("select 1")).await;
        }
        pair.carry_over().await;
        for raw in &mut raws {
            assert_eq!(raw.until_ready().await, "TDCi");
        }
        let forwarded = if pair.active == 1 { 90 } else { 0 };
        pair.are_all_there(90, forwarded).await;
    }
}

/// What is on its way when a client is given back is in no buffer twice, and in none at all.
#[tokio::test(flavor = "multi_thread")]
async fn much_that_is_under_way_comes_back_whole() {
    let mut pair = Pair::start(Options::default()).await;
    let mut raw = Raw::trusty(&pair.fronts[0]).await;
    pair.switch_over().await;
    assert_eq!(value(&mut raw, "select 1").await, "1");
    pair.hold().await;
    // More than the pump, the relay and two kernels keep; and a second request behind it.
    let text: String = (0..430_000).map(|n| format!("{n:070}")).collect();
    let same = "(select string_agg(lpad(n::text, 70, '0'), '' order by n) from generate_series(0, 429999) n)";
    let first = query(&format!("select case when '{text}' = {same} then 'not an octet' else 'another text' end"));
    let (mut reading, mut writing) = raw.stream.into_split();
    let asked = [first, query("select 2")].concat();
    let (whole, sent) = (asked.len(), Arc::new(AtomicUsize::new(0)));
    let counted = Arc::clone(&sent);
    let sending = tokio::spawn(async move {
        while counted.load(Ordering::SeqCst) < asked.len() {
            let n = writing.write(&asked[counted.load(Ordering::SeqCst)..]).await.unwrap();
            counted.fetch_add(n, Ordering::SeqCst);
        }
        writing
    });
    // Until nobody on the way takes anything any more, the relay in the middle of a write.
    eventually("it stands still", async || {
        let before = sent.load(Ordering::SeqCst);
        tokio::time::sleep(Duration::from_millis(700)).await;
        before > 0 && sent.load(Ordering::SeqCst) == before
    })
    .await;
    assert!(sent.load(Ordering::SeqCst) < whole, "more would have to be under way");
    tokio::time::timeout(Duration::from_millis(10), reading.peek(&mut [0; 1])).await.expect_err("nothing passes");
    pair.carry_over().await;
    let mut said = Vec::new();
    while said.windows(6).filter(|end| **end == [b'Z', 0, 0, 0, 5, b'I']).count() < 2 {
        let read = tokio::time::timeout(Duration::from_secs(60), reading.read_buf(&mut said)).await;
        assert!(read.expect("the gate is silent").unwrap() > 0, "closed after {}", String::from_utf8_lossy(&said));
    }
    let said = String::from_utf8_lossy(&said);
    assert!(said.contains("not an octet"), "another text arrived");
    drop(sending.await.unwrap());
    pair.are_all_there(0, 0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_with_tls_comes_back_to_it() {
    let pki = [Pki::new("alp"), Pki::new("midna")];
    let mut pair = Pair::start(Options { pki: Some([&pki[0], &pki[1]]), ..Options::default() }).await;
    let mut stream = by_hand(&pair.fronts[0], &pki[0], false, &[]).await.unwrap();
    stream.write_all(&startup(0, &[("user", "trusty"), ("database", "app")])).await.unwrap();
    while receive(&mut stream).await.unwrap().0 != b'Z' {}
    for _ in 0..4 {
        pair.hold().await;
        stream.write_all(&query("select repeat('x', 100000)")).await.unwrap();
        pair.carry_over().await;
        let mut kinds = String::new();
        while !kinds.ends_with('Z') {
            kinds.push(receive(&mut stream).await.expect("an answer").0.into());
        }
        assert_eq!(kinds, "TDCZ");
        pair.are_all_there(1, u64::from(pair.active == 1)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_forwarded_client_becomes_one_of_this_gate() {
    for mode in [PoolMode::Transaction, PoolMode::Session] {
        let mut pair = Pair::start(Options { mode: Some(mode), forward: true, ..Options::default() }).await;
        pair.fronts[1].wait_for_door().await;
        let mut raw = Raw::trusty(&pair.fronts[1]).await;
        furnish(&mut raw).await;
        assert_eq!(pair.counts().0, [1, 0]);
        for _ in 0..3 {
            pair.hold().await;
            raw.send(&run("one")).await;
            // Who connects there now waits for the gate.
            let mut late = Raw::connect(&pair.fronts[1 - pair.active]).await;
            late.send(&startup(0, &[("user", "trusty"), ("database", "app")])).await;
            assert!(late.is_silent_for(Duration::from_millis(100)).await, "{mode:?}");
            pair.carry_over().await;
            assert_eq!(raw.until_ready().await, "2DCi", "{mode:?}");
            is_furnished(&mut raw).await;
            let mut kinds = String::new();
            while !kinds.ends_with('Z') {
                kinds.push(late.receive().await.expect("a greeting").0.into());
            }
            assert!(!kinds.contains('E'), "{kinds}");
            late.send(&message(b'X', b"")).await;
            pair.are_all_there(1, u64::from(pair.active == 0)).await;
        }
    }
}

/// TLS that ends at the other node cannot come along; it is said at the boundary, before anything is stopped.
#[tokio::test(flavor = "multi_thread")]
async fn a_forwarded_client_with_tls_is_told_why_it_cannot_come_back() {
    let pki = [Pki::new("alp"), Pki::new("midna")];
    let options = Options { forward: true, pki: Some([&pki[0], &pki[1]]), ..Options::default() };
    let pair = Pair::start(options).await;
    pair.fronts[1].wait_for_door().await;
    let mut stream = by_hand(&pair.fronts[1], &pki[0], false, &[]).await.unwrap();
    stream.write_all(&startup(0, &[("user", "trusty"), ("database", "app")])).await.unwrap();
    while receive(&mut stream).await.unwrap().0 != b'Z' {}
    pair.hold().await;
    let (kind, body) = receive(&mut stream).await.expect("a word");
    let text = portcullis::wire::pg::field(&body, b'M').unwrap();
    assert_eq!((kind, portcullis::wire::pg::field(&body, b'C').as_deref()), (b'E', Some("57P01")));
    assert!(text.contains("switchover to midna") && text.contains("TLS that ends here"), "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn who_cannot_come_back_is_told_and_nothing_passes_before_the_gate_is_open() {
    for mode in [PoolMode::Transaction, PoolMode::Session] {
        let mut pair = Pair::start(Options { mode: Some(mode), ..Options::default() }).await;
        let mut raw = Raw::trusty(&pair.fronts[0]).await;
        pair.switch_over().await;
        assert_eq!(value(&mut raw, "select 1").await, "1");
        // The switchover is given up: it goes on where it was.
        pair.hold().await;
        raw.send(&query("select 2")).await;
        assert!(raw.is_silent_for(Duration::from_millis(100)).await);
        pair.fronts[1].gate.resume();
        pair.fronts[1].extend(Duration::from_secs(3600));
        pair.forwarders[0].serves(Some(pair.epoch));
        assert_eq!(raw.until_ready().await, "TDCi", "{mode:?}");
        assert_eq!(pair.counts(), ([0, 1], [1, 0]));
        // The gate here shuts before anybody is back.
        pair.hold().await;
        raw.send(&query("select 3")).await;
        let (active, epoch) = (pair.active, Epoch(pair.epoch.0 + 1));
        pair.fronts[active].gate.carry_over(epoch, "portcullis: the active node is alp");
        let (code, text, before) = raw.error().await;
        assert_eq!((&*code, &*before), ("57P01", ""), "{mode:?}");
        assert!(text.contains("could not go on at node") && text.contains("is not open"), "{text}");
        assert!(raw.is_closed().await);
    }
    // A gate that lapses while they are held: as ever, through the tunnel.
    let mut pair = Pair::start(Options::default()).await;
    let mut raw = Raw::trusty(&pair.fronts[0]).await;
    pair.switch_over().await;
    assert_eq!(value(&mut raw, "select 1").await, "1");
    pair.hold().await;
    pair.fronts[1].gate.cut("portcullis: fenced");
    assert_eq!(raw.error().await.1, "portcullis: fenced");
    // And a node that hears no more of the other waits for nobody.
    let mut pair = Pair::start(Options::default()).await;
    let mut raw = Raw::trusty(&pair.fronts[0]).await;
    pair.switch_over().await;
    assert_eq!(value(&mut raw, "select 1").await, "1");
    pair.hold().await;
    pair.forwarders[0].serves(None);
    assert!(raw.is_closed().await);
}

/// Between a client and the gate: what the client says behind its first packet waits for the word.
async fn slow_way(to: SocketAddr) -> (SocketAddr, Arc<Notify>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let word = Arc::new(Notify::new());
    let go = Arc::clone(&word);
    tokio::spawn(async move {
        let (client, _) = listener.accept().await.unwrap();
        let (mut from, mut to_client) = client.into_split();
        let (mut from_gate, mut gate) = TcpStream::connect(to).await.unwrap().into_split();
        tokio::spawn(async move { tokio::io::copy(&mut from_gate, &mut to_client).await });
        let mut first = vec![0; 4096];
        let n = from.read(&mut first).await.unwrap();
        gate.write_all(&first[..n]).await.unwrap();
        go.notified().await;
        let _ended = tokio::io::copy(&mut from, &mut gate).await;
    });
    (address, word)
}

/// Connections to this port, at its end.
fn established(port: u16) -> usize {
    let table = std::fs::read_to_string("/proc/net/tcp").unwrap();
    let (local, state) = (format!(":{port:04X}"), "01");
    let is_one = |line: &&str| {
        let mut words = line.split_whitespace().skip(1);
        words.next().is_some_and(|address| address.ends_with(&local)) && words.nth(1) == Some(state)
    };
    table.lines().filter(is_one).count()
}

#[tokio::test(flavor = "multi_thread")]
async fn who_connects_while_clients_are_held_is_served_by_the_other_gate() {
    let pki = [Pki::new("alp"), Pki::new("midna")];
    for mode in [PoolMode::Transaction, PoolMode::Session] {
        let options = Options { mode: Some(mode), pki: Some([&pki[0], &pki[1]]), ..Options::default() };
        let mut pair = Pair::start(options).await;
        let front = &pair.fronts[0];
        // Its login began before, and takes its time.
        let (address, word) = slow_way(front.address).await;
        let slow = async move {
            let mut config = tokio_postgres::Config::new();
            config.host("127.0.0.1").port(address.port()).user("app").dbname("app").password(crate::pg::PASSWORD);
            let (client, connection) = config.connect(tokio_postgres::NoTls).await?;
            tokio::spawn(connection);
            client.query_one("select 5", &[]).await.map(|row| row.get::<_, i32>(0))
        };
        let slow = tokio::spawn(slow);
        tokio::time::sleep(Duration::from_millis(300)).await;
        pair.begin_to_hold().await;
        let front = &pair.fronts[0];
        // Some while transactions end, some while PostgreSQL is stopped; one that says nothing yet.
        let mut plain = front.psql("app", crate::pg::PASSWORD, "select 1");
        let plain = tokio::spawn(async move { output(&mut plain).await });
        let mut silent = Raw::connect(front).await;
        tokio::time::sleep(Duration::from_millis(100)).await;
        pair.suspend();
        let mut trusty = Raw::connect(front).await;
        trusty.send(&startup(2, &[("user", "trusty"), ("database", "app")])).await;
        // Bound to alp's certificate, by a rule that wants TLS.
        let mut bound = crate::tls::psql(front, &pki[0], "app", "channel_binding=require");
        let bound = tokio::spawn(async move { output(&mut bound).await });
        let mut wrong = front.psql("app", "not this one", "select 1");
        let wrong = tokio::spawn(async move { output(&mut wrong).await });
        let port = front.address.port();
        eventually("all six have connected", async || established(port) == 6).await;
        assert!(trusty.is_silent_for(Duration::from_millis(300)).await, "{mode:?}: nothing passes");
        pair.carry_over().await;
        word.notify_one();
        silent.send(&startup(0, &[("user", "trusty"), ("database", "app")])).await;
        for (raw, asked) in [(&mut trusty, "v"), (&mut silent, "")] {
            let mut kinds = String::new();
            while !kinds.ends_with('Z') {
                let (kind, body) = raw.receive().await.expect("a greeting");
                assert_ne!(kind, b'E', "{mode:?}: {:?}", portcullis::wire::pg::field(&body, b'M'));
                kinds.push(kind.into());
            }
            assert!(kinds.starts_with(&format!("{asked}R")), "{mode:?}: {kinds}");
            assert_eq!(value(raw, "select 3").await, "3");
        }
        assert_eq!(plain.await.unwrap().as_deref(), Ok("1"), "{mode:?}");
        assert_eq!(bound.await.unwrap().as_deref(), Ok("app"), "{mode:?}");
        assert_eq!(slow.await.unwrap().map_err(|error| error.to_string()), Ok(5), "{mode:?}");
        let refused = wrong.await.unwrap().unwrap_err();
        assert!(refused.contains("password authentication failed"), "{refused}");
        // They are clients of the other gate like any other, and come home with them.
        pair.are_all_there(2, 2).await;
        pair.switch_over().await;
        assert_eq!(value(&mut trusty, "select 4").await, "4");
        pair.are_all_there(2, 0).await;
        // Given up: they are served here.
        pair.hold().await;
        let mut raw = Raw::connect(&pair.fronts[0]).await;
        raw.send(&startup(0, &[("user", "trusty"), ("database", "app")])).await;
        assert!(raw.is_silent_for(Duration::from_millis(100)).await);
        pair.fronts[0].gate.resume();
        pair.fronts[0].extend(Duration::from_secs(3600));
        assert_eq!(raw.receive().await.unwrap().0, b'R', "{mode:?}");
    }
}
