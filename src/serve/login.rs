//! From an accepted connection to a logged-in one: SSLRequest and TLS, cancel requests, the startup message, then what
//! the rules of `hba_file` demand (`rules`): a password's proof (`prove`), a certificate, nothing.
//!
//! What it is NOT: it stores no password and shows none; the secrets are PostgreSQL's own (`serve::roles`).
//!
//! **Invariants:** nothing that arrived before a TLS handshake is ever read as if it had come after it
//! (CVE-2021-23214): the opening packet is read to its last byte and no further, and bytes queued behind it are an
//! error. A role that does not exist takes the same steps as a wrong password.

mod prove;
mod rules;

use super::backend::Proof;
use super::listener::Proxy;
use super::tls::{ClientStream, TlsAcceptor};
use crate::wire::hba::{ClientName, Method};
use crate::wire::pg::{self, Opening, Refusal, Startup};
use crate::wire::x509;
use bytes::BytesMut;
use data_encoding::BASE64;
use futures_util::FutureExt;
use pgwire::messages::response::{GssEncResponse, SslResponse};
use pgwire::messages::startup::NegotiateProtocolVersion;
use ring::rand::{SecureRandom, SystemRandom};
use std::io;
use std::net::SocketAddr;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// First byte of a TLS handshake (RFC 8446, ContentType). No opening packet is that long.
const TLS_HANDSHAKE: u8 = 0x16;
/// Random bytes in a nonce (PostgreSQL's `SCRAM_RAW_NONCE_LEN`).
const NONCE_BYTES: usize = 18;
/// Protocol 3.0, as NegotiateProtocolVersion says it.
const PROTOCOL_3_0: i32 = 3 << 16;

