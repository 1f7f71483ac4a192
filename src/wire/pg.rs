//! PostgreSQL's protocol 3 (PostgreSQL 15, chapters 55.2 and 55.7), as little of it as a gate needs: the opening
//! packets, message headers, where a session stands, and the few messages the gate says itself.
//!
//! What it is NOT: it never looks into rows, copy data or statements (but for a short query at rest, which may be one
//! of ours), and it keeps no message. Decoding is by hand, because this is a stranger's input and must not panic;
//! encoding is `pgwire`'s.
//!
//! **Invariant:** arbitrary bytes never panic.

pub mod console;
pub mod exchange;
pub mod options;
pub mod statements;
pub mod table;

pub use exchange::{Exchange, Look, Settled};

use bytes::BytesMut;
use pgwire::messages::Message;
use pgwire::messages::response::ErrorResponse;

/// Longest opening packet, in bytes, its length word included (PostgreSQL's `MAX_STARTUP_PACKET_LENGTH`); a longer one
/// ends the connection.
pub const MAX_OPENING: usize = 10_000;
/// Bytes of a message header: its kind and its length.
pub const HEADER: usize = 5;
/// Longest message body announced that is believed (PostgreSQL's 1 GiB limit); a longer one ends the session.
const MAX_MESSAGE: u32 = 0x3fff_ffff;
/// Longest notice whose fields are read; a longer one is not PostgreSQL's about a cancelled wait and passes unread.
pub const MAX_NOTICE_READ: usize = 4096;
/// Longest query that can be one of ours; a longer one passes unread.
const MAX_OWN_QUERY: usize = 128;

const SSL_REQUEST: u32 = 80_877_103;
const GSSENC_REQUEST: u32 = 80_877_104;
const CANCEL_REQUEST: u32 = 80_877_102;

/// Bytes that do not follow the protocol; the text says which.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Malformed(pub &'static str);

/// The first packet of a connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Opening {
    Ssl,
    GssEnc,
    Cancel {
        pid: i32,
        key: Vec<u8>,
    },
    Startup(Startup),
    /// Another major version of the protocol.
    OldProtocol {
        major: u16,
        minor: u16,
    },
}

/// A startup message of protocol 3.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Startup {
    /// Minor version asked for; anything above 0 is negotiated down to 0.
    pub minor: u16,
    pub user: String,
    /// The user's name where the client named none.
    pub database: String,
    /// All other parameters, in order and as bytes: their encoding is the client's. No `_pq_.` options.
    pub parameters: Vec<(Vec<u8>, Vec<u8>)>,
    /// Names of protocol options (`_pq_.`) asked for; none is known.
    pub options: Vec<String>,
}

/// Bytes that follow the length word of an opening packet, or why it is refused.
pub fn opening_rest(length_word: [u8; 4]) -> Result<usize, Malformed> {
    let length = usize::try_from(u32::from_be_bytes(length_word)).unwrap_or(usize::MAX);
    if (8..=MAX_OPENING).contains(&length) {
        Ok(length - 4)
    } else {
        Err(Malformed("invalid length of startup packet"))
    }
}

/// Reads an opening packet without its length word.
pub fn opening(body: &[u8]) -> Result<Opening, Malformed> {
    let (code, rest) = body.split_first_chunk::<4>().ok_or(Malformed("invalid length of startup packet"))?;
    match u32::from_be_bytes(*code) {
        SSL_REQUEST if rest.is_empty() => Ok(Opening::Ssl),
        GSSENC_REQUEST if rest.is_empty() => Ok(Opening::GssEnc),
        CANCEL_REQUEST => {
            let (pid, key) = rest.split_first_chunk::<4>().ok_or(Malformed("invalid length of cancel request"))?;
            // 4 bytes in protocol 3.0, up to 256 from 3.2 on.
            if key.is_empty() || key.len() > 256 {
                return Err(Malformed("invalid length of cancel request"));
            }
            Ok(Opening::Cancel { pid: i32::from_be_bytes(*pid), key: key.to_vec() })
        }
        _ => {
            let [a, b, c, d] = *code;
            let (major, minor) = (u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d]));
            if major != 3 {
                return Ok(Opening::OldProtocol { major, minor });
            }
            startup(minor, rest).map(Opening::Startup)
        }
    }
}

