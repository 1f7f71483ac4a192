//! The admin console: database `portcullis` at the gate of the active node. Who is let in is found out as for any
//! other database (`serve::login`: TLS, `hba_file`, SCRAM); then `[console]` says who may stay.
//!
//! What it is NOT: it runs no SQL and has no backend. It does nothing itself: what changes anything is a command like
//! those of the control socket, carried out, and noted with who gave it, where those are. A passive node has none: its
//! sockets are closed; where it forwards (`service.passive`), one speaks to the active node's.
//!
//! **Invariants:** nothing passes a gate that is shut, in either direction; a console ends with the gate's generation.
//! A pause holds no console.

mod act;
mod answer;

use super::command::Commands;
use super::gate::{Pass, Passage};
use super::http;
use super::listener::{Proxy, Seat};
use super::login::{self, Stop};
use super::session::{dismiss, stopping};
use super::tls::ClientStream;
use crate::base::config::Config;
use crate::wire::pg::console::{Statement, parse};
use crate::wire::pg::table::Row;
use crate::wire::pg::{self, HEADER, Header, Refusal, Startup, cstring};
use bytes::{Buf, BufMut, BytesMut};
use pgwire::messages::startup::Authentication;
use std::collections::HashMap;
use std::future::poll_fn;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::task::Poll;
use tokio::io::{AsyncReadExt, AsyncWrite};
use tokio::sync::mpsc;

/// The database that is none.
pub const DATABASE: &str = "portcullis";
/// Consoles at a time; one more is refused. They have room even where `pool.max_clients` is reached.
const MAX_CONSOLES: u32 = 64;
/// Longest message, in bytes of its body; a longer one ends the session.
const MAX_BODY: usize = 64 * 1024;
/// Prepared statements, and portals, of one console.
const MAX_STATEMENTS: usize = 256;
/// Bytes of answers kept before they are sent.
const MAX_OUT: usize = 64 * 1024;

/// What the console knows of the daemon around the gate; absent in a proxy without one.
#[derive(Default)]
pub(crate) struct Console {
    daemon: RwLock<Option<Daemon>>,
    open: AtomicU32,
}

#[derive(Clone)]
struct Daemon {
    config: Arc<Config>,
    control: mpsc::Sender<http::Command>,
}

impl Commands {
    /// The console's configuration, and where its commands go: with those of the control socket.
    pub fn open_console(&self, config: Config, control: mpsc::Sender<http::Command>) {
        let daemon = Daemon { config: Arc::new(config), control };
        *self.proxy.console.daemon.write().unwrap_or_else(PoisonError::into_inner) = Some(daemon);
    }

    /// Another configuration is in force.
    pub fn set_config(&self, config: Config) {
        let mut daemon = self.proxy.console.daemon.write().unwrap_or_else(PoisonError::into_inner);
        if let Some(daemon) = daemon.as_mut() {
            daemon.config = Arc::new(config);
        }
    }
}

impl Proxy {
    fn daemon(&self) -> Option<Daemon> {
        self.console.daemon.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The configuration in force, where it is known.
    pub(crate) fn config(&self) -> Option<Arc<Config>> {
        self.daemon().map(|daemon| daemon.config)
    }

    /// Consoles that are open.
    pub(crate) fn consoles(&self) -> u32 {
        self.console.open.load(Ordering::Relaxed)
    }
}

/// Whether a client asks for the console.
pub(crate) fn is_wanted(startup: &Startup) -> bool {
    startup.database == DATABASE && !startup.wants_replication()
}

/// What a role may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Rights {
    All,
    Look,
}

fn rights(proxy: &Proxy, user: &str) -> Option<Rights> {
    let config = proxy.config();
    let is_in = |roles: &[String]| roles.iter().any(|role| role == user);
    let console = config.as_ref().map(|config| &config.console);
    if user == proxy.options.admin_user || console.is_some_and(|console| is_in(&console.admins)) {
        return Some(Rights::All);
    }
    console.is_some_and(|console| is_in(&console.stats)).then_some(Rights::Look)
}

