//! What only the embedded witness promises, and what the client does where there is no server at all.

use crate::relay;
use crate::servers::{
    Guard, Kind, LIMIT, Server, TTL, ZONE, answers, authority, directory, free_address, key, mortal, options,
};
use crate::suite::{ip, marker, nsupdate, read, swap};
use hickory_resolver::TokioResolver;
use hickory_resolver::config::{ConnectionConfig, NameServerConfig, ResolverConfig};
use hickory_resolver::net::runtime::TokioRuntimeProvider;
use portcullis::app::witness::run;
use portcullis::io::clock;
use portcullis::io::dns::find_authorities_by;
use portcullis::wire::dns::{RecordPair, UpdateOutcome};
use portcullis::wire::marker::Marker;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;
use tokio::task::JoinSet;

/// Says to a child made of this very test program what it shall serve: `ADDRESS STORE`.
const CHILD: &str = "PORTCULLIS_TEST_WITNESS";

/// How often the witness is killed, and by how many services it is written to meanwhile.
const KILLS: u64 = 12;
const SERVICES: usize = 4;

/// Not a test by itself: the witness as a process of its own, for the tests that kill it. (To be replaced by
/// `portcullis witness`.)
#[tokio::test]
async fn serves_when_started_as_a_child() {
    let Ok(told) = std::env::var(CHILD) else { return };
    let (address, store) = told.split_once(' ').expect("ADDRESS STORE");
    let options = options(address.parse().expect("an address"), Path::new(store));
    run(options, std::future::pending()).await.expect("it serves until it is killed");
}

fn child(address: SocketAddr, store: &Path) -> Guard {
    let program = std::env::current_exe().expect("our own program");
    let mut command = mortal(program.to_str().expect("UTF-8"));
    command
        .args(["embedded::serves_when_started_as_a_child", "--exact", "--nocapture"])
        .env(CHILD, format!("{address} {}", store.display()))
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    Guard::spawn(&mut command)
}

fn seq_of(pair: &RecordPair) -> u64 {
    match pair.marker.as_slice() {
        [] => 0,
        [text] => text.parse::<Marker>().expect("a marker").seq,
        more => panic!("{more:?}"),
    }
}

