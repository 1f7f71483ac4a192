//! The peer channel over loopback: who is let in, who is not, what is counted and said, and how it behaves when the
//! other side is slow, silent or gone.
//!
//! Over 600 lines because every case of one contract stands here beside the few helpers they all share.

use portcullis::base::config::Secret;
use portcullis::base::ids::NodeName;
use portcullis::io::clock;
use portcullis::serve::peer::{PeerClient, PeerCounters, PeerError, PeerIdentity, Progress, listen, serve_on};
use portcullis::wire::peer::{self, Hello, VERSION};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::version::{TLS12, TLS13};
use rustls::{ClientConfig, DigitallySignedStruct, SignatureScheme};
use serde::{Deserialize, Serialize};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

/// Enough for anything that must happen on a busy machine.
const LIMIT: Duration = Duration::from_secs(30);

#[derive(Debug, Serialize, Deserialize)]
enum Question {
    Echo(String),
    /// Answer after so many milliseconds.
    Late(u64),
    /// So many words of progress first.
    Count(u64),
    /// An answer of so many characters.
    Long(usize),
}

fn name(text: &str) -> NodeName {
    text.parse().expect("name")
}

fn identity(secret: u8, me: &str, others: &[&str]) -> Arc<PeerIdentity> {
    let others: Vec<_> = others.iter().map(|other| name(other)).collect();
    Arc::new(PeerIdentity::new(&Secret::new(vec![secret; 32]), &name(me), &others).expect("identity"))
}

/// A listener on a free port below the ephemeral ones.
async fn free_listener() -> TcpListener {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let start = u16::try_from(std::process::id() % 9_000).expect("small");
    for _ in 0..9_000 {
        let port = 20_000 + (start + NEXT.fetch_add(1, Ordering::Relaxed)) % 9_000;
        if let Ok(listener) = TcpListener::bind(("127.0.0.1", port)).await {
            return listener;
        }
    }
    panic!("no free port");
}

/// midna, which answers alp; and what it counted, and how many questions reached its handler.
struct Midna {
    address: SocketAddr,
    counters: Arc<PeerCounters>,
    asked: Arc<AtomicUsize>,
}

impl Midna {
    async fn start() -> Midna {
        let listener = free_listener().await;
        let midna =
            Midna { address: listener.local_addr().expect("bound"), counters: Arc::default(), asked: Arc::default() };
        let asked = midna.asked.clone();
        let handler = move |node: NodeName, question: Question, progress: Progress<String>| {
            asked.fetch_add(1, Ordering::Relaxed);
            async move {
                match question {
                    Question::Echo(text) => format!("{node}: {text}"),
                    Question::Late(after) => {
                        sleep(Duration::from_millis(after)).await;
                        "late".to_owned()
                    }
                    Question::Count(words) => {
                        for word in 0..words {
                            progress.tell(&word.to_string()).await;
                        }
                        "done".to_owned()
                    }
                    Question::Long(length) => "x".repeat(length),
                }
            }
        };
        tokio::spawn(serve_on(listener, identity(7, "midna", &["alp"]), midna.counters.clone(), handler));
        midna
    }

    fn client(&self) -> PeerClient {
        self.client_via(self.address)
    }

    fn client_via(&self, address: SocketAddr) -> PeerClient {
        PeerClient::new(identity(7, "alp", &["midna"]), name("midna"), address)
    }