fn startup(minor: u16, mut rest: &[u8]) -> Result<Startup, Malformed> {
    const LAYOUT: Malformed = Malformed("invalid startup packet layout: expected terminator as last byte");
    let mut found =
        Startup { minor, user: String::new(), database: String::new(), parameters: vec![], options: vec![] };
    let name_text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).map_err(|_| Malformed("names must be UTF-8"));
    loop {
        let name = cstring(&mut rest).ok_or(LAYOUT)?;
        if name.is_empty() {
            break;
        }
        let value = cstring(&mut rest).ok_or(LAYOUT)?;
        match name {
            b"user" => found.user = name_text(value)?,
            b"database" => found.database = name_text(value)?,
            name if name.starts_with(b"_pq_.") => found.options.push(String::from_utf8_lossy(name).into_owned()),
            name => found.parameters.push((name.to_vec(), value.to_vec())),
        }
    }
    if !rest.is_empty() {
        return Err(LAYOUT);
    }
    if found.user.is_empty() {
        return Err(Malformed("no PostgreSQL user name specified in startup packet"));
    }
    if found.database.is_empty() {
        found.database.clone_from(&found.user);
    }
    // Names are cut as PostgreSQL cuts them (NAMEDATALEN), so that our rules and its rules see the same ones.
    for name in [&mut found.user, &mut found.database] {
        let cut = (0..=name.len().min(63)).rev().find(|at| name.is_char_boundary(*at)).unwrap_or(0);
        name.truncate(cut);
    }
    Ok(found)
}

/// Takes a zero-terminated string off the front.
pub(crate) fn cstring<'a>(rest: &mut &'a [u8]) -> Option<&'a [u8]> {
    let end = rest.iter().position(|b| *b == 0)?;
    let (string, tail) = rest.split_at(end);
    *rest = &tail[1..];
    Some(string)
}

impl Startup {
    /// The packet for the backend: protocol 3.0, the same names and parameters, no protocol options.
    pub fn encode(&self) -> Vec<u8> {
        self.packet(0, &[])
    }

    /// The packet for another gate, which answers what this one would have answered: the values of protocol options
    /// aside, which no gate of ours looks at.
    pub fn encode_as_sent(&self) -> Vec<u8> {
        self.packet(self.minor, &self.options)
    }

    fn packet(&self, minor: u16, options: &[String]) -> Vec<u8> {
        let mut out = vec![0, 0, 0, 0, 0, 3];
        out.extend_from_slice(&minor.to_be_bytes());
        let own = [(&b"user"[..], self.user.as_bytes()), (b"database", self.database.as_bytes())];
        let others = self.parameters.iter().map(|(name, value)| (&name[..], &value[..]));
        let options = options.iter().map(|name| (name.as_bytes(), &b""[..]));
        for (name, value) in own.into_iter().chain(others).chain(options) {
            out.extend_from_slice(name);
            out.push(0);
            out.extend_from_slice(value);
            out.push(0);
        }
        out.push(0);
        let length = u32::try_from(out.len()).unwrap_or(u32::MAX);
        out[..4].copy_from_slice(&length.to_be_bytes());
        out
    }

    /// The client asks for a replication connection.
    pub fn wants_replication(&self) -> bool {
        self.parameters.iter().any(|(name, value)| {
            name == b"replication"
                && !matches!(&value.to_ascii_lowercase()[..], b"false" | b"off" | b"no" | b"0" | b"f" | b"n")
        })
    }
}

/// A message header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    pub kind: u8,
    /// Bytes of the body.
    pub body: usize,
}

/// Reads the header at the front; `None`: more bytes are needed.
pub fn header(bytes: &[u8]) -> Result<Option<Header>, Malformed> {
    let Some(&[kind, a, b, c, d]) = bytes.first_chunk::<HEADER>() else { return Ok(None) };
    let length = u32::from_be_bytes([a, b, c, d]);
    if !(4..=MAX_MESSAGE).contains(&length) {
        return Err(Malformed("invalid message length"));
    }
    Ok(Some(Header { kind, body: usize::try_from(length - 4).unwrap_or(usize::MAX) }))
}

/// Whether `end` stands between two messages, when at `from` there are still `left` bytes of a message to come.
pub fn is_between_messages(bytes: &[u8], from: usize, left: usize, end: usize) -> bool {
    let mut at = from.saturating_add(left);
    while at < end {
        match bytes.get(at..).map(header) {
            Some(Ok(Some(header))) => at = at.saturating_add(HEADER).saturating_add(header.body),
            _ => return false,
        }
    }
    at == end
}

/// Iterates over the fields of an ErrorResponse's or NoticeResponse's body; stops at the first that is malformed.
pub fn fields(body: &[u8]) -> impl Iterator<Item = (u8, &[u8])> {
    let mut rest = body;
    std::iter::from_fn(move || {
        let (&code, tail) = rest.split_first().filter(|(code, _)| **code != 0)?;
        rest = tail;
        Some((code, cstring(&mut rest)?))
    })
}

