//! From an accepted connection to a logged-in one: SSLRequest and TLS, cancel requests, the startup message, the rules
//! of `hba_file`, SCRAM.
//!
//! What it is NOT: it stores no password and shows none; the verifiers are PostgreSQL's own (`serve::roles`).
//!
//! **Invariants:** nothing that arrived before a TLS handshake is ever read as if it had come after it
//! (CVE-2021-23214): the opening packet is read to its last byte and no further, and bytes queued behind it are an
//! error. A role that does not exist takes the same steps as a wrong password.

use super::backend::Proof;
use super::listener::Proxy;
use super::tls::{ClientStream, TlsAcceptor};
use crate::wire::hba::{Asker, Method};
use crate::wire::pg::{self, HEADER, Opening, Refusal, Startup};
use crate::wire::scram::{self, ScramError, Verifier};
use bytes::BytesMut;
use data_encoding::BASE64;
use futures_util::FutureExt;
use pgwire::messages::response::{GssEncResponse, SslResponse};
use pgwire::messages::startup::{Authentication, NegotiateProtocolVersion};
use ring::rand::{SecureRandom, SystemRandom};
use std::io;
use std::net::SocketAddr;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// Longest message a client may send while it logs in, in bytes; a longer one ends the connection.
const MAX_LOGIN_MESSAGE: usize = scram::MAX_MESSAGE + 64;
/// Random bytes in a nonce (PostgreSQL's `SCRAM_RAW_NONCE_LEN`).
const NONCE_BYTES: usize = 18;
/// Protocol 3.0, as NegotiateProtocolVersion says it.
const PROTOCOL_3_0: i32 = 3 << 16;

/// Why a connection ends before it is a session.
pub(crate) enum Stop {
    /// There is nobody to tell, or nothing to say.
    Silent,
    Refuse(Refusal),
    /// An ErrorResponse of PostgreSQL, to pass on.
    PassOn(Vec<u8>),
}

impl From<io::Error> for Stop {
    fn from(_: io::Error) -> Stop {
        Stop::Silent
    }
}
impl From<Refusal> for Stop {
    fn from(refusal: Refusal) -> Stop {
        Stop::Refuse(refusal)
    }
}
impl From<pg::Malformed> for Stop {
    fn from(malformed: pg::Malformed) -> Stop {
        Refusal::new("08P01", malformed.0).into()
    }
}

/// What a connection turned out to want.
pub(crate) enum Opened {
    Cancel { pid: i32, key: Vec<u8> },
    Startup(Startup),
}

/// A fresh nonce for either side of SCRAM.
pub(crate) fn nonce() -> String {
    BASE64.encode(&random::<NONCE_BYTES>())
}

/// Random bytes from the kernel.
pub(crate) fn random<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    SystemRandom::new().fill(&mut bytes).expect("getrandom cannot fail once the machine has booted");
    bytes
}

/// Reads opening packets, through TLS where asked, until one says what the client wants. The caller bounds the time.
/// On refusal the stream comes back, for the message.
pub(crate) async fn open(
    stream: TcpStream,
    tls: Option<&TlsAcceptor>,
) -> Result<(ClientStream, Opened), (Option<ClientStream>, Stop)> {
    let mut client = ClientStream::Plain(stream);
    let (mut ssl_done, mut gss_done) = (false, false);
    loop {
        let opening = match read_opening(&mut client).await {
            Ok(opening) => opening,
            Err(stop) => return Err((Some(client), stop)),
        };
        match opening {
            Opening::Ssl if !ssl_done => {
                ssl_done = true;
                match answer_ssl(client, tls).await {
                    Ok(upgraded) => client = upgraded,
                    Err(stopped) => return Err(stopped),
                }
            }
            Opening::GssEnc if !gss_done => {
                gss_done = true;
                let mut out = BytesMut::new();
                pg::put(&GssEncResponse::Refuse, &mut out);
                if client.write_all(&out).await.is_err() {
                    return Err((None, Stop::Silent));
                }
            }
            Opening::Ssl | Opening::GssEnc => {
                let refusal = Refusal::new("08P01", "unsupported frontend protocol: encryption was asked for twice");
                return Err((Some(client), refusal.into()));
            }
            Opening::Cancel { pid, key } => return Ok((client, Opened::Cancel { pid, key })),
            Opening::Startup(startup) => return Ok((client, Opened::Startup(startup))),
            Opening::OldProtocol { major, minor } => {
                let refusal = Refusal::new(
                    "0A000",
                    format!("unsupported frontend protocol {major}.{minor}: server supports 3.0 to 3.0"),
                );
                return Err((Some(client), refusal.into()));
            }
        }
    }
}

async fn read_opening(client: &mut ClientStream) -> Result<Opening, Stop> {
    let mut length = [0; 4];
    client.read_exact(&mut length).await?;
    let mut body = vec![0; pg::opening_rest(length)?];
    client.read_exact(&mut body).await?;
    Ok(pg::opening(&body)?)
}