/// One of [`MAX_CONSOLES`]; given back when dropped.
struct Place<'a>(&'a AtomicU32);

impl Place<'_> {
    fn take(open: &AtomicU32) -> Option<Place<'_>> {
        let place = Place(open);
        (open.fetch_add(1, Ordering::SeqCst) < MAX_CONSOLES).then_some(place)
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Serves a client whose login is done, to its end.
pub(crate) async fn serve(
    mut client: ClientStream,
    peer: SocketAddr,
    startup: Startup,
    proxy: Arc<Proxy>,
    pass: Pass,
    // Kept to the end: the daemon that is ending waits for the last word.
    _kept: (Seat, Passage),
) {
    let Some(rights) = rights(&proxy, &startup.user) else {
        proxy.gate.count_auth_failure();
        tracing::info!(user = startup.user, %peer, "not allowed on the console");
        let text = format!("portcullis: role \"{}\" is not allowed on the console", startup.user);
        let hint = "[console] of portcullis.toml names who is, in admins or stats; postgres.admin_user always is.";
        return dismiss(client, Refusal::new("42501", text).hint(hint).into()).await;
    };
    let Some(_place) = Place::take(&proxy.console.open) else {
        let refusal = Refusal::new("53300", format!("portcullis: there are {MAX_CONSOLES} consoles already"));
        return dismiss(client, refusal.hint("End one of them.").into()).await;
    };
    tracing::info!(user = startup.user, %peer, "console opened");
    let mut session = Session {
        proxy: &proxy,
        pass: &pass,
        user: &startup.user,
        peer,
        rights,
        application: application(&startup),
        status: b'I',
        out: BytesMut::new(),
        is_whole: true,
        statements: HashMap::new(),
        portals: HashMap::new(),
        has_failed: false,
    };
    session.greet();
    let stop = tokio::select! {
        biased;
        () = pass.ended() => Refusal::new("57P01", &*pass.reason()).into(),
        () = proxy.gate.stopped() => stopping().into(),
        stop = session.converse(&mut client) => stop,
    };
    match stop {
        _ if pass.is_walled_off() => client.reset(),
        stop if session.is_whole => dismiss(client, stop).await,
        _ => {}
    }
}

/// What the client calls itself, as far as it is plain text.
fn application(startup: &Startup) -> String {
    let named = startup.parameters.iter().rfind(|(name, _)| name.eq_ignore_ascii_case(b"application_name"));
    let plain = named.map(|(_, value)| value.iter().filter(|b| (32..127).contains(*b)).map(|b| char::from(*b)));
    plain.map(|name| name.take(63).collect()).unwrap_or_default()
}

/// A statement that was bound.
struct Portal {
    statement: Option<Statement>,
    formats: Vec<i16>,
    /// After the first Execute: the rows still to be sent, and the command tag.
    rest: Option<(std::vec::IntoIter<Row>, String)>,
}

/// One console.
struct Session<'a> {
    proxy: &'a Proxy,
    pass: &'a Pass,
    user: &'a str,
    peer: SocketAddr,
    rights: Rights,
    application: String,
    /// As ReadyForQuery says it: a transaction block is kept for drivers, and undoes nothing.
    status: u8,
    /// Answers that were not sent yet.
    out: BytesMut,
    /// No message is half sent.
    is_whole: bool,
    /// `None`: an empty one.
    statements: HashMap<Box<[u8]>, Option<Statement>>,
    portals: HashMap<Box<[u8]>, Portal>,
    /// An error came in the extended protocol: all is skipped up to the Sync.
    has_failed: bool,
}

fn malformed() -> Refusal {
    Refusal::new("08P01", "invalid message format")
}