/// Bytes looked at before the first is read: more than start-up packets usually have.
const PEEK: usize = 512;

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
    mut client: ClientStream,
    peer: SocketAddr,
    tls: Option<&TlsAcceptor>,
) -> Result<(ClientStream, Opened), (Option<ClientStream>, Stop)> {
    let mut first = [0; PEEK];
    let seen = client.peek(&mut first).await.unwrap_or(0);
    // Most packets are there as a whole: one call reads such a one.
    let mut length = first[..seen].first_chunk::<4>().copied().filter(|length| {
        let whole = usize::try_from(u32::from_be_bytes(*length)).unwrap_or(usize::MAX);
        seen >= whole
    });
    if seen > 0 && first[0] == TLS_HANDSHAKE {
        // sslnegotiation=direct: what follows is TLS or nothing, and nothing was read yet.
        length = None;
        client = shake_hands(client, peer, tls, true).await?;
    }
    let (mut ssl_done, mut gss_done) = (false, false);
    loop {
        let opening = match read_opening(&mut client, length.take()).await {
            Ok(opening) => opening,
            Err(stop) => return Err((Some(client), stop)),
        };
        match opening {
            Opening::Ssl if !ssl_done => {
                ssl_done = true;
                match answer_ssl(client, peer, tls).await {
                    Ok(upgraded) => client = upgraded,
                    Err(stopped) => return Err(stopped),
                }
            }
            Opening::GssEnc if !gss_done => {
                gss_done = true;
                let mut out = BytesMut::new();
                pg::put(&GssEncResponse::Refuse, &mut out);
                if client.write_all(&out).await.is_err() || client.flush().await.is_err() {
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

/// Reads one opening packet; `whole`: its length word, where all of it is there and nothing of it was read.
async fn read_opening(client: &mut ClientStream, whole: Option<[u8; 4]>) -> Result<Opening, Stop> {
    if let Some(length) = whole {
        let mut packet = vec![0; 4 + pg::opening_rest(length)?];
        client.read_exact(&mut packet).await?;
        return Ok(pg::opening(&packet[4..])?);
    }
    let mut length = [0; 4];
    client.read_exact(&mut length).await?;
    let mut body = vec![0; pg::opening_rest(length)?];
    client.read_exact(&mut body).await?;
    Ok(pg::opening(&body)?)
}

async fn answer_ssl(
    mut client: ClientStream,
    peer: SocketAddr,
    tls: Option<&TlsAcceptor>,
) -> Result<ClientStream, (Option<ClientStream>, Stop)> {
    let mut out = BytesMut::new();
    if client.is_tls() {
        let refusal = Refusal::new("08P01", "SSL was asked for inside of SSL");
        return Err((Some(client), refusal.into()));
    }
    // CVE-2021-23214: a client that speaks before we answered may be two, one of them between us and the other.
    if matches!(client.peek(&mut [0; 1]).now_or_never(), Some(Ok(1..))) {
        let refusal = Refusal::new("08P01", "received unencrypted data after SSL request")
            .hint("This could be either a client-software bug or evidence of an attempted man-in-the-middle attack.");
        return Err((Some(client), refusal.into()));
    }
    pg::put(if tls.is_some() { &SslResponse::Accept } else { &SslResponse::Refuse }, &mut out);
    if client.write_all(&out).await.is_err() || client.flush().await.is_err() {
        return Err((None, Stop::Silent));
    }
    match tls {
        None => Ok(client),
        tls => shake_hands(client, peer, tls, false).await,
    }
}

async fn shake_hands(
    client: ClientStream,
    peer: SocketAddr,
    tls: Option<&TlsAcceptor>,
    direct: bool,
) -> Result<ClientStream, (Option<ClientStream>, Stop)> {
    // There is no TLS to say it in.
    let (Some(tls), Some(carrier)) = (tls, client.into_carrier()) else { return Err((None, Stop::Silent)) };
    tls.accept(carrier, direct).await.map_err(|error| {
        tracing::info!(%peer, %error, "TLS handshake failed");
        (None, Stop::Silent)
    })
}

/// Who the client is, by the rules and its own proof; nothing was said to it yet that lets it in. The caller bounds the
/// time.
pub(crate) async fn authenticate(
    client: &mut ClientStream,
    peer: SocketAddr,
    startup: &Startup,
    proxy: &Proxy,
) -> Result<Proof, Stop> {
    if startup.minor > 0 || !startup.options.is_empty() {
        say(client, &NegotiateProtocolVersion::new(PROTOCOL_3_0, startup.options.clone())).await?;
    }
    let mut demand = rules::demand(client, peer, startup, proxy).await?;
    let entry = demand.entry.clone();
    let user = startup.user.as_str();
    if entry.needs_certificate {
        if !client.has_ca() {
            let text = "client certificates can only be checked if a root certificate store is available";
            return Err(Refusal::new("F0000", text).hint("Set auth.tls_ca_file of portcullis.").into());
        }
        if client.certificate().is_none() {
            proxy.gate.count_auth_failure();
            return Err(Refusal::new("28000", "connection requires a valid client certificate").into());
        }
    }
    let proof = match entry.method {
        Method::Trust => Proof::Trust,
        Method::Cert => Proof::Certificate,
        Method::ScramSha256 | Method::Md5 => prove::password(client, peer, startup, entry.method, proxy).await?,
        Method::Reject => return Err(Stop::Silent),
    };
    if entry.needs_name
        && let Err(why) = name_fits(client, &mut demand, proxy).await?
    {
        proxy.gate.count_auth_failure();
        tracing::info!(user, %peer, why, rule = entry.place(), "certificate authentication failed");
        let (code, how) = match entry.method {
            Method::Cert => ("28000", "certificate"),
            Method::Trust => ("28000", "\"trust\""),
            _ => ("28P01", "password"),
        };
        return Err(Refusal::new(code, format!("{how} authentication failed for user \"{user}\"")).into());
    }
    // Whoever proved a password was asked about there.
    if matches!(entry.method, Method::Cert | Method::Trust) {
        match proxy.roles.may_log_in(user).await.map_err(rules::no_login)? {
            Some(true) => {}
            Some(false) => return Err(prove::not_permitted(proxy, user, peer)),
            None => {
                proxy.gate.count_auth_failure();
                tracing::info!(user, %peer, "there is no such role");
                return Err(Refusal::new("28000", format!("role \"{user}\" does not exist")).into());
            }
        }
    }
    Ok(proof)
}

/// Whether the certificate is in a name for the role; the inner error is for the log.
async fn name_fits(
    client: &ClientStream,
    demand: &mut rules::Demand<'_>,
    proxy: &Proxy,
) -> Result<Result<(), String>, Stop> {
    let subject = client.certificate().and_then(|certificate| x509::subject(certificate));
    let Some(subject) = subject else { return Ok(Err("the certificate cannot be read".to_owned())) };
    let name = match demand.entry.client_name {
        ClientName::Cn => subject.common_name.unwrap_or_default(),
        ClientName::Dn => subject.distinguished_name,
    };
    // As PostgreSQL: a name that ends early would be another one to whoever reads it so.
    if name.is_empty() || name.contains('\0') {
        return Ok(Err("client certificate contains no user name".to_owned()));
    }
    if demand.fits(&name, proxy).await? {
        return Ok(Ok(()));
    }
    let shown = name.escape_debug();
    Ok(Err(match &demand.entry.map {
        None => format!("the certificate is in the name of \"{shown}\""),
        Some(map) => format!("no match in map \"{}\" for a certificate in the name of \"{shown}\"", map.escape_debug()),
    }))
}

/// Asked for by `replication=true`: rules name it by their keyword alone, PostgreSQL's too.
pub(crate) fn is_physical_replication(startup: &Startup) -> bool {
    rules::Purpose::of(startup) == Ok(rules::Purpose::Replication)
}

async fn say(client: &mut ClientStream, message: &impl pgwire::messages::Message) -> io::Result<()> {
    let mut out = BytesMut::new();
    pg::put(message, &mut out);
    client.write_all(&out).await?;
    client.flush().await
}