async fn answer_ssl(
    client: ClientStream,
    tls: Option<&TlsAcceptor>,
) -> Result<ClientStream, (Option<ClientStream>, Stop)> {
    let mut out = BytesMut::new();
    let ClientStream::Plain(mut stream) = client else {
        let refusal = Refusal::new("08P01", "SSL was asked for inside of SSL");
        return Err((Some(client), refusal.into()));
    };
    // CVE-2021-23214: a client that speaks before we answered may be two, one of them between us and the other.
    if matches!(stream.peek(&mut [0; 1]).now_or_never(), Some(Ok(1..))) {
        let refusal = Refusal::new("08P01", "received unencrypted data after SSL request")
            .hint("This could be either a client-software bug or evidence of an attempted man-in-the-middle attack.");
        return Err((Some(ClientStream::Plain(stream)), refusal.into()));
    }
    pg::put(if tls.is_some() { &SslResponse::Accept } else { &SslResponse::Refuse }, &mut out);
    if stream.write_all(&out).await.is_err() {
        return Err((None, Stop::Silent));
    }
    match tls {
        None => Ok(ClientStream::Plain(stream)),
        Some(tls) => match tls.accept(stream).await {
            Ok(stream) => Ok(ClientStream::Tls(Box::new(stream))),
            Err(error) => {
                tracing::debug!(%error, "TLS handshake failed");
                Err((None, Stop::Silent))
            }
        },
    }
}

/// Who the client is, by the rules and its own proof; nothing was said to it yet that lets it in. The caller bounds the
/// time.
pub(crate) async fn authenticate(
    client: &mut ClientStream,
    peer: SocketAddr,
    startup: &Startup,
    proxy: &Proxy,
) -> Result<Proof, Stop> {
    if startup.wants_replication() {
        return Err(Refusal::new("0A000", "portcullis: replication connections do not pass the gate")
            .hint("Connect to PostgreSQL itself.")
            .into());
    }
    if startup.minor > 0 || !startup.options.is_empty() {
        say(client, &NegotiateProtocolVersion::new(PROTOCOL_3_0, startup.options.clone())).await?;
    }
    let asker = Asker { address: peer.ip(), tls: client.is_tls(), user: &startup.user, database: &startup.database };
    let refuse = |what: &str| {
        let encryption = if asker.tls { "SSL encryption" } else { "no encryption" };
        proxy.gate.count_auth_failure();
        tracing::info!(user = startup.user, database = startup.database, %peer, "login refused by hba_file");
        Refusal::new(
            "28000",
            format!(
                "{what} for host \"{}\", user \"{}\", database \"{}\", {encryption}",
                asker.address, asker.user, asker.database
            ),
        )
    };
    match proxy.options.rules.hba().method(asker) {
        None => Err(refuse("no pg_hba.conf entry").into()),
        Some(Method::Reject) => Err(refuse("pg_hba.conf rejects connection").into()),
        Some(Method::Trust) => Ok(Proof::Trust),
        Some(Method::ScramSha256) => Ok(Proof::Scram(prove(client, peer, startup, proxy).await?)),
    }
}

/// The server side of SCRAM, up to and with AuthenticationSASLFinal.
async fn prove(
    client: &mut ClientStream,
    peer: SocketAddr,
    startup: &Startup,
    proxy: &Proxy,
) -> Result<scram::Keys, Stop> {
    say(client, &Authentication::SASL(vec![scram::MECHANISM.to_owned()])).await?;
    let initial = read_response(client).await?;
    let first = initial_response(&initial)?;
    let found = proxy.roles.verifier(&startup.user).await.map_err(|unreadable| {
        tracing::error!(error = %unreadable, "no login is possible");
        Refusal::new("57P03", "portcullis: PostgreSQL on this node does not accept connections now")
    })?;
    let verifier = found.unwrap_or_else(|| Verifier::mock(&startup.user, &proxy.mock_secret));
    let protocol_error = |error: ScramError| Refusal::new("08P01", error.to_string());
    let (server, answer) = scram::Server::start(verifier, first, &nonce()).map_err(protocol_error)?;
    say(client, &Authentication::SASLContinue(answer.into_bytes().into())).await?;
    let last = read_response(client).await?;
    let (keys, signature) = server.finish(&last).map_err(|error| match error {
        ScramError::Malformed(_) => protocol_error(error),
        ScramError::WrongProof => {
            proxy.gate.count_auth_failure();
            tracing::info!(user = startup.user, %peer, "password authentication failed");
            Refusal::new("28P01", format!("password authentication failed for user \"{}\"", startup.user))
        }
    })?;
    say(client, &Authentication::SASLFinal(signature.into_bytes().into())).await?;
    Ok(keys)
}

/// The body of a message of the password family.
async fn read_response(client: &mut ClientStream) -> Result<Vec<u8>, Stop> {
    let mut head = [0; HEADER];
    client.read_exact(&mut head).await?;
    let header = pg::header(&head)?.ok_or(Stop::Silent)?;
    if header.kind != b'p' {
        return Err(pg::Malformed("expected SASL response").into());
    }
    if header.body > MAX_LOGIN_MESSAGE {
        return Err(pg::Malformed("SASL response is too long").into());
    }
    let mut body = vec![0; header.body];
    client.read_exact(&mut body).await?;
    Ok(body)
}

/// The SCRAM message in a SASLInitialResponse.
fn initial_response(body: &[u8]) -> Result<&[u8], Stop> {
    const LAYOUT: pg::Malformed = pg::Malformed("malformed SASLInitialResponse");
    let end = body.iter().position(|b| *b == 0).ok_or(LAYOUT)?;
    let (mechanism, rest) = body.split_at(end);
    if mechanism != scram::MECHANISM.as_bytes() {
        return Err(pg::Malformed("client selected an invalid SASL authentication mechanism").into());
    }
    let (length, data) = rest[1..].split_first_chunk::<4>().ok_or(LAYOUT)?;
    if usize::try_from(u32::from_be_bytes(*length)) != Ok(data.len()) {
        return Err(LAYOUT.into());
    }
    Ok(data)
}

async fn say(client: &mut ClientStream, message: &impl pgwire::messages::Message) -> io::Result<()> {
    let mut out = BytesMut::new();
    pg::put(message, &mut out);
    client.write_all(&out).await?;
    client.flush().await
}