/// One field of an ErrorResponse's or NoticeResponse's body, as text.
pub fn field(body: &[u8], code: u8) -> Option<String> {
    fields(body).find(|(found, _)| *found == code).map(|(_, value)| String::from_utf8_lossy(value).into_owned())
}

/// PostgreSQL gave up waiting for the standby: the commit stands here, but perhaps nowhere else (R4).
pub fn is_sync_wait_given_up(notice_body: &[u8]) -> bool {
    fields(notice_body).any(|(code, value)| code == b'R' && value == b"SyncRepWaitForLSN")
}

/// A statement's plan is of before a DDL that changed its result ("cached plan must not change result type").
pub fn is_stale_plan(error_body: &[u8]) -> bool {
    let has = |code, text: &[u8]| fields(error_body).any(|(found, value)| found == code && value == text);
    has(b'C', b"0A000") && has(b'R', b"RevalidateCachedQuery")
}

/// What `SHOW pool_...` shows: pgpool-II's names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shown {
    Nodes,
    Pools,
    Processes,
    Status,
    Version,
    HealthCheckStats,
    BackendStats,
}

impl Shown {
    /// By their names.
    pub const ALL: [(&'static str, Shown); 7] = [
        ("pool_nodes", Shown::Nodes),
        ("pool_pools", Shown::Pools),
        ("pool_processes", Shown::Processes),
        ("pool_status", Shown::Status),
        ("pool_version", Shown::Version),
        ("pool_health_check_stats", Shown::HealthCheckStats),
        ("pool_backend_stats", Shown::BackendStats),
    ];

    fn of(name: &str) -> Option<Shown> {
        Shown::ALL.iter().find(|(known, _)| name.eq_ignore_ascii_case(known)).map(|(_, shown)| *shown)
    }
}

/// A query that the gate answers itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum OwnQuery {
    /// `SHOW pool_...`.
    Show(Shown),
    /// DEALLOCATE of a statement by its name, which the gate keeps in transaction mode.
    Deallocate(String),
}

/// Whether a Query with this header may be one of ours, so that its body is worth waiting for.
pub fn may_be_own(header: Header) -> bool {
    header.kind == b'Q' && header.body <= MAX_OWN_QUERY
}

/// Reads the body of a Query (with its terminator); `None`: not ours.
pub fn own_query(body: &[u8]) -> Option<OwnQuery> {
    let start = body.iter().position(|b| !b.is_ascii_whitespace())?;
    // Most queries end here: SHOW or DEALLOCATE.
    let begins = |word: &[u8]| body[start..].get(..2).is_some_and(|head| head.eq_ignore_ascii_case(word));
    if !begins(b"sh") && !begins(b"de") {
        return None;
    }
    let text = std::str::from_utf8(body.strip_suffix(&[0])?).ok()?.trim();
    let text = text.strip_suffix(';').unwrap_or(text);
    let mut words = text.split_ascii_whitespace();
    let is = |word: Option<&str>, keyword: &str| word.is_some_and(|word| word.eq_ignore_ascii_case(keyword));
    let first = words.next();
    if is(first, "show") {
        let shown = words.next().and_then(Shown::of)?;
        return words.next().is_none().then_some(OwnQuery::Show(shown));
    }
    if !is(first, "deallocate") {
        return None;
    }
    let mut name = words.next()?;
    if name.eq_ignore_ascii_case("prepare")
        && let Some(next) = words.next()
    {
        name = next;
    }
    if words.next().is_some() || name.eq_ignore_ascii_case("all") {
        return None;
    }
    let quoted = name.strip_prefix('"').and_then(|rest| rest.strip_suffix('"'));
    let name = quoted.map_or_else(|| name.to_ascii_lowercase(), |inner| inner.replace("\"\"", "\""));
    Some(OwnQuery::Deallocate(name))
}

/// The name of the customized option (`my.tenant`) that a statement beginning like this sets for its session:
/// PostgreSQL shows those in no list (GUC_CUSTOM_PLACEHOLDER).
pub fn customized_option(statement: &[u8]) -> Option<String> {
    let head = &statement[..statement.len().min(MAX_OWN_QUERY)];
    let start = head.iter().position(|b| !b.is_ascii_whitespace())?;
    if !head[start..].get(..4)?.eq_ignore_ascii_case(b"set ") {
        return None;
    }
    let text = String::from_utf8_lossy(&head[start + 4..]);
    let mut words = text.split(|c: char| c.is_ascii_whitespace() || c == '=').filter(|word| !word.is_empty());
    let mut name = words.next()?;
    if name.eq_ignore_ascii_case("session") {
        name = words.next()?;
    }
    let plain = name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b'$'));
    (plain && name.contains('.')).then(|| name.to_ascii_lowercase())
}

