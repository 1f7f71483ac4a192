//! Clients through a node that only forwards: two gates in one process, the peer channel between them, and the cluster
//! behind the first. The address of each client is one of 127.0.0.0/8, so that the rules can tell it from the tunnel's.

use crate::front::{Front, Setup, eventually, free_port, open_with, output, shut_with};
use crate::pg::PASSWORD;
use crate::raw::*;
use crate::tls::{Pki, by_hand, receive};
use portcullis::base::config::{Pool, PoolMode, Secret};
use portcullis::base::ids::{Epoch, NodeName};
use portcullis::serve::forward::{Forwarder, Quiet};
use portcullis::serve::peer::{PeerClient, PeerCounters, PeerError, PeerIdentity, listen, listen_with};
use portcullis::wire::tunnel::{Carried, Prepared, Proven};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::AsyncWriteExt;
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::task::JoinHandle;

const EPOCH: Epoch = Epoch(7);
/// Only who really comes from there.
const HBA: &str = "host all trusty 127.0.0.7/32 trust\nhost all trusty 127.0.0.1/32 reject\n\
                   host all all 127.0.0.7/32 scram-sha-256";

fn name(text: &str) -> NodeName {
    text.parse().unwrap()
}

fn identity(me: &str, other: &str) -> Arc<PeerIdentity> {
    Arc::new(PeerIdentity::new(&Secret::new(vec![7; 32]), &name(me), &[name(other)]).unwrap())
}

fn client(address: SocketAddr) -> Arc<PeerClient> {
    Arc::new(PeerClient::new(identity("midna", "alp"), name("alp"), address))
}

/// alp, whose gate is open, and midna, which forwards.
struct Pair {
    alp: Front,
    midna: Front,
    forwarder: Arc<Forwarder>,
    channel: SocketAddr,
    counters: Arc<PeerCounters>,
    task: JoinHandle<()>,
}

impl Drop for Pair {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Pair {
    async fn start(setup: Setup) -> Pair {
        let channel = SocketAddr::from(([127, 0, 0, 1], free_port()));
        let forwarder = Forwarder::new(client(channel), true, 100);
        let alp = open_with(setup).await;
        alp.gate.at_epoch(EPOCH);
        let counters = Arc::new(PeerCounters::default());
        let tunnels = alp.commands.tunnels(name("midna"));
        let handler = |_, question: u64| async move { question };
        let listening = listen_with(channel, identity("alp", "midna"), Arc::clone(&counters), tunnels, handler);
        let task = tokio::spawn(listening);
        let midna = shut_with(Setup { forward: Some(Arc::clone(&forwarder)), ..Setup::default() }).await;
        Pair { alp, midna, forwarder, channel, counters, task }
    }

    /// With midna's door open.
    async fn forwarding(setup: Setup) -> Pair {
        let pair = Pair::start(setup).await;
        pair.forwarder.serves(Some(EPOCH));
        pair.midna.wait_for_door().await;
        pair
    }

    async fn raw(&self) -> Raw {
        let mut raw = connect(self.midna.address).await;
        raw.log_in(&[("user", "trusty"), ("database", "app")]).await;
        raw
    }

