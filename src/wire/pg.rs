//! PostgreSQL's protocol 3 (PostgreSQL 15, chapters 55.2 and 55.7), as little of it as a gate needs: the opening
//! packets, message headers, where a session stands, and the few messages the gate says itself.
//!
//! What it is NOT: it never looks into rows, copy data or statements (but for a short query at rest, which may be one
//! of ours), and it keeps no message. Decoding is by hand, because this is a stranger's input and must not panic;
//! encoding is `pgwire`'s.
//!
//! **Invariants:** arbitrary bytes never panic; the state is a few words, however long the pipeline;
//! [`Exchange::at_rest`] is true only when nothing is in flight in either direction and no transaction is open.

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
#[derive(Debug, Clone, PartialEq, Eq)]
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
fn cstring<'a>(rest: &mut &'a [u8]) -> Option<&'a [u8]> {
    let end = rest.iter().position(|b| *b == 0)?;
    let (string, tail) = rest.split_at(end);
    *rest = &tail[1..];
    Some(string)
}

impl Startup {
    /// The packet for the backend: protocol 3.0, the same names and parameters, no protocol options.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = vec![0, 0, 0, 0, 0, 3, 0, 0];
        let own = [(&b"user"[..], self.user.as_bytes()), (b"database", self.database.as_bytes())];
        let others = self.parameters.iter().map(|(name, value)| (&name[..], &value[..]));
        for (name, value) in own.into_iter().chain(others) {
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

/// What stands at the front of the bytes not yet looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Look {
    /// Everything was looked at and may pass, or the rest is too short to tell.
    More,
    /// Client side, at rest: a message begins. The caller holds it, answers it, or lets it pass.
    Rest(Header),
    /// Backend side: a message that acknowledges (CommandComplete, ReadyForQuery), complete. The caller holds it or
    /// lets it pass.
    Success(Header),
    /// Backend side: a notice short enough to be read, complete. The caller lets it pass.
    Notice(Header),
}

/// Where a session stands, from the headers that passed in both directions.
#[derive(Debug, Clone)]
pub struct Exchange {
    /// Body bytes of the client's present message still to come.
    client_left: usize,
    /// Body bytes of the backend's present message still to come.
    backend_left: usize,
    /// Transaction status of the last ReadyForQuery: `I`, `T` or `E`.
    status: u8,
    /// Requests that will be answered by a ReadyForQuery and were not yet.
    outstanding: u64,
    /// Sync messages since the last message of another kind; COPY from the client swallows them.
    trailing_syncs: u64,
    /// Extended-protocol messages passed since the last Sync.
    unsynced: bool,
    /// The backend reads COPY data.
    copy_in: bool,
}

impl Exchange {
    /// After the login, whose last message was a ReadyForQuery with this status.
    pub fn new(status: u8) -> Exchange {
        Exchange {
            client_left: 0,
            backend_left: 0,
            status,
            outstanding: 0,
            trailing_syncs: 0,
            unsynced: false,
            copy_in: false,
        }
    }

    /// Nothing in flight in either direction, though perhaps in a transaction.
    pub fn is_quiet(&self) -> bool {
        self.is_all_answered() && self.client_left == 0 && self.backend_left == 0
    }

    /// At a transaction boundary.
    pub fn at_rest(&self) -> bool {
        self.status == b'I' && self.is_quiet()
    }

    /// The client has asked for nothing that was not answered to its end.
    pub fn is_all_answered(&self) -> bool {
        self.outstanding == 0 && !self.unsynced && !self.copy_in
    }

    /// Transaction status of the last ReadyForQuery.
    pub fn status(&self) -> u8 {
        self.status
    }

    /// Body bytes of the backend's present message still to come.
    pub fn backend_left(&self) -> usize {
        self.backend_left
    }

    /// Body bytes of the client's present message still to come.
    pub fn client_left(&self) -> usize {
        self.client_left
    }

    /// Looks at the client's bytes from `*at` on and moves `*at` over what may pass.
    pub fn look_client(&mut self, bytes: &[u8], at: &mut usize) -> Result<Look, Malformed> {
        loop {
            skip(&mut self.client_left, bytes, at);
            if self.client_left > 0 {
                return Ok(Look::More);
            }
            let Some(header) = header(&bytes[*at..])? else { return Ok(Look::More) };
            if self.is_quiet() {
                return Ok(Look::Rest(header));
            }
            self.pass_client(header, at);
        }
    }

