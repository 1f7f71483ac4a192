//! The messages and the exchange, by cases and by arbitrary bytes.

use super::*;
use proptest::prelude::*;

fn message(kind: u8, body: &[u8]) -> Vec<u8> {
    let mut out = vec![kind];
    out.extend_from_slice(&u32::try_from(body.len() + 4).expect("short").to_be_bytes());
    out.extend_from_slice(body);
    out
}

fn header_of(bytes: &[u8]) -> Header {
    header(bytes).expect("valid").expect("whole")
}

/// Runs a script through an exchange: `>` client, `<` backend, each byte after it a message kind.
fn run(script: &str) -> Exchange {
    let mut exchange = Exchange::new(b'I');
    let mut from_client = true;
    for c in script.bytes() {
        match c {
            b'>' => from_client = true,
            b'<' => from_client = false,
            b' ' => {}
            _ if from_client => {
                let bytes = message(c, b"xyz");
                let mut at = 0;
                let look = exchange.look_client(&bytes, &mut at, false).expect("valid");
                if let Look::Rest(header) | Look::Statement(header) = look {
                    exchange.pass_client(header, &mut at);
                }
                assert_eq!(exchange.look_client(&bytes, &mut at, false), Ok(Look::More));
                assert_eq!(at, bytes.len());
            }
            kind => {
                let (kind, body) = match kind {
                    b'i' => (b'Z', &b"I"[..]),
                    b't' => (b'Z', &b"T"[..]),
                    b'e' => (b'Z', &b"E"[..]),
                    kind => (kind, &b"xyz"[..]),
                };
                let bytes = message(kind, body);
                let mut at = 0;
                if let Look::Success(header) = exchange.look_backend(&bytes, &mut at, false).expect("valid") {
                    exchange.pass_backend(header, &bytes, &mut at);
                }
                assert_eq!(exchange.look_backend(&bytes, &mut at, false), Ok(Look::More));
            }
        }
    }
    exchange
}

#[test]
fn rest_is_where_nothing_is_in_flight() {
    // Lower case i, t, e: ReadyForQuery with that status.
    for (script, rest) in [
        ("", true),
        (">Q", false),
        (">Q <TDC", false),
        (">Q <TDCi", true),
        (">Q <Ct", false),
        (">Q <Ct >Q <Ci", true),
        (">Q <Ee >Q <Ci", true),
        (">PBDE", false),
        (">PBDEH <12TC", false),
        (">PBDES", false),
        (">PBDES <12TCi", true),
        (">QQQ <CiCi", false),
        (">QQQ <CiCiCi", true),
        // COPY in the simple protocol.
        (">Q <G >ddd", false),
        (">Q <G >dddc", false),
        (">Q <G >dddc <Ci", true),
        (">Q <G >d <E >dc <i", true),
        // COPY in the extended protocol: the Sync before the data is swallowed (libpq sends both).
        (">PBDES <12G >ddcS", false),
        (">PBDES <12G >ddcS <Ci", true),
        (">PBDEH <12G >ddcS <Ci", true),
        (">PBDES <12G >ddcS <E >  <i", true),
        // All at once, without waiting for the question: the first Sync is part of the data, the second ends it.
        (">PBES ddcS <12G", false),
        (">PBES ddcS <12GCi", true),
        (">Qddc <G", false),
        (">Qddc <GCi", true),
        // An error skips to the Sync, queries and all (PostgreSQL's ignore_till_sync).
        (">PBE <E", false),
        (">PBE <E >PBES <i", true),
        (">PBES PBES <Ei <12Ci", true),
        (">PBEQS <Ei", true),
        (">PBE <E >QQ >S <i", true),
        (">PBEQ <E", false),
        (">PBEQ <E >S <i", true),
        (">PBEQ <12CCi", true),
        // Flush alone asks for nothing.
        (">H", true),
        (">H >Q <Ci", true),
        (">PBDES PBDES PBDES <12TCi <Ei <12T", false),
        (">PBDES PBDES PBDES <12TCi <Ei <12TCi", true),
        (">PDS <1tTi", true),
        (">BES <2si >ES <Ci", true),
        (">BES <2Ii", true),
        // A Sync amid the data is swallowed too.
        (">Q <G >dSdc <Ci", true),
    ] {
        assert_eq!(run(script).at_rest(), rest, "{script}");
    }
}