    /// Waits until the counters other than zero are exactly these.
    async fn counted(&self, wanted: &[(&'static str, u64)]) {
        let seen = || self.counters.each().into_iter().filter(|(_, count)| *count > 0).collect::<Vec<_>>();
        let mut wanted = wanted.to_vec();
        let order = |label: &str| self.counters.each().iter().position(|(known, _)| *known == label);
        wanted.sort_by_key(|(label, _)| order(label));
        let deadline = clock::now() + LIMIT;
        while seen() != wanted {
            assert!(clock::now() < deadline, "counted {:?}, not {wanted:?}", seen());
            sleep(Duration::from_millis(5)).await;
        }
    }

    fn asked(&self) -> usize {
        self.asked.load(Ordering::Relaxed)
    }
}

async fn echo(client: &PeerClient, text: &str, limit: Duration) -> Result<String, PeerError> {
    client.ask(&Question::Echo(text.to_owned()), limit).await
}

/// Accepts any server: the tools of an intruder.
#[derive(Debug)]
struct AnyServer;

impl ServerCertVerifier for AnyServer {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }
    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }
    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }
    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SignatureScheme::ED25519]
    }
}

fn intruder(version: &'static rustls::SupportedProtocolVersion, with_certificate: bool) -> Arc<ClientConfig> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[version])
        .expect("version")
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(AnyServer));
    if !with_certificate {
        return Arc::new(config.with_no_client_auth());
    }
    let key = rcgen::KeyPair::generate_for(&rcgen::PKCS_ED25519).expect("key");
    let certificate =
        rcgen::CertificateParams::new(["alp".to_owned()]).expect("params").self_signed(&key).expect("cert");
    let key = rustls::pki_types::PrivatePkcs8KeyDer::from(key.serialize_der());
    Arc::new(config.with_client_auth_cert(vec![certificate.der().clone()], key.into()).expect("key"))
}

async fn tls(config: Arc<ClientConfig>, address: SocketAddr) -> std::io::Result<TlsStream<TcpStream>> {
    let stream = TcpStream::connect(address).await?;
    TlsConnector::from(config).connect(ServerName::try_from("midna").expect("name"), stream).await
}

/// alp's own TLS connection, without `PeerClient`'s manners.
async fn alps_tls(address: SocketAddr) -> TlsStream<TcpStream> {
    let alp = identity(7, "alp", &["midna"]);
    tls(alp.client(&name("midna")).expect("configured"), address).await.expect("let in")
}

/// Waits until the other side has closed; what came before is returned.
async fn read_to_the_end(stream: &mut (impl tokio::io::AsyncRead + Unpin)) -> Vec<u8> {
    let mut all = Vec::new();
    let read = timeout(LIMIT, stream.read_to_end(&mut all)).await;
    let _closed_or_reset = read.expect("the other side did not close");
    all
}

#[tokio::test]
async fn a_good_pair_talks_over_one_connection() {
    let midna = Midna::start().await;
    let client = midna.client();
    for round in 0..20 {
        assert_eq!(echo(&client, &round.to_string(), LIMIT).await, Ok(format!("alp: {round}")));
    }
    midna.counted(&[("accepted", 1)]).await;
}

#[tokio::test]
async fn a_slow_handler_delays_no_other_question_and_is_no_silence() {
    let midna = Midna::start().await;
    let client = Arc::new(midna.client());
    let slow = tokio::spawn({
        let client = client.clone();
        async move { client.ask::<_, String>(&Question::Late(2_500), LIMIT).await }
    });
    let began = clock::now();
    let mut overtook = 0;
    while !slow.is_finished() {
        assert!(echo(&client, "quick", LIMIT).await.is_ok());
        overtook += usize::from(!slow.is_finished());
        // Long enough apart that for most of the time nothing but the slow one is under way.
        sleep(Duration::from_millis(900)).await;
    }
    assert_eq!(slow.await.expect("no panic"), Ok("late".to_owned()));
    assert!(overtook > 0, "every quick one waited behind the slow one");
    assert!(clock::now().since(began) >= Duration::from_millis(2_400));
    midna.counted(&[("accepted", 1)]).await;
}

#[tokio::test]
async fn a_question_alone_outlives_the_silence_limit_when_the_peer_is_merely_slow() {
    let midna = Midna::start().await;
    let client = midna.client();
    assert_eq!(client.ask::<_, String>(&Question::Late(2_200), LIMIT).await, Ok("late".to_owned()));
    midna.counted(&[("accepted", 1)]).await;
}

