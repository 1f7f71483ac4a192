//! Opens a backend: a connection to the local PostgreSQL's Unix socket, logged in as the very role, with start-up
//! parameters as clients gave them.
//!
//! What it is NOT: it never sets another role on a stronger login, and it holds no password: it logs in with what the
//! client proved, or with nothing where PostgreSQL asks for nothing.

use super::gate::Pass;
use super::listener::Proxy;
use super::pool::{Settings, Shape};
use super::socket::Socket;
use crate::base::time::Instant;
use crate::wire::md5;
use crate::wire::pg::statements::Known;
use crate::wire::pg::{self, HEADER, Refusal, Startup};
use crate::wire::scram::{self, Keys};
use crate::wire::tunnel::Proven;
use bytes::BytesMut;
use pgwire::messages::startup::{Password, PasswordMessageFamily, SASLInitialResponse, SASLResponse};
use std::fmt;
use std::rc::Rc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// Bytes of PostgreSQL's greeting (parameters, key, notices) that are kept; a longer one ends the login.
const MAX_GREETING: usize = 64 * 1024;
/// How long PostgreSQL may take for a login; then it is hung.
const OPEN_TIMEOUT: Duration = Duration::from_secs(10);
/// Connections that roles without privileges may have (PostgreSQL 15, chapter 20.3; the second since 16): what is kept
/// for others must be free, so those that superusers have now, the daemon's own among them, come off too. Everything by
/// its full name: it is asked with the search_path of a client.
const LIMIT_QUERY: &str = "select pg_catalog.current_setting('max_connections')::pg_catalog.int4 \
     operator(pg_catalog.-) pg_catalog.current_setting('superuser_reserved_connections')::pg_catalog.int4 \
     operator(pg_catalog.-) coalesce(pg_catalog.current_setting('reserved_connections', true), '0')::pg_catalog.int4 \
     operator(pg_catalog.-) (select pg_catalog.count(*) from pg_catalog.pg_stat_activity a \
        where a.datname is not null and exists (select from pg_catalog.pg_roles r \
            where r.oid operator(pg_catalog.=) a.usesysid and r.rolsuper))::pg_catalog.int4";

/// A backend at rest.
pub(crate) struct Backend {
    pub(crate) stream: Socket,
    pub(crate) pid: i32,
    pub(crate) key: u32,
    /// What it said between AuthenticationOk and ReadyForQuery, without its key: for clients of this shape.
    pub(crate) greeting: Rc<[u8]>,
    /// What it was started with.
    pub(crate) shape: Shape,
    /// What was set on top of that (transaction mode).
    pub(crate) settings: Settings,
    pub(crate) known: Known,
    /// The generation of the gate it was opened in.
    pub(crate) pass: Pass,
    pub(crate) born: Instant,
    pub(crate) idle_since: Instant,
    pub(crate) reconnects: u32,
    /// The gate's suspensions before it was opened: one of before a suspension passes nothing after it.
    pub(crate) suspensions: u64,
}

impl Backend {
    /// It has said nothing since it came to rest: no last words, no change of a setting, no notification.
    pub(crate) fn is_silent(&self) -> bool {
        self.stream.is_silent()
    }
}

/// Why there is no backend.
#[derive(Debug)]
pub(crate) enum NoBackend {
    /// An ErrorResponse of PostgreSQL, header included, to pass on as it is.
    Refused(Vec<u8>),
    /// Ours to say.
    Refusal(Refusal),
}

impl NoBackend {
    /// PostgreSQL has no room for any connection.
    pub(crate) fn is_full(&self) -> bool {
        let field = |name| match self {
            NoBackend::Refused(message) => pg::field(&message[HEADER..], name),
            NoBackend::Refusal(_) => None,
        };
        // Not where one role or one database may have no more.
        field(b'C').as_deref() == Some("53300")
            && !matches!(field(b'R').as_deref(), Some("InitializeSessionUserId" | "CheckMyDatabase"))
    }

    /// PostgreSQL cannot take a connection just now, and may soon: it starts, stops, or is full.
    pub(crate) fn is_passing(&self) -> bool {
        match self {
            NoBackend::Refused(message) => {
                matches!(pg::field(&message[HEADER..], b'C').as_deref(), Some("57P03" | "53300"))
            }
            NoBackend::Refusal(refusal) => refusal.code == "57P03",
        }
    }
}

impl From<Refusal> for NoBackend {
    fn from(refusal: Refusal) -> NoBackend {
        NoBackend::Refusal(refusal)
    }
}

/// How the client proved who it is: what further backends are logged in with as the same role. Secrets in it are wiped
/// when it is dropped.
#[derive(Clone)]
pub(crate) enum Proof {
    /// By a SCRAM proof, which gave the keys away.
    Scram(Keys),
    /// By an answer that fits the stored md5 hash.
    Md5(md5::Hash),
    /// By a certificate in the role's name.
    Certificate,
    /// Not at all: a `trust` line of the gate.
    Trust,
}