    /// Lets the client's message at `*at` pass.
    pub fn pass_client(&mut self, header: Header, at: &mut usize) {
        *at += HEADER;
        self.client_left = header.body;
        let sync = header.kind == b'S';
        match header.kind {
            // Query, FunctionCall.
            b'Q' | b'F' => self.outstanding += 1,
            // Sync; one that comes while the backend reads COPY data is ignored by it (chapter 55.2.6).
            b'S' if !self.copy_in => {
                self.outstanding += 1;
                self.unsynced = false;
            }
            // Parse, Bind, Describe, Execute, Close, Flush.
            b'P' | b'B' | b'D' | b'E' | b'C' | b'H' => self.unsynced = true,
            // CopyDone, CopyFail.
            b'c' | b'f' => self.copy_in = false,
            _ => {}
        }
        self.trailing_syncs = if sync && !self.copy_in { self.trailing_syncs + 1 } else { 0 };
    }

    /// Looks at the backend's bytes from `*at` on and moves `*at` over what may pass.
    pub fn look_backend(&mut self, bytes: &[u8], at: &mut usize) -> Result<Look, Malformed> {
        loop {
            skip(&mut self.backend_left, bytes, at);
            if self.backend_left > 0 {
                return Ok(Look::More);
            }
            let Some(header) = header(&bytes[*at..])? else { return Ok(Look::More) };
            let complete = bytes.len() - *at >= HEADER + header.body;
            match header.kind {
                // Real ones are below a hundred bytes; a longer one cannot be waited for in a bounded buffer.
                b'C' | b'Z' if header.body <= MAX_NOTICE_READ => {
                    return Ok(if complete { Look::Success(header) } else { Look::More });
                }
                b'C' | b'Z' => return Err(Malformed("a command tag of the backend is too long")),
                b'N' if header.body <= MAX_NOTICE_READ => {
                    return Ok(if complete { Look::Notice(header) } else { Look::More });
                }
                _ => self.pass_backend(header, bytes, at),
            }
        }
    }

    /// Lets the backend's message at `*at` pass; `bytes` as in [`Exchange::look_backend`].
    pub fn pass_backend(&mut self, header: Header, bytes: &[u8], at: &mut usize) {
        *at += HEADER;
        self.backend_left = header.body;
        match header.kind {
            b'Z' => {
                self.status = bytes.get(*at).copied().unwrap_or(b'E');
                self.outstanding = self.outstanding.saturating_sub(1);
                self.copy_in = false;
            }
            // CommandComplete, ErrorResponse: COPY is over.
            b'C' | b'E' => self.copy_in = false,
            // CopyInResponse: what follows Execute in the client's stream is read as COPY data, Syncs are swallowed.
            b'G' => {
                self.copy_in = true;
                if self.trailing_syncs > 0 {
                    self.outstanding = self.outstanding.saturating_sub(self.trailing_syncs);
                    self.trailing_syncs = 0;
                    self.unsynced = true;
                }
            }
            _ => {}
        }
    }
}

fn skip(left: &mut usize, bytes: &[u8], at: &mut usize) {
    let step = (*left).min(bytes.len() - *at);
    *at += step;
    *left -= step;
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

/// A query that the gate answers itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OwnQuery {
    ShowPoolNodes,
}

/// Whether a Query with this header may be one of ours, so that its body is worth waiting for.
pub fn may_be_own(header: Header) -> bool {
    header.kind == b'Q' && header.body <= MAX_OWN_QUERY
}

/// Reads the body of a Query (with its terminator); `None`: not ours.
pub fn own_query(body: &[u8]) -> Option<OwnQuery> {
    let text = std::str::from_utf8(body.strip_suffix(&[0])?).ok()?.trim();
    let text = text.strip_suffix(';').unwrap_or(text);
    let mut words = text.split_ascii_whitespace();
    let is = |word: Option<&str>, keyword: &str| word.is_some_and(|word| word.eq_ignore_ascii_case(keyword));
    (is(words.next(), "show") && is(words.next(), "pool_nodes") && words.next().is_none())
        .then_some(OwnQuery::ShowPoolNodes)
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
        let mut fields: Vec<(u8, String)> = vec![
            (b'S', "FATAL".to_owned()),
            (b'V', "FATAL".to_owned()),
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