#[tokio::test]
async fn an_answer_after_the_limit_is_dropped_and_the_connection_goes_on() {
    let midna = Midna::start().await;
    let client = midna.client();
    assert!(echo(&client, "before", LIMIT).await.is_ok());
    assert_eq!(
        client.ask::<_, String>(&Question::Late(1_200), Duration::from_millis(200)).await,
        Err(PeerError::Timeout)
    );
    // Heard in between, or a late answer on a busy machine would be a silence of 1.5 s, which ends a connection.
    assert_eq!(echo(&client, "meanwhile", LIMIT).await, Ok("alp: meanwhile".to_owned()));
    sleep(Duration::from_millis(1_600)).await;
    assert_eq!(echo(&client, "still here", LIMIT).await, Ok("alp: still here".to_owned()));
    midna.counted(&[("accepted", 1)]).await;
}

#[tokio::test]
async fn progress_comes_in_order_before_the_answer() {
    let midna = Midna::start().await;
    let mut words = Vec::new();
    let answer = midna.client().ask_stream(&Question::Count(40), LIMIT, |word: String| words.push(word)).await;
    assert_eq!(answer, Ok("done".to_owned()));
    assert_eq!(words, (0..40).map(|word| word.to_string()).collect::<Vec<_>>());
}

#[tokio::test]
async fn a_wrong_secret_is_refused_on_both_sides() {
    let midna = Midna::start().await;
    // We refuse midna, whose key is not what our secret says.
    let counters: Arc<PeerCounters> = Arc::default();
    let alp = PeerClient::counting(identity(8, "alp", &["midna"]), name("midna"), midna.address, counters.clone());
    assert_eq!(echo(&alp, "let me in", LIMIT).await, Err(PeerError::RefusedKey("midna".to_owned())));
    assert_eq!(counters.refused_key.load(Ordering::Relaxed), 1);
    midna.counted(&[("refused_key", 1)]).await;
    // And midna refuses a key of another secret by itself, when the client does not care who midna is.
    let mut stream = tls(intruder(&TLS13, true), midna.address).await.expect("a client's handshake is done first");
    let _ = stream.write_all(&peer::encode(&Hello { version: VERSION, node: name("alp") }).expect("small")).await;
    assert_eq!(read_to_the_end(&mut stream).await, b"");
    midna.counted(&[("refused_key", 2)]).await;
    assert_eq!(midna.asked(), 0);
}

/// Shows a certificate without having its key.
#[derive(Debug)]
struct Borrowed(Arc<rustls::sign::CertifiedKey>);

impl rustls::client::ResolvesClientCert for Borrowed {
    fn resolve(&self, _: &[&[u8]], _: &[SignatureScheme]) -> Option<Arc<rustls::sign::CertifiedKey>> {
        Some(self.0.clone())
    }
    fn has_certs(&self) -> bool {
        true
    }
}

#[tokio::test]
async fn alps_certificate_without_alps_key_is_refused() {
    let midna = Midna::start().await;
    // Anybody who was ever greeted by alp has its certificate.
    let listener = free_listener().await;
    let address = listener.local_addr().expect("bound");
    let acceptor = tokio_rustls::TlsAcceptor::from(identity(7, "midna", &["alp"]).server());
    let seen = tokio::spawn(async move {
        let stream = acceptor.accept(listener.accept().await.expect("accepted").0).await.expect("alp");
        stream.get_ref().1.peer_certificates().expect("shown").to_vec()
    });
    let _stream = alps_tls(address).await;
    let certificates = seen.await.expect("no panic");
    let key = rcgen::KeyPair::generate_for(&rcgen::PKCS_ED25519).expect("key").serialize_der();
    let key = rustls::crypto::ring::sign::any_eddsa_type(&key.into()).expect("key");
    let borrowed = Arc::new(rustls::sign::CertifiedKey::new(certificates, key));
    let config = ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_protocol_versions(&[&TLS13])
        .expect("version")
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(AnyServer))
        .with_client_cert_resolver(Arc::new(Borrowed(borrowed)));
    let mut impostor = tls(Arc::new(config), midna.address).await.expect("a client's handshake is done first");
    let _ = impostor.write_all(&peer::encode(&Hello { version: VERSION, node: name("alp") }).expect("small")).await;
    assert_eq!(read_to_the_end(&mut impostor).await, b"");
    midna.counted(&[("refused_key", 1)]).await;
}