impl Proof {
    /// PostgreSQL takes it for a password's proof; without one its own rules must let the gate in.
    pub(crate) fn has_secret(&self) -> bool {
        matches!(self, Proof::Scram(_) | Proof::Md5(_))
    }
}

impl From<&Proof> for Proven {
    fn from(proof: &Proof) -> Proven {
        match proof {
            Proof::Scram(keys) => Proven::Scram(keys.octets()),
            Proof::Md5(hash) => Proven::Md5(hash.octets()),
            Proof::Certificate => Proven::Certificate,
            Proof::Trust => Proven::Trust,
        }
    }
}

impl Proof {
    /// What another gate was shown; `None`: not by a gate of this kind.
    pub(crate) fn of(proven: &Proven) -> Option<Proof> {
        Some(match proven {
            Proven::Scram(octets) => Proof::Scram(Keys::from_octets(octets)?),
            Proven::Md5(octets) => Proof::Md5(md5::Hash::from_octets(octets)?),
            Proven::Certificate => Proof::Certificate,
            Proven::Trust => Proof::Trust,
        })
    }
}

impl fmt::Debug for Proof {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Proof(...)")
    }
}

/// Opens a backend and brings it to rest.
pub(crate) async fn open(proxy: &Proxy, shape: &Shape, proof: &Proof, pass: &Pass) -> Result<Backend, NoBackend> {
    let unreachable = |_| Refusal::new("57P03", "portcullis: PostgreSQL on this node does not accept connections now");
    let suspensions = proxy.gate.suspensions();
    let opening = async {
        let mut stream = Socket::connect(proxy.door.as_path()).await.map_err(unreachable)?;
        stream.write_all(&shape.encode()).await.map_err(unreachable)?;
        let mut login = Login { stream, startup: shape, proof };
        login.authenticate().await?;
        let mut opened = login.greeting(shape, pass).await?;
        opened.suspensions = suspensions;
        if !shape.wants_replication() && proxy.backends_max.load(Ordering::SeqCst) == 0 {
            learn_the_limit(proxy, &mut opened).await?;
        }
        Ok(opened)
    };
    let slow = |_| Refusal::new("57P03", "portcullis: PostgreSQL on this node did not finish a login in time");
    tokio::time::timeout(OPEN_TIMEOUT, opening).await.map_err(slow)?
}

/// Asks how many connections there may be. The answer counts until the gate is cut.
async fn learn_the_limit(proxy: &Proxy, backend: &mut Backend) -> Result<(), NoBackend> {
    let answer = super::chores::ask(&mut backend.stream, LIMIT_QUERY).await.map_err(|_| not_understood())?;
    let limit = answer.first().and_then(|row| row.first()).and_then(|text| text.parse().ok());
    proxy.backends_max.store(limit.unwrap_or(u32::MAX).max(1), Ordering::SeqCst);
    Ok(())
}

struct Login<'a> {
    stream: Socket,
    startup: &'a Startup,
    proof: &'a Proof,
}

fn lost(_: std::io::Error) -> NoBackend {
    Refusal::new("57P03", "portcullis: PostgreSQL ended the connection during the login").into()
}

fn not_understood() -> NoBackend {
    Refusal::new("08P01", "portcullis: PostgreSQL's answer during the login was not understood").into()
}