/// Updates its own name as fast as it can until the server is gone. Returns the last acknowledged `seq` and the last
/// sent.
async fn writes_until_the_end(address: SocketAddr, name: String) -> (u64, u64) {
    let authority = authority(address, &name, Some(key()));
    let mut pair = read(&authority).await.pair;
    let mut acknowledged = seq_of(&pair);
    loop {
        let next = acknowledged + 1;
        match swap(&authority, &pair, 1, next).await {
            UpdateOutcome::Done => {
                acknowledged = next;
                pair = RecordPair::written(&[ip(1)], TTL, &marker(next));
            }
            UpdateOutcome::NotSent(_) => return (acknowledged, acknowledged),
            UpdateOutcome::Unknown(_) => return (acknowledged, next),
            other => panic!("{other:?}"),
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_acknowledged_update_survives_kill_minus_nine() {
    let directory = directory("/tmp");
    let store = directory.path().join("witness.zone.json");
    let address = free_address();
    let name = |service: usize| format!("db{service}.example.org");
    let mut total = 0;
    for kill in 0..KILLS {
        let mut witness = child(address, &store);
        answers(&authority(address, &name(0), Some(key()))).await;
        let mut writers = JoinSet::new();
        for service in 0..SERVICES {
            writers.spawn(async move { (service, writes_until_the_end(address, name(service)).await) });
        }
        // Different moments; not a wait for anything.
        tokio::time::sleep(Duration::from_millis(100 + 17 * kill)).await;
        witness.0.kill().expect("SIGKILL");
        witness.0.wait().expect("it is dead");
        let ends = tokio::time::timeout(LIMIT * 2, writers.join_all()).await.expect("writers see the end");

        let _again = child(address, &store);
        for (service, (acknowledged, sent)) in ends {
            let authority = authority(address, &name(service), Some(key()));
            answers(&authority).await;
            let found = seq_of(&read(&authority).await.pair);
            assert!(
                (acknowledged..=sent).contains(&found),
                "kill {kill}, {}: acknowledged {acknowledged}, sent {sent}, found {found}",
                name(service)
            );
            total = total.max(found);
        }
    }
    println!("{total} updates of the busiest service over {KILLS} kills");
    assert!(total > 1, "hardly anything was written");
}

#[tokio::test]
async fn a_damaged_store_is_refused_and_a_used_one_too() {
    let server = Server::start(Kind::Embedded).await;
    let store = server.directory.path().join("witness.zone.json");
    let second = run(options(free_address(), &store), std::future::pending()).await.expect_err("one at a time");
    assert!(second.text.contains("another witness uses the store"), "{second}");

    let damaged = server.directory.path().join("damaged.json");
    let text = std::fs::read_to_string(&store).expect("the store");
    std::fs::write(&damaged, text.replace("c0000201", "c0000202")).expect("written");
    assert_ne!(std::fs::read_to_string(&damaged).expect("read"), text, "an address was changed");
    let refused = run(options(free_address(), &damaged), std::future::pending()).await.expect_err("damaged");
    assert!(refused.text.contains("checksum does not fit"), "{refused}");

    let copy = server.directory.path().join("copy.json");
    std::fs::copy(&store, &copy).expect("copied");
    let mut other_zone = options(free_address(), &copy);
    (other_zone.zone, other_zone.service_name) = ("example.net".into(), "db.example.net".into());
    let refused = run(other_zone, std::future::pending()).await.expect_err("another zone");
    assert!(refused.text.contains("holds zone example.org., not example.net."), "{refused}");

    let taken = run(options(server.address, &PathBuf::from(&copy)), std::future::pending()).await.expect_err("in use");
    assert!(taken.text.contains("cannot listen on"), "{taken}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wildcard_or_an_alias_is_refused() {
    let server = Server::start(Kind::Embedded).await;
    for update in ["*.example.org. 5 A 192.0.2.1", "x.example.org. 5 CNAME y.example.org.", "example.org. 5 NS x.org."]
    {
        let (done, said) = nsupdate(&server, &format!("zone {ZONE}\nupdate add {update}"));
        assert!(!done && said.contains("REFUSED"), "{update}: {said}");
    }
}

/// A disk that takes nothing: the update is not acknowledged, and the zone stays as it was.
#[tokio::test]
async fn an_update_that_cannot_be_written_does_not_stand() {
    let server = Server::start(Kind::Embedded).await;
    let obstacle = server.directory.path().join("witness.zone.json.new");
    let authority = server.authority();
    let first = read(&authority).await.pair;
    std::fs::create_dir(&obstacle).expect("a directory where the file should be");
    let outcome = swap(&authority, &first, 2, 1).await;
    assert!(matches!(&outcome, UpdateOutcome::Unknown(why) if why.contains("SERVFAIL")), "{outcome:?}");
    assert_eq!(read(&authority).await.pair, first);
    std::fs::remove_dir(&obstacle).expect("removed");
    assert_eq!(swap(&authority, &first, 2, 1).await, UpdateOutcome::Done);
}

#[tokio::test]
async fn where_nobody_listens_it_is_seen_at_once() {
    let nobody = authority(free_address(), "db.example.org", Some(key()));
    let start = clock::now();
    let why = nobody.ask(LIMIT).await.expect_err("nobody");
    assert!(why.contains("nothing listens there"), "{why}");
    let outcome = swap(&nobody, &RecordPair::default(), 1, 1).await;
    assert!(matches!(&outcome, UpdateOutcome::NotSent(why) if why.contains("nothing listens")), "{outcome:?}");
    assert!(clock::now().since(start) < LIMIT / 2, "the kernel's refusal was not seen");
    let keyless = authority(free_address(), "db.example.org", None);
    let outcome = swap(&keyless, &RecordPair::default(), 1, 1).await;
    assert!(matches!(&outcome, UpdateOutcome::NotSent(why) if why.contains("tsig_key_file")), "{outcome:?}");
}

#[tokio::test]
async fn a_server_that_says_nothing_costs_no_more_than_the_limit() {
    let limit = Duration::from_millis(300);
    let silent = authority(relay::says_nothing().await, "db.example.org", Some(key()));
    let start = clock::now();
    let why = silent.ask(limit).await.expect_err("silence");
    assert!(why.contains("did not answer within 300ms"), "{why}");
    let outcome = silent.update(&RecordPair::default(), &[ip(1)], TTL, "x", limit).await;
    assert!(matches!(outcome, UpdateOutcome::Unknown(_)), "{outcome:?}");
    let took = clock::now().since(start);
    assert!(took >= limit * 2 && took < LIMIT, "{took:?}");
}

#[tokio::test]
async fn authorities_are_found_from_soa_and_ns() {
    let server = Server::start(Kind::Embedded).await;
    let mut connection = ConnectionConfig::udp();
    connection.port = server.address.port();
    let name_server = NameServerConfig::new(server.address.ip(), true, vec![connection]);
    let config = ResolverConfig::from_name_servers(vec![name_server]);
    let resolver =
        TokioResolver::builder_with_config(config, TokioRuntimeProvider::default()).build().expect("a resolver");
    let found = find_authorities_by(&resolver, "example.org").await;
    assert_eq!(found, Ok(vec!["127.0.0.1:53".parse().expect("an address")]));
    let none = find_authorities_by(&resolver, "example.net").await.expect_err("not its zone");
    assert!(none.contains("dns.servers"), "{none}");
}