/// The database that a statement beginning like this wants for itself, by DROP, ALTER, or as a template: PostgreSQL
/// refuses while anybody is connected to it, an idle backend of ours too. A name in quotes with a space in it is not
/// known.
pub fn wanted_alone(statement: &[u8]) -> Option<String> {
    let first = statement.iter().position(|b| !b.is_ascii_whitespace())?;
    // Most statements end here.
    if !matches!(statement[first], b'd' | b'D' | b'a' | b'A' | b'c' | b'C') {
        return None;
    }
    let head = String::from_utf8_lossy(&statement[first..statement.len().min(first + 512)]).into_owned();
    let mut words = head.split(|c: char| c.is_ascii_whitespace() || matches!(c, ';' | '=' | '\0'));
    let mut words = words.by_ref().filter(|word| !word.is_empty());
    let verb = words.next()?.to_ascii_lowercase();
    if !words.next()?.eq_ignore_ascii_case("database") {
        return None;
    }
    let name = match verb.as_str() {
        "create" => words.skip_while(|word| !word.eq_ignore_ascii_case("template")).nth(1)?,
        "drop" => match words.next()? {
            word if word.eq_ignore_ascii_case("if") => words.nth(1)?,
            word => word,
        },
        "alter" => {
            let name = words.next()?;
            let what = (words.next()?.to_ascii_lowercase(), words.next()?.to_ascii_lowercase());
            match (&*what.0, &*what.1) {
                ("rename", "to") | ("set", "tablespace") => name,
                _ => return None,
            }
        }
        _ => return None,
    };
    let quoted = name.strip_prefix('"').and_then(|rest| rest.strip_suffix('"'));
    Some(quoted.map_or_else(|| name.to_ascii_lowercase(), |inner| inner.replace("\"\"", "\"")))
}

/// An error the gate tells a client.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// SQLSTATE (PostgreSQL 15, appendix A).
    pub code: &'static str,
    pub message: String,
    pub hint: Option<String>,
}

impl Refusal {
    pub fn new(code: &'static str, message: impl Into<String>) -> Refusal {
        Refusal { code, message: message.into(), hint: None }
    }
    pub fn hint(mut self, hint: impl Into<String>) -> Refusal {
        self.hint = Some(hint.into());
        self
    }
    /// As an ErrorResponse of severity FATAL.
    pub fn encode(&self) -> BytesMut {
        self.encode_as("FATAL")
    }
    /// As an ErrorResponse after which the session goes on.
    pub fn encode_error(&self) -> BytesMut {
        self.encode_as("ERROR")
    }
    fn encode_as(&self, severity: &str) -> BytesMut {
        let mut fields: Vec<(u8, String)> = vec![
            (b'S', severity.to_owned()),
            (b'V', severity.to_owned()),
            (b'C', self.code.to_owned()),
            (b'M', self.message.clone()),
        ];
        fields.extend(self.hint.iter().map(|hint| (b'H', hint.clone())));
        let mut out = BytesMut::new();
        put(&ErrorResponse::new(fields), &mut out);
        out
    }
}

/// Appends a message; one that is longer than its kind may be is left out.
pub fn put(message: &impl Message, out: &mut BytesMut) {
    let before = out.len();
    if message.encode(out).is_err() {
        out.truncate(before);
    }
}

/// Appends a NoticeResponse.
pub fn put_notice(text: &str, out: &mut BytesMut) {
    let body = format!("SNOTICE\0VNOTICE\0C01000\0M{text}\0\0");
    out.extend_from_slice(b"N");
    out.extend_from_slice(&u32::try_from(body.len() + 4).unwrap_or(u32::MAX).to_be_bytes());
    out.extend_from_slice(body.as_bytes());
}

/// Terminate.
pub const TERMINATE: [u8; 5] = [b'X', 0, 0, 0, 4];

/// A CancelRequest.
pub fn cancel_request(pid: i32, key: &[u8]) -> Vec<u8> {
    let length = u32::try_from(12 + key.len()).unwrap_or(u32::MAX);
    let mut out = length.to_be_bytes().to_vec();
    out.extend_from_slice(&CANCEL_REQUEST.to_be_bytes());
    out.extend_from_slice(&pid.to_be_bytes());
    out.extend_from_slice(key);
    out
}

#[cfg(test)]
#[path = "pg/tests.rs"]
mod tests;