impl Login<'_> {
    async fn authenticate(&mut self) -> Result<(), NoBackend> {
        let mut scram: Option<scram::Client> = None;
        loop {
            let (kind, message) = read_message(&mut self.stream).await?;
            let body = &message[HEADER..];
            match kind {
                b'R' => {}
                b'E' => return Err(self.explain(message)),
                b'N' => continue,
                _ => return Err(not_understood()),
            }
            let (code, data) = body.split_first_chunk::<4>().ok_or_else(not_understood)?;
            match (u32::from_be_bytes(*code), scram.take()) {
                (0, None) => return Ok(()),
                // SASL was begun and not finished: whoever answers has not shown the server key.
                (0, Some(_)) => return Err(not_understood()),
                (10, None) => {
                    let Proof::Scram(keys) = self.proof else { return Err(self.not_let_in("asks for scram-sha-256")) };
                    if !data.split(|b| *b == 0).any(|name| name == scram::MECHANISM.as_bytes()) {
                        return Err(not_understood());
                    }
                    let (client, first) = scram::Client::start(keys.clone(), &super::login::nonce());
                    let first = SASLInitialResponse::new(scram::MECHANISM.to_owned(), Some(first.into_bytes().into()));
                    self.send(PasswordMessageFamily::SASLInitialResponse(first)).await?;
                    scram = Some(client);
                }
                (11, Some(mut client)) => {
                    let last = client.answer(data).map_err(|_| not_understood())?;
                    self.send(PasswordMessageFamily::SASLResponse(SASLResponse::new(last.into_bytes().into()))).await?;
                    scram = Some(client);
                }
                // Whoever answers on this socket must know the role's server key.
                (12, Some(client)) => client.verify(data).map_err(|_| not_understood())?,
                (3, _) => return Err(self.not_let_in("asks for a clear-text password")),
                (5, None) => {
                    let Proof::Md5(hash) = self.proof else { return Err(self.not_let_in("asks for an md5 password")) };
                    let answer = hash.response(data.try_into().map_err(|_| not_understood())?);
                    self.send(PasswordMessageFamily::Password(Password::new(answer))).await?;
                }
                _ => return Err(self.not_let_in("asks for something else than scram-sha-256")),
            }
        }
    }

    /// Everything up to the first ReadyForQuery.
    async fn greeting(mut self, shape: &Shape, pass: &Pass) -> Result<Backend, NoBackend> {
        let (mut pid, mut key, mut greeting) = (0, 0, Vec::new());
        loop {
            let (kind, message) = read_message(&mut self.stream).await?;
            match kind {
                b'E' => return Err(self.explain(message)),
                b'K' => {
                    let (id, secret) = message[HEADER..].split_first_chunk::<4>().ok_or_else(not_understood)?;
                    let secret = secret.try_into().map_err(|_| not_understood())?;
                    (pid, key) = (i32::from_be_bytes(*id), u32::from_be_bytes(secret));
                    continue;
                }
                b'Z' => {
                    return Ok(Backend {
                        stream: self.stream,
                        pid,
                        key,
                        greeting: greeting.into(),
                        shape: Rc::clone(shape),
                        settings: None,
                        known: Known::default(),
                        pass: pass.clone(),
                        born: Instant::ZERO,
                        idle_since: Instant::ZERO,
                        reconnects: 0,
                        suspensions: 0,
                    });
                }
                // We asked for 3.0 without options: there is nothing to negotiate.
                b'v' => return Err(not_understood()),
                _ => {}
            }
            greeting.extend_from_slice(&message);
            if greeting.len() > MAX_GREETING {
                return Err(not_understood());
            }
        }
    }

    async fn send(&mut self, message: PasswordMessageFamily) -> Result<(), NoBackend> {
        let mut out = BytesMut::new();
        pg::put(&message, &mut out);
        self.stream.write_all(&out).await.map_err(lost)
    }

    /// PostgreSQL's refusal: as it is, unless it is about how the gate came in, which the client cannot know.
    fn explain(&self, message: Vec<u8>) -> NoBackend {
        let body = &message[HEADER..];
        let about_the_door = matches!(pg::field(body, b'C').as_deref(), Some("28000" | "28P01"))
            // "role does not exist" and "is not permitted to log in" come from elsewhere and are plain enough.
            && pg::field(body, b'R').as_deref() != Some("InitializeSessionUserId");
        if about_the_door { self.not_let_in("refuses it") } else { NoBackend::Refused(message) }
    }

    fn not_let_in(&self, how: &str) -> NoBackend {
        let role = quote(&self.startup.user);
        let how_to = match self.proof {
            Proof::Scram(_) => "scram-sha-256",
            Proof::Md5(_) => "md5",
            Proof::Certificate | Proof::Trust => "peer map=portcullis",
        };
        let database = if super::login::is_physical_replication(self.startup) { "replication" } else { "all" };
        let line = format!("local {database} {role} {how_to}");
        Refusal::new(
            "28000",
            format!(
                "portcullis: PostgreSQL does not let the gate in as role \"{}\" on its local socket (it {how})",
                self.startup.user
            ),
        )
        .hint(format!("Add to PostgreSQL's pg_hba.conf, before other local lines: {line}"))
        .into()
    }
}

/// A name as pg_hba.conf wants it.
fn quote(name: &str) -> String {
    let plain = name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b'-' || b == b'.');
    if plain && name != "all" { name.to_owned() } else { format!("\"{name}\"") }
}

/// One message, header included.
async fn read_message(stream: &mut Socket) -> Result<(u8, Vec<u8>), NoBackend> {
    let mut message = vec![0; HEADER];
    stream.read_exact(&mut message).await.map_err(lost)?;
    let header = pg::header(&message).ok().flatten().filter(|header| header.body <= MAX_GREETING);
    let header = header.ok_or_else(not_understood)?;
    message.resize(HEADER + header.body, 0);
    stream.read_exact(&mut message[HEADER..]).await.map_err(lost)?;
    Ok((header.kind, message))
}