#[tokio::test]
async fn the_right_secret_with_an_unexpected_name_is_refused() {
    let midna = Midna::start().await;
    // A node that midna does not know.
    let counters: Arc<PeerCounters> = Arc::default();
    let who = identity(7, "stranger", &["midna"]);
    let stranger = PeerClient::counting(who, name("midna"), midna.address, counters.clone());
    assert_eq!(echo(&stranger, "hello", LIMIT).await, Err(PeerError::RefusedByPeer));
    assert_eq!(counters.refused_by_peer.load(Ordering::Relaxed), 1);
    midna.counted(&[("refused_key", 1)]).await;
    // midna where another node is expected.
    let elsewhere = PeerClient::new(identity(7, "alp", &["midna", "link"]), name("link"), midna.address);
    assert_eq!(echo(&elsewhere, "hello", LIMIT).await, Err(PeerError::RefusedKey("link".to_owned())));
    midna.counted(&[("refused_key", 2)]).await;
    assert_eq!(midna.asked(), 0);
    // A node that is not configured is not even dialled.
    let nobody = PeerClient::new(identity(7, "alp", &["midna"]), name("link"), midna.address);
    assert_eq!(echo(&nobody, "hello", LIMIT).await, Err(PeerError::NoSuchNode("link".to_owned())));
}

#[tokio::test]
async fn the_key_says_who_asks_and_the_greeting_must_agree() {
    let midna = Midna::start().await;
    let mut stream = alps_tls(midna.address).await;
    stream
        .write_all(&peer::encode(&Hello { version: VERSION, node: name("midna") }).expect("small"))
        .await
        .expect("sent");
    assert_eq!(read_to_the_end(&mut stream).await, b"", "no greeting");
    midna.counted(&[("refused_name", 1)]).await;
}

#[tokio::test]
async fn what_is_not_tls_13_with_a_certificate_is_refused() {
    let midna = Midna::start().await;
    let mut garbage = TcpStream::connect(midna.address).await.expect("connected");
    garbage.write_all(b"GET / HTTP/1.1\r\nHost: midna\r\n\r\n").await.expect("sent");
    read_to_the_end(&mut garbage).await;
    midna.counted(&[("refused_tls", 1)]).await;
    assert!(tls(intruder(&TLS12, true), midna.address).await.is_err(), "TLS 1.2");
    midna.counted(&[("refused_tls", 2)]).await;
    let mut nobody = tls(intruder(&TLS13, false), midna.address).await.expect("a client's handshake is done first");
    let _ = nobody.write_all(&peer::encode(&Hello { version: VERSION, node: name("alp") }).expect("small")).await;
    assert_eq!(read_to_the_end(&mut nobody).await, b"");
    midna.counted(&[("refused_tls", 2), ("refused_key", 1)]).await;
    assert_eq!(midna.asked(), 0);
}

#[tokio::test]
async fn a_recorded_session_cannot_be_replayed() {
    let midna = Midna::start().await;
    let relay = Relay::start(midna.address).await;
    let client = midna.client_via(relay.address);
    assert!(echo(&client, "once", LIMIT).await.is_ok());
    assert_eq!(midna.asked(), 1);
    let recorded = relay.recorded.lock().expect("no panic").clone();
    assert!(recorded.len() > 500, "the whole session is there: {} octets", recorded.len());
    let mut replay = TcpStream::connect(midna.address).await.expect("connected");
    replay.write_all(&recorded).await.expect("sent");
    read_to_the_end(&mut replay).await;
    midna.counted(&[("accepted", 1), ("refused_tls", 1)]).await;
    assert_eq!(midna.asked(), 1, "the question was not heard again");
    // The session itself, recorded all the while, goes on.
    assert!(echo(&client, "twice", LIMIT).await.is_ok());
}

