//! Prepared statements: arbitrary clients on shared backends, against a model of PostgreSQL that knows only what it
//! was told; whatever a client binds must be the text that this client gave that name.

use super::*;
use proptest::prelude::*;

/// PostgreSQL's prepared statements of one backend.
#[derive(Default)]
struct Server {
    statements: HashMap<Vec<u8>, Vec<u8>>,
}

/// One answer, for the message it answers.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Answer {
    Parsed,
    Closed,
    Answered,
    Bound(Vec<u8>),
    Error,
}

impl Server {
    /// Carries out a batch that ends with a Sync; the answers, up to the first error.
    fn run(&mut self, mut bytes: &[u8]) -> Vec<Answer> {
        let mut answers = Vec::new();
        while !bytes.is_empty() {
            let length = u32::from_be_bytes(bytes[1..5].try_into().expect("4")) as usize + 1;
            let (message, rest) = bytes.split_at(length);
            bytes = rest;
            let mut body = &message[HEADER..];
            let answer = match message[0] {
                b'P' => {
                    let name = cstring(&mut body).expect("name").to_vec();
                    if name.is_empty() {
                        self.statements.remove(&name);
                    }
                    if body.starts_with(b"bad") || (!name.is_empty() && self.statements.contains_key(&name)) {
                        Answer::Error
                    } else {
                        self.statements.insert(name, body.to_vec());
                        Answer::Parsed
                    }
                }
                b'B' => {
                    cstring(&mut body).expect("portal");
                    let name = cstring(&mut body).expect("name");
                    assert_eq!(body, b"rest", "what follows the name passes as it is");
                    self.statements.get(name).map_or(Answer::Error, |text| Answer::Bound(text.clone()))
                }
                b'C' => {
                    body = &body[1..];
                    self.statements.remove(cstring(&mut body).expect("name"));
                    Answer::Closed
                }
                b'Q' => {
                    self.statements.remove(&b""[..]);
                    Answer::Answered
                }
                other => panic!("{other}"),
            };
            answers.push(answer.clone());
            if answer == Answer::Error {
                break;
            }
        }
        answers
    }
}

#[derive(Debug, Clone)]
enum Do {
    Parse(u8, u8),
    Bind(u8),
    Close(u8),
    Query,
}

fn name_of(number: u8) -> Vec<u8> {
    // Zero is the unnamed one.
    match number {
        0 => Vec::new(),
        // Like one of ours.
        3 => b"portcullis_1".to_vec(),
        number => format!("s{number}").into_bytes(),
    }
}

fn message(kind: u8, body: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    Out { bytes: &mut out, own: &mut Vec::new() }.message(kind, &[body]);
    out
}

impl Do {
    fn encode(&self) -> Vec<u8> {
        match self {
            Do::Parse(name, text) => message(b'P', &[&name_of(*name)[..], b"\0", &text_of(*text)].concat()),
            Do::Bind(name) => message(b'B', &[b"\0", &name_of(*name)[..], b"\0rest"].concat()),
            Do::Close(name) => message(b'C', &[b"S", &name_of(*name)[..], b"\0"].concat()),
            Do::Query => message(b'Q', b"select 1\0"),
        }
    }
}

/// Seven is a text that PostgreSQL refuses.
fn text_of(number: u8) -> Vec<u8> {
    if number == 7 { b"bad\0\0\0".to_vec() } else { format!("select {number}\0\0\0").into_bytes() }
}

fn a_step() -> impl Strategy<Value = Do> {
    prop_oneof![
        (0..4_u8, 0..8_u8).prop_map(|(name, text)| Do::Parse(name, text)),
        (0..4_u8).prop_map(Do::Bind),
        (0..4_u8).prop_map(Do::Close),
        Just(Do::Query),
    ]
}