#[test]
fn at_rest_every_client_message_is_asked_about() {
    let mut exchange = Exchange::new(b'I');
    let bytes = [message(b'Q', b"a\0"), message(b'Q', b"b\0")].concat();
    let mut at = 0;
    let Ok(Look::Rest(header)) = exchange.look_client(&bytes, &mut at, false) else { panic!("rest") };
    assert_eq!(at, 0);
    exchange.pass_client(header, &mut at);
    assert_eq!(exchange.look_client(&bytes, &mut at, false), Ok(Look::More), "the second rides on the first");
    assert_eq!(at, bytes.len());
    for answered in [false, true] {
        assert!(!exchange.is_quiet());
        let ready = message(b'Z', b"I");
        exchange.pass_backend(header_of(&ready), &ready, &mut 0);
        exchange.look_backend(&ready, &mut HEADER.clone(), false).expect("its body");
        assert_eq!(exchange.is_quiet(), answered);
    }
}

#[test]
fn acknowledgements_are_shown_whole() {
    let mut exchange = Exchange::new(b'I');
    let bytes = [message(b'D', b"row"), message(b'C', b"INSERT 0 1\0"), message(b'Z', b"T")].concat();
    let mut at = 0;
    assert_eq!(exchange.look_backend(&bytes[..12], &mut at, false), Ok(Look::More));
    assert_eq!(at, 8, "what is not complete is not passed");
    let Ok(Look::Success(header)) = exchange.look_backend(&bytes, &mut at, false) else { panic!("C") };
    exchange.pass_backend(header, &bytes, &mut at);
    let Ok(Look::Success(header)) = exchange.look_backend(&bytes, &mut at, false) else { panic!("Z") };
    assert_eq!(header.kind, b'Z');
    exchange.pass_backend(header, &bytes, &mut at);
    assert_eq!(exchange.status(), b'T');
}

#[test]
fn customized_options_are_known_by_their_dot() {
    for (text, name) in [
        ("set my.tenant = 'x'", Some("my.tenant")),
        ("  SET SESSION My.Tenant TO 1", Some("my.tenant")),
        ("set my.tenant='x.y'", Some("my.tenant")),
        ("set local my.tenant = 1", None),
        ("set search_path = a.b", None),
        ("select 'set a.b'", None),
        ("set", None),
        ("", None),
    ] {
        assert_eq!(customized_option(text.as_bytes()).as_deref(), name, "{text}");
    }
}

#[test]
fn databases_wanted_alone_are_known_by_name() {
    for (text, name) in [
        ("drop database app", Some("app")),
        ("  DROP DATABASE IF EXISTS App;", Some("app")),
        ("drop database \"My App\"", Some("\"my")),
        ("drop database \"App\" with (force)", Some("App")),
        ("alter database app rename to b", Some("app")),
        ("alter database app set work_mem = 1", None),
        ("create database b with owner = x template app", Some("app")),
        ("CREATE DATABASE b TEMPLATE=app", Some("app")),
        ("create database b", None),
        ("drop table app", None),
        ("select 'drop database app'", None),
        ("commit", None),
        ("d", None),
        ("", None),
    ] {
        assert_eq!(wanted_alone(text.as_bytes()).as_deref(), name, "{text}");
    }
}

#[test]
fn openings_are_told_apart() {
    assert_eq!(opening(&SSL_REQUEST.to_be_bytes()), Ok(Opening::Ssl));
    assert_eq!(opening(&GSSENC_REQUEST.to_be_bytes()), Ok(Opening::GssEnc));
    let cancel = cancel_request(7, &[1, 2, 3, 4]);
    assert_eq!(opening_rest(cancel[..4].try_into().expect("4")), Ok(12));
    assert_eq!(opening(&cancel[4..]), Ok(Opening::Cancel { pid: 7, key: vec![1, 2, 3, 4] }));
    let text = b"\0\x03\0\x02user\0app\0client_encoding\0LATIN1\0_pq_.x\x001\0\0";
    let Ok(Opening::Startup(startup)) = opening(text) else { panic!("startup") };
    assert_eq!((startup.minor, &*startup.user, &*startup.database), (2, "app", "app"));
    assert_eq!(startup.options, ["_pq_.x"]);
    assert_eq!(&startup.encode()[4..], b"\0\x03\0\0user\0app\0database\0app\0client_encoding\0LATIN1\0\0");
    assert!(matches!(opening(b"\0\x02\0\0rest"), Ok(Opening::OldProtocol { major: 2, minor: 0 })));
    for bad in [
        &b"\0\x03\0\0"[..],
        b"\0\x03\0\0\0",
        b"\0\x03\0\0user\0a\0",
        b"\0\x03\0\0user\0a\0\0x",
        b"\0\x03\0\0user\0\xff\0\0",
    ] {
        assert!(opening(bad).is_err(), "{bad:?}");
    }
    for bad in [0u32, 7, 10_001, u32::MAX] {
        assert!(opening_rest(bad.to_be_bytes()).is_err());
    }
}