#[tokio::test]
async fn malformed_oversize_and_foreign_versions_are_refused_and_counted() {
    let midna = Midna::start().await;
    let hello = |version| peer::encode(&Hello { version, node: name("alp") }).expect("small");
    let oversize = [0, 1, 0, 1];
    /// What, the frames that are sent, and what is counted after it.
    type Case = (&'static str, Vec<Vec<u8>>, &'static [(&'static str, u64)]);
    let cases: [Case; 5] = [
        ("no JSON for a greeting", vec![b"\0\0\0\x03abc".to_vec()], &[("malformed", 1)]),
        ("an oversize greeting", vec![oversize.to_vec()], &[("malformed", 1), ("oversize", 1)]),
        (
            "another version",
            vec![hello(VERSION + 1).to_vec()],
            &[("malformed", 1), ("oversize", 1), ("wrong_version", 1)],
        ),
        (
            "no JSON for a question",
            vec![hello(VERSION).to_vec(), b"\0\0\0\x03{]}".to_vec()],
            &[("accepted", 1), ("malformed", 2), ("oversize", 1), ("wrong_version", 1)],
        ),
        (
            "an oversize question",
            vec![hello(VERSION).to_vec(), oversize.to_vec()],
            &[("accepted", 2), ("malformed", 2), ("oversize", 2), ("wrong_version", 1)],
        ),
    ];
    for (what, writes, counts) in cases {
        let mut stream = alps_tls(midna.address).await;
        for bytes in writes {
            stream.write_all(&bytes).await.expect(what);
            stream.flush().await.expect(what);
        }
        read_to_the_end(&mut stream).await;
        midna.counted(counts).await;
    }
    assert_eq!(midna.asked(), 0);
}

#[tokio::test]
async fn each_side_learns_that_the_versions_differ() {
    let midna = Midna::start().await;
    let mut stream = alps_tls(midna.address).await;
    let newer = peer::encode(&Hello { version: VERSION + 1, node: name("alp") }).expect("small");
    stream.write_all(&newer).await.expect("sent");
    let mut greeting = bytes::BytesMut::from(&read_to_the_end(&mut stream).await[..]);
    let json = peer::next_frame(&mut greeting).expect("good").expect("whole");
    assert_eq!(peer::decode::<Hello>(&json), Ok(Hello { version: VERSION, node: name("midna") }));
    // A server that is newer than we are.
    let listener = free_listener().await;
    let address = listener.local_addr().expect("bound");
    tokio::spawn(async move {
        let acceptor = tokio_rustls::TlsAcceptor::from(identity(7, "midna", &["alp"]).server());
        let (stream, _) = listener.accept().await.expect("accepted");
        let mut stream = acceptor.accept(stream).await.expect("alp");
        let hello = peer::encode(&Hello { version: VERSION + 1, node: name("midna") }).expect("small");
        stream.write_all(&hello).await.expect("sent");
        read_to_the_end(&mut stream).await;
    });
    let error = echo(&midna.client_via(address), "hello", LIMIT).await;
    assert_eq!(error, Err(PeerError::WrongVersion { theirs: VERSION + 1, ours: VERSION }));
}

#[tokio::test]
async fn a_question_that_is_not_understood_is_refused_alone() {
    let midna = Midna::start().await;
    let client = midna.client();
    let error = client.ask::<_, String>(&serde_json::json!({"Sing": "aloud"}), LIMIT).await;
    assert!(matches!(&error, Err(PeerError::Refused(reason)) if reason.contains("Sing")), "{error:?}");
    assert!(echo(&client, "hello", LIMIT).await.is_ok());
    midna.counted(&[("accepted", 1), ("malformed", 1)]).await;
    assert_eq!(midna.asked(), 1);
}

#[tokio::test]
async fn what_is_too_long_is_refused_by_its_sender() {
    let midna = Midna::start().await;
    let client = midna.client();
    let error = echo(&client, &"x".repeat(70_000), LIMIT).await;
    assert!(matches!(error, Err(PeerError::TooLong(..))), "{error:?}");
    let error = client.ask::<_, String>(&Question::Long(70_000), LIMIT).await;
    assert!(matches!(error, Err(PeerError::Refused(_))), "{error:?}");
    let fits = client.ask::<_, String>(&Question::Long(60_000), LIMIT).await;
    assert_eq!(fits.map(|text| text.len()), Ok(60_000));
    midna.counted(&[("accepted", 1)]).await;
}

#[tokio::test]
async fn after_a_silence_the_next_question_finds_a_new_connection() {
    let midna = Midna::start().await;
    let relay = Relay::start(midna.address).await;
    let client = midna.client_via(relay.address);
    assert!(echo(&client, "before", LIMIT).await.is_ok());
    // What stands now carries nothing ever again, like TCP across a partition that outlasted its retransmissions; what
    // is new gets through.
    relay.swallow_all_there_is();
    let began = clock::now();
    assert_eq!(echo(&client, "into the void", LIMIT).await, Err(PeerError::Silent));
    assert_eq!(echo(&client, "after", LIMIT).await, Ok("alp: after".to_owned()));
    println!("figure: answered again {:?} after the line went dead", clock::now().since(began));
    midna.counted(&[("accepted", 2)]).await;
}

#[tokio::test]
async fn askers_with_short_limits_notice_a_silence_too() {
    let midna = Midna::start().await;
    let relay = Relay::start(midna.address).await;
    let client = midna.client_via(relay.address);
    assert!(echo(&client, "before", LIMIT).await.is_ok());
    relay.swallow_all_there_is();
    let began = clock::now();
    // No single question waits as long as the silence lasts.
    while echo(&client, "hello?", Duration::from_millis(300)).await.is_err() {
        let waited = clock::now().since(began);
        assert!(waited < LIMIT, "still on the dead connection after {waited:?}");
    }
}

#[tokio::test]
async fn a_silence_is_noticed_also_when_nobody_waits_any_longer() {
    let midna = Midna::start().await;
    let relay = Relay::start(midna.address).await;
    let client = midna.client_via(relay.address);
    assert!(echo(&client, "before", LIMIT).await.is_ok());
    relay.swallow_all_there_is();
    assert_eq!(echo(&client, "hello?", Duration::from_millis(300)).await, Err(PeerError::Timeout));
    // Well over the 1.5 s that count as silence.
    sleep(Duration::from_millis(4_000)).await;
    assert!(echo(&client, "after", LIMIT).await.is_ok(), "met the dead connection");
}

#[tokio::test]
async fn a_peer_that_is_not_there_is_an_error_at_once_and_is_found_when_it_comes() {
    let listener = free_listener().await;
    let address = listener.local_addr().expect("bound");
    drop(listener);
    let client = PeerClient::new(identity(7, "alp", &["midna"]), name("midna"), address);
    let error = echo(&client, "anybody?", LIMIT).await;
    assert!(matches!(error, Err(PeerError::Unreachable(_))), "{error:?}");
    let handler = |_: NodeName, question: Question| async move { format!("{question:?}") };
    let server = tokio::spawn(listen(address, identity(7, "midna", &["alp"]), Arc::default(), handler));
    let deadline = clock::now() + LIMIT;
    while echo(&client, "anybody?", Duration::from_secs(1)).await.is_err() {
        assert!(clock::now() < deadline, "never found");
        sleep(Duration::from_millis(10)).await;
    }
    // And when it goes away and comes back, the client needs no telling.
    server.abort();
    let _aborted = server.await;
    assert!(echo(&client, "anybody?", Duration::from_secs(1)).await.is_err());
    tokio::spawn(listen(address, identity(7, "midna", &["alp"]), Arc::default(), handler));
    let deadline = clock::now() + LIMIT;
    while echo(&client, "anybody?", Duration::from_secs(1)).await.is_err() {
        assert!(clock::now() < deadline, "never found again");
        sleep(Duration::from_millis(10)).await;
    }
}

/// Its process died in the middle of a question: what a person reads of that is no sentence of the TLS library.
#[tokio::test]
async fn a_peer_that_dies_is_told_of_in_plain_words() {
    let listener = free_listener().await;
    let address = listener.local_addr().expect("bound");
    let asked = Arc::new(AtomicUsize::new(0));
    let seen = Arc::clone(&asked);
    let handler = move |_: NodeName, _: Question, _: Progress<String>| {
        seen.fetch_add(1, Ordering::Relaxed);
        std::future::pending::<String>()
    };
    let server = tokio::spawn(serve_on(listener, identity(7, "midna", &["alp"]), Arc::default(), handler));
    let client = PeerClient::new(identity(7, "alp", &["midna"]), name("midna"), address);
    let death = async {
        let deadline = clock::now() + LIMIT;
        while asked.load(Ordering::Relaxed) == 0 {
            assert!(clock::now() < deadline, "never asked");
            sleep(Duration::from_millis(5)).await;
        }
        server.abort();
    };
    let (answer, ()) = tokio::join!(echo(&client, "anybody?", LIMIT), death);
    let text = answer.expect_err("it died").to_string();
    assert_eq!(text, "the connection to the peer broke: it was closed there");
}

#[tokio::test]
async fn listening_waits_for_its_address() {
    let taken = free_listener().await;
    let address = taken.local_addr().expect("bound");
    let handler = |_: NodeName, question: Question| async move { format!("{question:?}") };
    tokio::spawn(listen(address, identity(7, "midna", &["alp"]), Arc::default(), handler));
    sleep(Duration::from_millis(100)).await; // its first try fails meanwhile
    drop(taken);
    let client = PeerClient::new(identity(7, "alp", &["midna"]), name("midna"), address);
    let deadline = clock::now() + LIMIT;
    while echo(&client, "hello", Duration::from_secs(1)).await.is_err() {
        assert!(clock::now() < deadline, "never bound");
        sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test]
async fn handshakes_that_lead_nowhere_are_bounded_and_end() {
    let midna = Midna::start().await;
    let mut idle = Vec::new();
    for _ in 0..9 {
        idle.push(TcpStream::connect(midna.address).await.expect("connected"));
    }
    // The ninth from one address is closed at once, ...
    midna.counted(&[("too_many", 1)]).await;
    read_to_the_end(&mut idle.pop().expect("nine")).await;
    // ... the others when their time is up; then there is room again.
    midna.counted(&[("too_many", 1), ("timed_out", 8)]).await;
    assert!(echo(&midna.client(), "hello", LIMIT).await.is_ok());
}

#[tokio::test]
async fn a_nodes_fifth_connection_closes_its_oldest() {
    let midna = Midna::start().await;
    let clients: Vec<PeerClient> = (0..5).map(|_| midna.client()).collect();
    for client in &clients {
        assert!(echo(client, "hello", LIMIT).await.is_ok());
    }
    midna.counted(&[("accepted", 5)]).await;
    for client in &clients[1..] {
        assert!(echo(client, "hello", LIMIT).await.is_ok());
    }
    midna.counted(&[("accepted", 5)]).await;
    // The first dials anew (its first question may still meet the closed connection).
    let _closed = echo(&clients[0], "hello", LIMIT).await;
    assert!(echo(&clients[0], "hello", LIMIT).await.is_ok());
    midna.counted(&[("accepted", 6)]).await;
}

#[tokio::test]
async fn refusals_are_counted_each_time_and_logged_once() {
    let log = Log::default();
    let subscriber = tracing_subscriber::fmt().with_writer(log.clone()).with_ansi(false).finish();
    let _guard = tracing::subscriber::set_default(subscriber);
    let midna = Midna::start().await;
    for round in 1..=5 {
        let stranger = PeerClient::new(identity(7, "stranger", &["midna"]), name("midna"), midna.address);
        assert_eq!(echo(&stranger, "hello", LIMIT).await, Err(PeerError::RefusedByPeer));
        let before: &[_] = &[("refused_key", round), ("refused_tls", round - 1)];
        midna.counted(if round == 1 { &before[..1] } else { before }).await;
        let mut garbage = TcpStream::connect(midna.address).await.expect("connected");
        garbage.write_all(b"hello\r\n").await.expect("sent");
        drop(garbage);
        midna.counted(&[("refused_key", round), ("refused_tls", round)]).await;
    }
    let text = String::from_utf8(log.0.lock().expect("no panic").clone()).expect("text");
    let lines = |reason: &str| text.lines().filter(|line| line.contains("WARN") && line.contains(reason)).count();
    assert_eq!(lines("no configured node's"), 1, "{text}");
    assert_eq!(lines("does not speak TLS 1.3"), 1, "{text}");
    // Each stranger is a client of its own and says once that it was refused.
    assert_eq!(lines("it refused our key"), 5, "{text}");
}

#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl std::io::Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().expect("no panic").extend_from_slice(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl<'a> tracing_subscriber::fmt::MakeWriter<'a> for Log {
    type Writer = Log;
    fn make_writer(&'a self) -> Log {
        self.clone()
    }
}

/// Passes bytes both ways, records the client's, and can swallow all that its present connections carry.
struct Relay {
    address: SocketAddr,
    recorded: Arc<Mutex<Vec<u8>>>,
    /// One for each connection so far.
    dead: Arc<Mutex<Vec<Arc<AtomicBool>>>>,
}

impl Relay {
    async fn start(to: SocketAddr) -> Relay {
        let listener = free_listener().await;
        let relay =
            Relay { address: listener.local_addr().expect("bound"), recorded: Arc::default(), dead: Arc::default() };
        let (recorded, dead) = (relay.recorded.clone(), relay.dead.clone());
        tokio::spawn(async move {
            loop {
                let (client, _) = listener.accept().await.expect("accepted");
                let server = TcpStream::connect(to).await.expect("connected");
                let swallow = Arc::new(AtomicBool::new(false));
                dead.lock().expect("no panic").push(swallow.clone());
                let (from_client, to_client) = client.into_split();
                let (from_server, to_server) = server.into_split();
                let record = Some(recorded.clone());
                tokio::spawn(pass(from_client, to_server, swallow.clone(), record));
                tokio::spawn(pass(from_server, to_client, swallow, None));
            }
        });
        relay
    }

    fn swallow_all_there_is(&self) {
        self.dead.lock().expect("no panic").iter().for_each(|dead| dead.store(true, Ordering::Relaxed));
    }
}

/// A dead direction reads on and says nothing, not even that it ended.
async fn pass(
    mut from: tokio::net::tcp::OwnedReadHalf,
    mut to: tokio::net::tcp::OwnedWriteHalf,
    dead: Arc<AtomicBool>,
    recorded: Option<Arc<Mutex<Vec<u8>>>>,
) {
    let mut buffer = [0; 4096];
    while let Ok(length @ 1..) = from.read(&mut buffer).await {
        if dead.load(Ordering::Relaxed) {
            continue;
        }
        if let Some(recorded) = &recorded {
            recorded.lock().expect("no panic").extend_from_slice(&buffer[..length]);
        }
        if to.write_all(&buffer[..length]).await.is_err() {
            return;
        }
    }
    if dead.load(Ordering::Relaxed) {
        std::future::pending::<()>().await;
    }
}