proptest! {
    /// Each batch is one client's, on one backend. Beside it runs a server of that client's own, as PostgreSQL alone
    /// would be: the answers must be the same but for the words of errors.
    #[test]
    fn a_shared_backend_answers_like_one_of_its_own(
        batches in prop::collection::vec((0..3_usize, 0..2_usize, prop::collection::vec(a_step(), 1..6)), 1..40),
        most in 2..6_usize,
    ) {
        let mut catalogue = Catalogue::default();
        let mut clients: Vec<Names> = (1..4).map(Names::new).collect();
        let mut own_servers: Vec<Server> = (0..3).map(|_| Server::default()).collect();
        let mut backends: Vec<(Server, Known)> = (0..2).map(|_| Default::default()).collect();
        for (client, backend, steps) in batches {
            let (server, known) = &mut backends[backend];
            let names = &mut clients[client];
            let (mut sent, mut plain, mut in_flight) = (Vec::new(), Vec::new(), Vec::new());
            for step in &steps {
                let bytes = step.encode();
                plain.extend_from_slice(&bytes);
                if let Do::Query = step {
                    names.simple_query(known);
                    sent.extend_from_slice(&bytes);
                    in_flight.push(b'Q');
                    continue;
                }
                let mut own = Vec::new();
                let mut out = Out { bytes: &mut sent, own: &mut own };
                let rewrite = names.rewrite(&bytes, bytes.len(), known, &mut catalogue, most, &mut out).expect("valid");
                in_flight.append(&mut own);
                in_flight.push(bytes[0]);
                match rewrite {
                    Rewrite::Pass => sent.extend_from_slice(&bytes),
                    Rewrite::Replaced(n) => sent.extend_from_slice(&bytes[n..]),
                    Rewrite::More => prop_assert!(false, "it is all there"),
                }
            }
            let expected = own_servers[client].run(&plain);
            let mut heard = Vec::new();
            let answers = server.run(&sent);
            let mut left = in_flight.into_iter();
            for answer in answers {
                let swallowed = match answer {
                    Answer::Parsed => names.parsed(None),
                    Answer::Closed => names.closed(),
                    Answer::Bound(_) | Answer::Answered => false,
                    Answer::Error => {
                        // The failed message itself is among those not carried out.
                        let rest: Vec<u8> = left.clone().collect();
                        let count = |kind| u32::try_from(rest.iter().filter(|k| **k == kind).count()).expect("few");
                        names.failed(count(b'P'), count(b'C'), known);
                        false
                    }
                };
                if answer != Answer::Error {
                    left.next();
                }
                if !swallowed {
                    heard.push(answer);
                }
            }
            prop_assert!(!names.is_waiting());
            prop_assert_eq!(&heard, &expected);
            // What was skipped after an error is closed here all the same: clients count it closed. The unnamed one of
            // before is not kept either.
            let skipped = if expected.last() == Some(&Answer::Error) { &steps[expected.len() - 1..] } else { &[] };
            for step in skipped {
                match step {
                    Do::Close(name) => drop(own_servers[client].statements.remove(&name_of(*name))),
                    Do::Parse(0, _) | Do::Query => drop(own_servers[client].statements.remove(&b""[..])),
                    _ => {}
                }
            }
        }
        // Errors undo Closes; the next statement makes good for all of them.
        for (server, known) in &mut backends {
            let (mut sent, parse) = (Vec::new(), Do::Parse(1, 100).encode());
            let mut out = Out { bytes: &mut sent, own: &mut Vec::new() };
            Names::new(9).rewrite(&parse, parse.len(), known, &mut catalogue, most, &mut out).expect("valid");
            let answers = server.run(&sent);
            prop_assert_eq!(answers.last(), Some(&Answer::Parsed));
            let named = server.statements.keys().filter(|name| !name.is_empty()).count();
            prop_assert!(known.statements.len() <= most && named <= most, "{} of {most}", named);
        }
    }
}

#[test]
fn a_text_with_a_stale_plan_gets_another_number() {
    let (mut names, mut known, mut catalogue) = (Names::new(1), Known::default(), Catalogue::default());
    let mut say = |step: Do, known: &mut Known, catalogue: &mut Catalogue| {
        let (bytes, mut sent) = (step.encode(), Vec::new());
        let mut out = Out { bytes: &mut sent, own: &mut Vec::new() };
        names.rewrite(&bytes, bytes.len(), known, catalogue, 9, &mut out).expect("valid");
        String::from_utf8_lossy(&sent).into_owned()
    };
    assert!(say(Do::Parse(1, 1), &mut known, &mut catalogue).contains("portcullis_1"));
    assert!(say(Do::Parse(2, 2), &mut known, &mut catalogue).contains("portcullis_2"));
    known.settle();
    assert!(known.in_use().is_empty());
    say(Do::Bind(1), &mut known, &mut catalogue);
    assert_eq!(known.in_use(), [1]);
    catalogue.outdate(&known.in_use());
    assert!(say(Do::Bind(1), &mut known, &mut catalogue).contains("portcullis_1"), "not before it is parsed anew");
    say(Do::Close(1), &mut known, &mut catalogue);
    say(Do::Close(2), &mut known, &mut catalogue);
    assert!(say(Do::Parse(2, 2), &mut known, &mut catalogue).contains("portcullis_3"), "nobody kept the second");
    assert!(say(Do::Parse(1, 1), &mut known, &mut catalogue).contains("portcullis_4"));
}

#[test]
fn one_client_keeps_so_much_and_no_more() {
    let (mut names, mut known, mut catalogue) = (Names::new(1), Known::default(), Catalogue::default());
    let mut parse = |names: &mut Names, name: u32| {
        let text = [&vec![b'x'; 9_000_000][..], &name.to_be_bytes(), b"\0\0\0"].concat();
        let bytes = message(b'P', &[format!("s{name}").as_bytes(), b"\0", &text].concat());
        let (mut sent, mut own) = (Vec::new(), Vec::new());
        let mut out = Out { bytes: &mut sent, own: &mut own };
        names.rewrite(&bytes, bytes.len(), &mut known, &mut catalogue, 5, &mut out).is_ok()
    };
    assert!((0..7).all(|name| parse(&mut names, name)), "63 MB");
    // Who closes may go on, and what is closed is not kept for nobody.
    assert!((7..40).all(|name| {
        names.forget(format!("s{}", name - 7).as_bytes());
        parse(&mut names, name)
    }));
    assert!(!parse(&mut names, 99));
    drop(names);
    assert!(catalogue.by_text.len() < 10, "{}", catalogue.by_text.len());
}