impl Session<'_> {
    fn greet(&mut self) {
        pg::put(&Authentication::Ok, &mut self.out);
        for (name, value) in self.settings().into_iter().filter(|(name, _)| answer::is_reported(name)) {
            let body = [name.as_bytes(), b"\0", value.as_bytes(), b"\0"].concat();
            self.message(b'S', &body);
        }
        // Of nobody: there is nothing to cancel.
        let number = i32::from_be_bytes(login::random()) & i32::MAX;
        let key = u32::from_be_bytes(login::random());
        self.message(b'K', &[number.to_be_bytes(), key.to_be_bytes()].concat());
        self.ready();
    }

    fn message(&mut self, kind: u8, body: &[u8]) {
        self.out.put_u8(kind);
        self.out.put_u32(u32::try_from(body.len() + 4).unwrap_or(u32::MAX));
        self.out.put_slice(body);
    }

    fn ready(&mut self) {
        self.message(b'Z', &[self.status]);
    }

    /// Answers until the end; why it ends.
    async fn converse(&mut self, client: &mut ClientStream) -> Stop {
        let mut input = BytesMut::new();
        loop {
            match pg::header(&input) {
                Err(bad) => return bad.into(),
                Ok(Some(header)) if header.body > MAX_BODY => {
                    return Refusal::new("54000", "portcullis: this message is too long for the console").into();
                }
                Ok(Some(header)) if input.len() >= HEADER + header.body => {
                    if header.kind == b'X' {
                        return Stop::Silent;
                    }
                    let mut message = input.split_to(HEADER + header.body);
                    message.advance(HEADER);
                    self.hear(header, &message).await;
                    if self.out.len() >= MAX_OUT
                        && let Err(stop) = self.send(client).await
                    {
                        return stop;
                    }
                    continue;
                }
                Ok(_) => {}
            }
            if let Err(stop) = self.send(client).await {
                return stop;
            }
            match client.read_buf(&mut input).await {
                Ok(n) if n > 0 => {}
                _ => return Stop::Silent,
            }
            // What was asked through a gate that is shut is not done; while PostgreSQL is away it waits.
            if let Err(stop) = self.wait_for_gate().await {
                return stop;
            }
        }
    }

    async fn wait_for_gate(&self) -> Result<(), Stop> {
        if self.pass.passes() {
            return Ok(());
        }
        let mut view = self.proxy.gate.watch();
        let waiting = view.wait_for(|_| self.pass.passes() || !self.pass.stands());
        // Too long comes to the same as never.
        let _ = tokio::time::timeout(self.proxy.limits().query_wait, waiting).await;
        match self.pass.passes() {
            true => Ok(()),
            false => Err(Refusal::new("57P01", &*self.pass.reason()).into()),
        }
    }

    /// Sends what there is. The gate is asked before every write.
    async fn send(&mut self, client: &mut ClientStream) -> Result<(), Stop> {
        if self.out.is_empty() {
            return Ok(());
        }
        self.wait_for_gate().await?;
        self.is_whole = false;
        while !self.out.is_empty() {
            let written = poll_fn(|cx| {
                if !self.pass.passes() {
                    return Poll::Ready(Err(std::io::ErrorKind::BrokenPipe.into()));
                }
                Pin::new(&mut *client).poll_write(cx, &self.out)
            });
            match written.await? {
                0 => return Err(Stop::Silent),
                n => self.out.advance(n),
            }
        }
        poll_fn(|cx| match self.pass.passes() {
            true => Pin::new(&mut *client).poll_flush(cx),
            false => Poll::Ready(Err(std::io::ErrorKind::BrokenPipe.into())),
        })
        .await?;
        self.is_whole = true;
        Ok(())
    }

    /// Answers one message.
    async fn hear(&mut self, header: Header, body: &[u8]) {
        match header.kind {
            b'Q' => {
                self.portals.remove(&b""[..]);
                if let Err(refusal) = self.simple(body).await {
                    self.refuse(&refusal);
                }
                self.ready();
            }
            b'S' => {
                self.has_failed = false;
                if self.status == b'I' {
                    self.portals.clear();
                }
                self.ready();
            }
            b'P' | b'B' | b'D' | b'E' | b'C' if !self.has_failed => {
                if let Err(refusal) = self.extended(header.kind, body).await {
                    self.refuse(&refusal);
                    self.has_failed = true;
                }
            }
            // Skipped; Flush: all is sent as soon as nothing more is there to be read; of a COPY there is none.
            b'P' | b'B' | b'D' | b'E' | b'C' | b'H' | b'd' | b'c' | b'f' => {}
            _ => {
                let text = format!("portcullis: the console knows no message of type 0x{:02x}", header.kind);
                self.refuse(&Refusal::new("0A000", text));
                self.ready();
            }
        }
    }

    fn refuse(&mut self, refusal: &Refusal) {
        self.out.extend_from_slice(&refusal.encode_error());
        if self.status == b'T' {
            self.status = b'E';
        }
    }

    async fn simple(&mut self, body: &[u8]) -> Result<(), Refusal> {
        let statements = parse(text(body)?)?;
        if statements.is_empty() {
            self.message(b'I', b"");
        }
        for statement in statements {
            let (rows, tag) = self.run(&statement).await?;
            self.describe(&statement, &[]);
            rows.iter().for_each(|row| pg::table::row(row, &[], &mut self.out));
            self.complete(&tag);
        }
        Ok(())
    }

    fn complete(&mut self, tag: &str) {
        self.message(b'C', &[tag.as_bytes(), b"\0"].concat());
    }

    async fn extended(&mut self, kind: u8, mut body: &[u8]) -> Result<(), Refusal> {
        match kind {
            b'P' => self.parse(body),
            b'B' => self.bind(body),
            b'E' => {
                let portal = cstring(&mut body).ok_or_else(malformed)?;
                let most = body.first_chunk::<4>().map(|most| i32::from_be_bytes(*most)).ok_or_else(malformed)?;
                self.execute(portal, most).await
            }
            _ => {
                let (what, mut rest) = body.split_first().ok_or_else(malformed)?;
                let name = cstring(&mut rest).ok_or_else(malformed)?;
                match (kind, what) {
                    (b'C', b'S') => drop(self.statements.remove(name)),
                    (b'C', b'P') => drop(self.portals.remove(name)),
                    (_, b'S') => {
                        let statement = self.statements.get(name).ok_or_else(|| no_statement(name))?.clone();
                        // No parameters.
                        self.message(b't', &[0, 0]);
                        self.describe_or_no_data(statement.as_ref(), &[]);
                    }
                    (_, b'P') => {
                        let portal = self.portals.get(name).ok_or_else(|| no_portal(name))?;
                        let (statement, formats) = (portal.statement.clone(), portal.formats.clone());
                        self.describe_or_no_data(statement.as_ref(), &formats);
                    }
                    _ => return Err(malformed()),
                }
                if kind == b'C' {
                    self.message(b'3', b"");
                }
                Ok(())
            }
        }
    }

    fn parse(&mut self, mut body: &[u8]) -> Result<(), Refusal> {
        let name = cstring(&mut body).ok_or_else(malformed)?;
        let query = cstring(&mut body).ok_or_else(malformed)?;
        if !body.starts_with(&[0, 0]) {
            return Err(Refusal::new("0A000", "portcullis: statements of the console have no parameters"));
        }
        let mut statements = parse(std::str::from_utf8(query).map_err(|_| no_text())?)?;
        if statements.len() > 1 {
            return Err(Refusal::new("42601", "cannot insert multiple commands into a prepared statement"));
        }
        if !name.is_empty() && self.statements.contains_key(name) {
            let text = format!("prepared statement \"{}\" already exists", String::from_utf8_lossy(name));
            return Err(Refusal::new("42P05", text));
        }
        if self.statements.len() >= MAX_STATEMENTS {
            return Err(Refusal::new("54000", "portcullis: too many prepared statements"));
        }
        self.statements.insert(name.into(), statements.pop());
        self.message(b'1', b"");
        Ok(())
    }

    fn bind(&mut self, mut body: &[u8]) -> Result<(), Refusal> {
        let portal = cstring(&mut body).ok_or_else(malformed)?;
        let name = cstring(&mut body).ok_or_else(malformed)?;
        let statement = self.statements.get(name).ok_or_else(|| no_statement(name))?.clone();
        let _parameter_formats = numbers(&mut body).ok_or_else(malformed)?;
        let mut body = body
            .strip_prefix(&[0, 0])
            .ok_or_else(|| Refusal::new("08P01", "bind message supplies parameters, but the statement requires 0"))?;
        let formats = numbers(&mut body).ok_or_else(malformed)?;
        if formats.iter().any(|format| !matches!(format, 0 | 1)) {
            return Err(Refusal::new("22023", "unsupported format code"));
        }
        if self.portals.len() >= MAX_STATEMENTS {
            return Err(Refusal::new("54000", "portcullis: too many portals"));
        }
        self.portals.insert(portal.into(), Portal { statement, formats, rest: None });
        self.message(b'2', b"");
        Ok(())
    }

    async fn execute(&mut self, name: &[u8], most: i32) -> Result<(), Refusal> {
        let Some(mut portal) = self.portals.remove(name) else { return Err(no_portal(name)) };
        let Some(statement) = &portal.statement else {
            self.message(b'I', b"");
            return Ok(());
        };
        let (mut rows, tag) = match portal.rest.take() {
            Some(rest) => rest,
            None => {
                let (rows, tag) = self.run(statement).await?;
                (rows.into_iter(), tag)
            }
        };
        let most = usize::try_from(most).ok().filter(|most| *most > 0).unwrap_or(usize::MAX);
        for row in rows.by_ref().take(most) {
            pg::table::row(&row, &portal.formats, &mut self.out);
        }
        if rows.len() > 0 {
            // PortalSuspended.
            self.message(b's', b"");
            portal.rest = Some((rows, tag));
            self.portals.insert(name.into(), portal);
        } else {
            self.complete(&tag);
            portal.rest = Some((rows, tag));
            self.portals.insert(name.into(), portal);
        }
        Ok(())
    }

    /// Does what a statement asks for: its rows and its command tag.
    async fn run(&mut self, statement: &Statement) -> Result<(Vec<Row>, String), Refusal> {
        let ends = matches!(statement, Statement::Commit | Statement::Rollback);
        if self.status == b'E' && !ends {
            let text = "current transaction is aborted, commands ignored until end of transaction block";
            return Err(Refusal::new("25P02", text));
        }
        let tag = match statement {
            Statement::Act(action) => {
                let (tag, said) = self.act(action).await?;
                pg::put_notice(&said, &mut self.out);
                tag
            }
            Statement::Begin => {
                self.status = b'T';
                "BEGIN"
            }
            Statement::Commit | Statement::Rollback => {
                let was = std::mem::replace(&mut self.status, b'I');
                if was == b'E' || *statement == Statement::Rollback { "ROLLBACK" } else { "COMMIT" }
            }
            Statement::Nothing(tag) => tag,
            _ => return self.rows(statement),
        };
        Ok((Vec::new(), tag.to_owned()))
    }
}

fn text(body: &[u8]) -> Result<&str, Refusal> {
    let body = body.strip_suffix(&[0]).filter(|body| !body.contains(&0)).ok_or_else(malformed)?;
    std::str::from_utf8(body).map_err(|_| no_text())
}

fn no_text() -> Refusal {
    Refusal::new("22021", "portcullis: the console speaks UTF-8 only")
}

fn no_statement(name: &[u8]) -> Refusal {
    Refusal::new("26000", format!("prepared statement \"{}\" does not exist", String::from_utf8_lossy(name)))
}

fn no_portal(name: &[u8]) -> Refusal {
    Refusal::new("34000", format!("portal \"{}\" does not exist", String::from_utf8_lossy(name)))
}

/// A counted list of numbers.
fn numbers(body: &mut &[u8]) -> Option<Vec<i16>> {
    let mut number = || {
        let (first, rest) = body.split_first_chunk::<2>()?;
        *body = rest;
        Some(i16::from_be_bytes(*first))
    };
    (0..number()?).map(|_| number()).collect()
}