#[test]
fn own_queries_are_recognised_as_people_type_them() {
    for text in ["SHOW pool_nodes", "show\n POOL_NODES ;\n", "  Show Pool_nodes;"] {
        assert_eq!(own_query(format!("{text}\0").as_bytes()), Some(OwnQuery::Show(Shown::Nodes)), "{text}");
    }
    for (name, shown) in Shown::ALL {
        assert_eq!(own_query(format!("show {name};\0").as_bytes()), Some(OwnQuery::Show(shown)), "{name}");
    }
    for text in ["SHOW pool_nodes x", "SHOW all", "SHOW pool_stats", "SHOW pools", "SHOW pool_nodes; select 1", "", ";"]
    {
        assert_eq!(own_query(format!("{text}\0").as_bytes()), None, "{text}");
    }
}

#[test]
fn a_given_up_wait_is_known_by_its_routine() {
    let body = b"SWARNING\0C01000\0Mcanceling wait\0RSyncRepWaitForLSN\0\0";
    assert!(is_sync_wait_given_up(body));
    assert!(!is_sync_wait_given_up(b"SNOTICE\0MSyncRepWaitForLSN\0Rother\0\0"));
    let refusal = Refusal::new("57P01", "gone").hint("wait").encode();
    let body = &refusal[HEADER..];
    assert_eq!(field(body, b'C').as_deref(), Some("57P01"));
    assert_eq!(field(body, b'M').as_deref(), Some("gone"));
}

#[test]
fn the_place_between_messages_is_found_again() {
    let bytes = [&b"rest"[..], &message(b'D', b"abc"), &message(b'Z', b"I")].concat();
    for end in 0..=bytes.len() {
        assert_eq!(is_between_messages(&bytes, 0, 4, end), [4, 12, 18].contains(&end), "{end}");
    }
}

/// The lengths' zero and the types that change the exchange, more often than chance would have them.
fn a_telling_byte() -> impl Strategy<Value = u8> {
    prop_oneof![Just(0u8), Just(b'Z'), Just(b'G'), Just(b'S'), any::<u8>()]
}

proptest! {
    #[test]
    fn arbitrary_openings_never_panic(
        bytes in prop::collection::vec(any::<u8>(), 0..300),
        tail in prop::collection::vec(any::<u8>(), 0..100),
    ) {
        let _ = opening(&bytes);
        let _ = opening(&[&b"\0\x03\0\0"[..], &tail].concat());
        let _ = opening(&[&CANCEL_REQUEST.to_be_bytes()[..], &tail].concat());
        let _ = field(&bytes, b'M');
        let _ = own_query(&bytes);
        let _ = wanted_alone(&bytes);
        let _ = customized_option(&bytes);
    }

    /// However the bytes are cut, both scanners stay in bounds, and pass every byte exactly once or say why not.
    #[test]
    fn arbitrary_streams_never_panic(
        statements in any::<bool>(),
        pieces in prop::collection::vec((any::<bool>(), prop::collection::vec(a_telling_byte(), 0..40)), 0..30),
    ) {
        let mut exchange = Exchange::new(b'I');
        let (mut client, mut backend) = (Vec::new(), Vec::new());
        for (from_client, piece) in pieces {
            let buffer = if from_client { &mut client } else { &mut backend };
            buffer.extend_from_slice(&piece);
            let mut at = 0;
            loop {
                let look = if from_client {
                    exchange.look_client(buffer, &mut at, statements)
                } else {
                    exchange.look_backend(buffer, &mut at, statements)
                };
                prop_assert!(at <= buffer.len());
                match look {
                    Ok(Look::Rest(header) | Look::Statement(header)) => exchange.pass_client(header, &mut at),
                    Ok(Look::Success(header) | Look::Notice(header) | Look::Reply(header)) => {
                        exchange.pass_backend(header, buffer, &mut at);
                    }
                    Ok(Look::More) => break,
                    Err(_) => return Ok(()),
                }
            }
            buffer.drain(..at);
            let left = if from_client { exchange.client_left() } else { exchange.backend_left() };
            prop_assert!(left == 0 || buffer.is_empty());
        }
    }
}