    /// The conversation of the daemons goes on.
    async fn asks(&self, client: &PeerClient) {
        for n in 0..20_u64 {
            let answer: Result<u64, PeerError> = client.ask(&n, Duration::from_secs(20)).await;
            assert_eq!(answer, Ok(n));
        }
    }
}

fn setup() -> Setup {
    Setup { hba: HBA, ..Setup::default() }
}

/// From 127.0.0.7.
async fn connect(to: SocketAddr) -> Raw {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind(SocketAddr::from(([127, 0, 0, 7], 0))).unwrap();
    Raw { stream: socket.connect(to).await.unwrap(), pid: 0, key: Vec::new() }
}

/// The same, for who will be closed on.
async fn is_turned_away(address: SocketAddr) -> bool {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind(SocketAddr::from(([127, 0, 0, 7], 0))).unwrap();
    match socket.connect(address).await {
        Ok(stream) => Raw { stream, pid: 0, key: Vec::new() }.is_closed().await,
        Err(error) => error.kind() == std::io::ErrorKind::ConnectionReset,
    }
}

async fn is_refused(address: SocketAddr) -> bool {
    TcpStream::connect(address).await.is_err_and(|error| error.kind() == std::io::ErrorKind::ConnectionRefused)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_is_served_by_the_other_gate_under_its_own_address() {
    let pair = Pair::forwarding(setup()).await;
    let mut raw = pair.raw().await;
    assert_eq!(value(&mut raw, "select 6 * 7").await, "42");
    assert_eq!((pair.alp.gate.sessions(), pair.midna.gate.sessions()), (1, 0));
    assert_eq!(pair.midna.commands.forwarded(), 1);
    assert!(pair.midna.commands.figures().is_empty(), "none of midna's own backends takes part");
    // One whose address is the tunnel's own is who it is, too.
    let mut other = Raw::connect(&pair.midna).await;
    other.send(&startup(0, &[("user", "trusty"), ("database", "app")])).await;
    let (code, text, _) = other.error().await;
    assert_eq!(code, "28000");
    assert!(text.contains("rejects") && text.contains("127.0.0.1"), "{text}");
    raw.send(&message(b'X', b"")).await;
    eventually("it left", async || pair.midna.commands.forwarded() == 0 && pair.alp.gate.sessions() == 0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn tls_is_the_clients_and_the_active_gates_own() {
    let pki = Pki::new("server");
    let hba = "hostssl all app 127.0.0.1/32 scram-sha-256\nhostssl all trusty all trust";
    let pair = Pair::forwarding(Setup { hba, tls: Some(pki.acceptor(None)), ..Setup::default() }).await;
    // Bound to the certificate: midna, which has none, cannot be in between.
    let mut psql = crate::tls::psql(&pair.midna, &pki, "app", "channel_binding=require");
    assert_eq!(output(&mut psql).await.unwrap(), "app");
    for (direct, alpn, serves) in [(true, &[&b"postgresql"[..]][..], true), (true, &[], false), (false, &[], true)] {
        let answer = match by_hand(&pair.midna, &pki, direct, alpn).await {
            Ok(mut stream) => {
                // Whoever is closed on may not get that far.
                let _ = stream.write_all(&startup(0, &[("user", "trusty"), ("database", "app")])).await;
                receive(&mut stream).await.map(|(kind, _)| kind)
            }
            Err(_) => None,
        };
        assert_eq!(answer, serves.then_some(b'R'), "direct {direct}");
    }
    let plain = pair.midna.query("app", "select 1").await.unwrap_err();
    assert!(plain.contains("no encryption"), "{plain}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancel_request_finds_its_session() {
    let pair = Pair::forwarding(setup()).await;
    let mut raw = pair.raw().await;
    raw.send(&query("select pg_sleep(600)")).await;
    let pid = raw.pid;
    pair.alp.wait_until_asleep(pid).await;
    let mut other = connect(pair.midna.address).await;
    other.send(&portcullis::wire::pg::cancel_request(raw.pid, &raw.key)).await;
    assert!(other.is_closed().await);
    let (code, _, before) = raw.error().await;
    assert_eq!((&*code, &*before), ("57014", "T"));
}

#[tokio::test(flavor = "multi_thread")]
async fn much_passes_in_bounded_memory_and_an_end_is_passed_on() {
    let pair = Pair::forwarding(setup()).await;
    let mut raw = pair.raw().await;
    // Not read for a while: everybody on the way waits, and nobody gives up.
    raw.send(&query("select repeat('x', 1000000) from generate_series(1, 60)")).await;
    tokio::time::sleep(Duration::from_secs(7)).await;
    assert_eq!(raw.until_ready().await.matches('D').count(), 60);
    // A client that closes its side gets its answer.
    raw.send(&query("select pg_sleep(0.2), 'last'")).await;
    raw.stream.shutdown().await.unwrap();
    assert_eq!(raw.until_ready().await, "TDCi");
    assert!(raw.is_closed().await);
    eventually("nobody is left", async || pair.midna.commands.forwarded() == 0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cut_is_told_and_a_lapse_passes_nothing_in_either_direction() {
    let pair = Pair::forwarding(setup()).await;
    let mut told = pair.raw().await;
    // On the same thread: by then what the first was told has left as a whole.
    let _later = pair.raw().await;
    pair.alp.gate.cut("portcullis: the reason");
    let (code, text, _) = told.error().await;
    assert_eq!((&*code, &*text), ("57P01", "portcullis: the reason"));
    assert!(told.is_closed().await);
    // midna may believe still that alp serves: it is refused, by the kernel's own word.
    assert!(is_turned_away(pair.midna.address).await);

    pair.alp.extend(Duration::from_secs(4));
    let (mut asks, mut waits) = (pair.raw().await, pair.raw().await);
    waits
        .send(&query(
            "create table if not exists tunnelled(n int); select pg_sleep(6); insert into tunnelled values (1)",
        ))
        .await;
    pair.alp.wait_until_asleep(waits.pid).await;
    let shut_by = portcullis::io::clock::now() + Duration::from_secs(4);
    while asks.stream.write_all(&query("select 1")).await.is_ok() {
        let mut kinds = String::new();
        while let Some((kind, _)) = asks.receive().await {
            kinds.push(char::from(kind));
            if kind == b'Z' {
                break;
            }
        }
        if kinds != "TDCZ" {
            break;
        }
        assert!(portcullis::io::clock::now() < shut_by, "an answer passed after the lapse");
    }
    // Its query was let in and its answer was not; so was nothing that came later.
    let (code, text, before) = waits.error().await;
    assert_eq!((&*code, &*before), ("57P01", ""), "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn forwarding_ends_when_the_guard_says_so_or_this_gate_opens() {
    let pair = Pair::forwarding(setup()).await;
    let mut raw = pair.raw().await;
    pair.forwarder.serves(None);
    assert!(raw.is_closed().await, "nobody vouches for alp");
    eventually("no socket", async || is_refused(pair.midna.address).await).await;
    eventually("alp hears of it", async || pair.alp.gate.sessions() == 0).await;

    pair.forwarder.serves(Some(EPOCH));
    pair.midna.wait_for_door().await;
    let mut raw = pair.raw().await;
    assert_eq!(raw.ask(&query("select 1")).await, "TDCi");
    assert!(!pair.midna.gate.is_listening(), "open is told of its own gate only");
    pair.forwarder.serves(Some(Epoch(8)));
    assert!(raw.is_closed().await, "another epoch is another gate");
    assert!(is_turned_away(pair.midna.address).await, "alp is not open for that");

    // Its own gate opens, whatever is still believed of the other.
    pair.midna.extend(Duration::from_secs(3600));
    eventually("its own socket", async || pair.midna.gate.is_listening()).await;
    let mut raw = Raw::connect(&pair.midna).await;
    raw.log_in(&[("user", "trusty"), ("database", "app")]).await;
    assert_eq!((pair.midna.gate.sessions(), pair.alp.gate.sessions()), (1, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_forwarded_is_never_forwarded_on() {
    let pair = Pair::start(setup()).await;
    // alp's gate shuts, and each believes that the other serves (S13).
    let back = SocketAddr::from(([127, 0, 0, 1], free_port()));
    let counters = Arc::new(PeerCounters::default());
    let tunnels = pair.midna.commands.tunnels(name("alp"));
    let handler = |_, question: u64| async move { question };
    let task = tokio::spawn(listen_with(back, identity("midna", "alp"), Arc::clone(&counters), tunnels, handler));
    let to_midna = Forwarder::new(Arc::new(PeerClient::new(identity("alp", "midna"), name("midna"), back)), true, 100);
    let other = shut_with(Setup { forward: Some(Arc::clone(&to_midna)), ..Setup::default() }).await;
    pair.alp.gate.cut("shut");
    to_midna.serves(Some(EPOCH));
    pair.forwarder.serves(Some(EPOCH));
    for front in [&other, &pair.midna] {
        front.wait_for_door().await;
        assert!(is_turned_away(front.address).await);
    }
    let accepted = |counters: &PeerCounters| counters.each()[0].1;
    // One tunnel each was asked for by the door's test and by the client, and none of them led to another, which would
    // have led to a third and so on, as many as may be opened at once for each of the knocks.
    let both = (accepted(&counters), accepted(&pair.counters));
    assert!(both.0 <= 4 && both.1 <= 4, "{both:?}");
    task.abort();
}

#[tokio::test(flavor = "multi_thread")]
async fn tunnels_do_not_stand_in_the_way_of_the_daemons_own_words() {
    let pair = Pair::forwarding(setup()).await;
    let pulse = client(pair.channel);
    pair.asks(&pulse).await;
    let before = pair.counters.each()[0].1;
    let mut clients = Vec::new();
    for _ in 0..40 {
        clients.push(tokio::spawn(connect(pair.midna.address)));
    }
    pair.asks(&pulse).await;
    let mut raws = Vec::new();
    for raw in clients {
        let mut raw = raw.await.unwrap();
        raw.log_in(&[("user", "trusty"), ("database", "app")]).await;
        raws.push(raw);
        pair.asks(&pulse).await;
    }
    assert_eq!(pair.counters.each()[0].1, before + 40, "the pulse kept its one connection");
    let refused = pair.counters.each().into_iter().filter(|(label, n)| *label != "accepted" && *n > 0).count();
    assert_eq!(refused, 0);
    // And a limit holds where the client is served.
    pair.alp.commands.set_limits(Pool { max_clients: 40, ..Pool::default() });
    let mut late = connect(pair.midna.address).await;
    late.send(&startup(0, &[("user", "trusty"), ("database", "app")])).await;
    assert_eq!(late.error().await.0, "53300");
}

/// A client's stream as the old node held it, and its other end.
async fn held() -> (Raw, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (client, accepted) = tokio::join!(TcpStream::connect(listener.local_addr().unwrap()), listener.accept());
    (Raw { stream: client.unwrap(), pid: 0, key: Vec::new() }, accepted.unwrap().0)
}

fn carried(user: &str, settings: &[(&str, &str)], statements: &[(&str, &str)]) -> Carried {
    let text = |text: &str| [text.as_bytes(), b"\0\0\0"].concat();
    let statement = |(name, sql): &(&str, &str)| Prepared { name: name.as_bytes().to_vec(), text: text(sql) };
    Carried {
        client: ([192, 0, 2, 7], 4711).into(),
        tls: false,
        epoch: EPOCH,
        user: user.to_owned(),
        database: "app".to_owned(),
        parameters: vec![(b"application_name".to_vec(), b"held".to_vec())],
        proven: Proven::Trust,
        pid: 77,
        key: 0x0102_0304,
        settings: settings.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect(),
        statements: statements.iter().map(statement).collect(),
    }
}

fn carry(pair: &Pair, stream: TcpStream, carried: Carried) -> JoinHandle<Result<(), PeerError>> {
    let forwarder = Arc::clone(&pair.forwarder);
    tokio::spawn(
        async move { forwarder.carry(Quiet::from(stream), carried).await.map(drop).map_err(|(_, error)| error) },
    )
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_that_was_held_goes_on_where_it_was() {
    for mode in [PoolMode::Session, PoolMode::Transaction] {
        let pool = Pool { mode, size: 3, threads: 2, ..Pool::default() };
        let pair = Pair::start(Setup { pool, ..setup() }).await;
        pair.forwarder.serves(Some(EPOCH));
        let (mut raw, stream) = held().await;
        let settings = [("search_path", "pg_catalog, \"a b\""), ("my.tenant", "it's"), ("role", "app")];
        let statements = [("one", "select current_setting('my.tenant') || 1"), ("", "select 'unnamed'")];
        // It asks before it can know that anything happened.
        raw.send(&run("one")).await;
        let carrying = carry(&pair, stream, carried("trusty", &settings, &statements));
        assert_eq!(raw.until_ready().await, "2DCi", "{mode:?}: nothing else was said");
        assert_eq!(raw.ask(&run("")).await, "2DCi");
        for (sql, wanted) in [
            ("show search_path", "pg_catalog, \"a b\""),
            ("select current_setting('my.tenant')", "it's"),
            ("select current_user", "app"),
            ("show application_name", "held"),
        ] {
            assert_eq!(value(&mut raw, sql).await, wanted, "{mode:?}");
        }
        // In transaction mode they are brought along from backend to backend.
        let mut others = Vec::new();
        for _ in 0..3 {
            let mut other = connect(pair.alp.address).await;
            other.log_in(&[("user", "trusty"), ("database", "app")]).await;
            assert_eq!(value(&mut other, "show search_path").await, "\"$user\", public");
            assert!(value(&mut other, "select current_setting('my.tenant', true)").await.is_empty());
            if mode == PoolMode::Transaction {
                other.ask(&query("begin")).await;
                assert_eq!(value(&mut raw, "select current_setting('my.tenant')").await, "it's");
            }
            others.push(other);
            if others.len() == 2 {
                break;
            }
        }
        assert_eq!(raw.ask(&run("one")).await, "2DCi");
        // Its key is still its own.
        (raw.pid, raw.key) = (77, vec![1, 2, 3, 4]);
        raw.send(&query("select pg_sleep(600)")).await;
        eventually("it is busy", async || pair.alp.gate.busy() >= 1).await;
        let asleep = "select count(*) from pg_stat_activity where wait_event = 'PgSleep' and application_name = 'held'";
        eventually("it sleeps", async || pair.alp.pg.admin(asleep).unwrap() == "1").await;
        raw.cancel(&pair.alp).await;
        assert_eq!(raw.error().await.0, "57014");
        drop(raw);
        carrying.await.unwrap().unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_that_cannot_go_on_is_told_why() {
    let pair = Pair::start(setup()).await;
    pair.forwarder.serves(Some(EPOCH));
    for (settings, statements, why) in [
        (&[("role", "nobody_at_all")][..], &[][..], "nobody_at_all"),
        (&[], &[("one", "select 1"), ("two", "select * from no_such_table")], "no_such_table"),
    ] {
        let (mut raw, stream) = held().await;
        carry(&pair, stream, carried("trusty", settings, statements));
        let (code, text, before) = raw.error().await;
        assert_eq!((&*code, &*before), ("57P01", ""));
        assert!(text.contains("could not go on") && text.contains(why), "{text}");
        assert!(raw.is_closed().await);
    }
    // The proof is needed to log in at PostgreSQL.
    let (mut raw, stream) = held().await;
    carry(&pair, stream, carried("app", &[], &[]));
    assert_eq!(raw.error().await.0, "57P01");
    let keys = portcullis::wire::scram::Keys::derive(PASSWORD.as_bytes(), b"other salt", 1.try_into().unwrap());
    let (mut raw, stream) = held().await;
    carry(&pair, stream, Carried { proven: Proven::Scram(keys.octets()), ..carried("app", &[], &[]) });
    assert_eq!(raw.error().await.0, "57P01", "of another salt");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_is_not_taken_comes_back_untouched() {
    let pair = Pair::start(setup()).await;
    let other = async |carried: Carried| {
        let (mut raw, stream) = held().await;
        raw.send(b"held").await;
        let (_quiet, error) = pair.forwarder.carry(Quiet::from(stream), carried).await.unwrap_err();
        assert!(raw.is_silent_for(Duration::from_millis(10)).await, "still the caller's");
        error.to_string()
    };
    let error = other(Carried { epoch: Epoch(6), ..carried("trusty", &[], &[]) }).await;
    assert!(error.contains("open for epoch 7, not 6"), "{error}");
    let error = other(Carried { proven: Proven::Scram(vec![1]), ..carried("trusty", &[], &[]) }).await;
    assert!(error.contains("not understood"), "{error}");
    let long = Prepared { name: Vec::new(), text: vec![b'x'; 1024 * 1024] };
    let error = other(Carried { statements: vec![long], ..carried("trusty", &[], &[]) }).await;
    assert!(error.contains("too long"), "{error}");
    pair.alp.gate.cut("shut");
    let error = other(carried("trusty", &[], &[])).await;
    assert!(error.contains("is not open"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_that_takes_no_tunnels_refuses_and_goes_on() {
    let channel = SocketAddr::from(([127, 0, 0, 1], free_port()));
    let counters = Arc::new(PeerCounters::default());
    let handler = |_, question: u64| async move { question };
    let task = tokio::spawn(listen(channel, identity("alp", "midna"), Arc::clone(&counters), handler));
    let forwarder = Forwarder::new(client(channel), true, 100);
    let pulse = client(channel);
    eventually("it listens", async || TcpStream::connect(channel).await.is_ok()).await;
    let (_raw, stream) = held().await;
    let refused = forwarder.carry(Quiet::from(stream), carried("trusty", &[], &[])).await;
    let (_, error) = refused.unwrap_err();
    assert!(matches!(&error, PeerError::Refused(why) if why.contains("no tunnels")), "{error}");
    assert_eq!(pulse.ask(&5_u64, Duration::from_secs(20)).await, Ok(5_u64));
    task.abort();
}
