//! A tunnel: a connection of the peer channel that carries one client to the active node's gate.
//!
//! ```text
//! TLS and both greetings as on any connection of the channel (wire::peer), then
//!   forwarding node   Call::Tunnel { octets, returns }, then so many octets of JSON: an Opening
//!   active node       Reply::Framed, or Reply::Tunnelled where it knows no returns, or Reply::Refused
//! then the client's octets, in both directions, until either side closes; the active node's in frames if it said so
//! ```
//!
//! The way back, where the forwarding node becomes the active one: the client goes on there, where its socket is.
//! ```text
//!   the node that was active   Frame::Stop                          it passes nothing more
//!   the node of the socket     closes its direction                 what it has not sent yet stays with it
//!   the node that was active   Frame::Opening, Frame::Ahead..., Frame::End   what it had read of the client, untouched
//! ```
//!
//! An opening is no frame: a session brings its prepared statements along, and frames are short. A daemon that knows no
//! tunnels closes at such a call.
//!
//! What this is NOT: the active node's gate is not asked here. It alone asks its lease; one hop, never forwarded on:
//! a client that is given back has none.
//!
//! **Invariant:** what proves a client ([`Proven`]) is never shown by `Debug`, and wiped when dropped.

use super::peer::WireError;
use crate::base::ids::Epoch;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::net::SocketAddr;
use zeroize::{Zeroize, ZeroizeOnDrop, Zeroizing};

/// Longest opening; a session with more prepared statements than fit is not carried over.
pub const OPENING_LIMIT: usize = 1024 * 1024;

/// What a tunnel is for.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Opening {
    /// A connection that was just accepted (`service.passive = "forward"`): its octets from the first one on, TLS and
    /// login included. The rules of pg_hba see this address. Or one that came while clients were held for a
    /// switchover: from its start-up packet on, with the TLS that it has with the other node, if any.
    Connection {
        client: SocketAddr,
        epoch: Epoch,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        tls: Option<Secured>,
    },
    /// A session that was held through a switchover: it goes on where it was.
    Session(Box<Carried>),
    /// A client that proved itself while others were held, and has heard nothing since: it is to be greeted.
    Proven(Box<Carried>),
}

impl Opening {
    /// A gate at another one refuses.
    pub fn epoch(&self) -> Epoch {
        match self {
            Opening::Connection { epoch, .. } => *epoch,
            Opening::Session(carried) | Opening::Proven(carried) => carried.epoch,
        }
    }

    /// Whom it serves, where that is known.
    pub fn user(&self) -> &str {
        match self {
            Opening::Connection { .. } => "",
            Opening::Session(carried) | Opening::Proven(carried) => &carried.user,
        }
    }

    /// The client's own address.
    pub fn client(&self) -> SocketAddr {
        match self {
            Opening::Connection { client, .. } => *client,
            Opening::Session(carried) | Opening::Proven(carried) => carried.client,
        }
    }
}

/// A client's TLS that ends at the other node, as far as a login is judged by it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Secured {
    /// What SCRAM binds to: the hash of that node's certificate; empty: none.
    #[serde(with = "base64")]
    pub end_point: Vec<u8>,
    /// The client's certificate, which that node's CA vouched for; empty: it showed none.
    #[serde(with = "base64")]
    pub certificate: Vec<u8>,
    /// Certificates were asked for.
    pub has_ca: bool,
}

/// A session that is carried over, at a transaction boundary, with nothing in flight.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Carried {
    pub client: SocketAddr,
    pub tls: bool,
    /// Of the active node as the old one heard it: a gate at another epoch refuses.
    pub epoch: Epoch,
    pub user: String,
    pub database: String,
    /// The rest of the start-up packet, in order and as bytes; `application_name` here or among the settings.
    #[serde(with = "base64::pairs")]
    pub parameters: Vec<(Vec<u8>, Vec<u8>)>,
    pub proven: Proven,
    /// What the client was given for cancel requests.
    pub pid: i32,
    pub key: u32,
    /// Settings that differ from what the start-up packet made them.
    pub settings: Vec<(String, String)>,
    /// Prepared statements under the client's own names.
    pub statements: Vec<Prepared>,
}

/// A prepared statement, as its Parse message said it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Prepared {
    /// Without its terminator; empty: the unnamed one.
    #[serde(with = "base64")]
    pub name: Vec<u8>,
    /// The Parse message's body behind the name: query, terminator, number and OIDs of the parameter types.
    #[serde(with = "base64")]
    pub text: Vec<u8>,
}

impl Prepared {
    /// It may be a DEALLOCATE.
    pub fn is_deallocate(&self) -> bool {
        let text = self.text.trim_ascii_start();
        text.get(..10).is_some_and(|word| word.eq_ignore_ascii_case(b"deallocate"))
    }
}

/// How the client proved itself to the old node. Physical replication makes the stored secrets the same on both.
#[derive(Clone, PartialEq, Zeroize, ZeroizeOnDrop, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Proven {
    /// `wire::scram::Keys` as octets.
    Scram(#[serde(with = "base64")] Vec<u8>),
    /// `wire::md5::Hash` as octets.
    Md5(#[serde(with = "base64")] Vec<u8>),
    Certificate,
    Trust,
}

impl fmt::Debug for Proven {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Proven(...)")
    }
}

/// What comes from the active node's end of a tunnel, where both ends know returns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Frame {
    /// The client's.
    Octets,
    /// The client is given back: nothing of it is passed any more, and what is under way is waited for.
    Stop,
    /// An [`Opening`] as JSON: what the client is.
    Opening,
    /// What of the client was read and passed to nobody.
    Ahead,
    /// All is said.
    End,
}

/// Octets of the head of a frame: its kind, and the length of what follows, big-endian.
pub const FRAME_HEAD: usize = 4;
/// Longest frame.
pub const FRAME_MOST: usize = 0xff_ffff;

impl Frame {
    /// The head of a frame of so many octets, [`FRAME_MOST`] at most.
    pub fn head(self, octets: usize) -> [u8; FRAME_HEAD] {
        let kind: u32 = match self {
            Frame::Octets => 0,
            Frame::Stop => 1,
            Frame::Opening => 2,
            Frame::Ahead => 3,
            Frame::End => 4,
        };
        let length = u32::try_from(octets.min(FRAME_MOST)).unwrap_or(0);
        (kind << 24 | length).to_be_bytes()
    }

    /// Kind and length.
    ///
    /// # Errors
    /// No such kind, or longer than that kind may be.
    pub fn parse(head: [u8; FRAME_HEAD]) -> Result<(Frame, usize), WireError> {
        let [kind, length @ ..] = head;
        let length = length.iter().fold(0, |sum, octet| sum << 8 | usize::from(*octet));
        let (frame, most) = match kind {
            0 => (Frame::Octets, FRAME_MOST),
            1 => (Frame::Stop, 0),
            2 => (Frame::Opening, OPENING_LIMIT),
            3 => (Frame::Ahead, FRAME_MOST),
            4 => (Frame::End, 0),
            _ => return Err(WireError::Malformed(format!("no frame of a tunnel begins with {kind}"))),
        };
        if length > most { Err(WireError::Oversize(length, most)) } else { Ok((frame, length)) }
    }
}

/// An opening as JSON, wiped when dropped.
///
/// # Errors
/// It is longer than [`OPENING_LIMIT`].
pub fn encode(opening: &Opening) -> Result<Zeroizing<Vec<u8>>, WireError> {
    // At its full size from the beginning: what a growing buffer leaves behind is not wiped.
    let mut json = Zeroizing::new(Vec::with_capacity(size_hint(opening)));
    serde_json::to_writer(&mut *json, opening).map_err(|error| WireError::Malformed(error.to_string()))?;
    if json.len() > OPENING_LIMIT { Err(WireError::Oversize(json.len(), OPENING_LIMIT)) } else { Ok(json) }
}

/// At least as long as its JSON, unless there is much to be escaped in it.
fn size_hint(opening: &Opening) -> usize {
    const MORE: usize = 1024;
    let carried = match opening {
        Opening::Session(carried) | Opening::Proven(carried) => carried,
        Opening::Connection { tls, .. } => {
            let tls = tls.as_ref().map_or(0, |tls| tls.certificate.len() + tls.end_point.len());
            return MORE + 2 * tls;
        }
    };
    let pair = |a: usize, b: usize| 2 * (a + b) + 32;
    let parameters: usize = carried.parameters.iter().map(|(name, value)| pair(name.len(), value.len())).sum();
    let settings: usize = carried.settings.iter().map(|(name, value)| pair(name.len(), value.len())).sum();
    let statements: usize = carried.statements.iter().map(|one| pair(one.name.len(), one.text.len())).sum();
    MORE + carried.user.len() + carried.database.len() + parameters + settings + statements
}

/// Octets in JSON: an array of numbers would be three times as long.
mod base64 {
    use data_encoding::BASE64;
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub fn serialize<S: Serializer>(octets: &[u8], to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(&BASE64.encode_display(octets))
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<u8>, D::Error> {
        let text = zeroize::Zeroizing::new(String::deserialize(from)?);
        BASE64.decode(text.as_bytes()).map_err(D::Error::custom)
    }

    pub mod pairs {
        use super::BASE64;
        use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error};

        type Pairs = Vec<(Vec<u8>, Vec<u8>)>;

        pub fn serialize<S: Serializer>(pairs: &Pairs, to: S) -> Result<S::Ok, S::Error> {
            let encode = |(name, value): &(Vec<u8>, Vec<u8>)| (BASE64.encode(name), BASE64.encode(value));
            pairs.iter().map(encode).collect::<Vec<_>>().serialize(to)
        }

        pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Pairs, D::Error> {
            let decode = |text: String| BASE64.decode(text.as_bytes()).map_err(D::Error::custom);
            let pairs = Vec::<(String, String)>::deserialize(from)?;
            pairs.into_iter().map(|(name, value)| Ok((decode(name)?, decode(value)?))).collect()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn carried() -> Carried {
        Carried {
            client: ([192, 0, 2, 7], 4711).into(),
            tls: true,
            epoch: Epoch(8),
            user: "app".to_owned(),
            database: "shop".to_owned(),
            parameters: vec![(b"client_encoding".to_vec(), b"\xff\x00".to_vec())],
            proven: Proven::Scram(b"secret".to_vec()),
            pid: -3,
            key: u32::MAX,
            settings: vec![("search_path".to_owned(), "\"$user\", public".to_owned())],
            statements: vec![Prepared { name: b"s1".to_vec(), text: b"select 1\0\0\0".to_vec() }],
        }
    }

    #[test]
    fn an_opening_reads_back_and_shows_no_secret() {
        for opening in [
            Opening::Session(Box::new(carried())),
            Opening::Proven(Box::new(carried())),
            Opening::Connection { client: "[2001:db8::1]:5".parse().expect("address"), epoch: Epoch(7), tls: None },
            Opening::Connection {
                client: ([192, 0, 2, 7], 5).into(),
                epoch: Epoch(7),
                tls: Some(Secured { end_point: vec![1; 32], certificate: vec![2; 2000], has_ca: true }),
            },
        ] {
            let json = encode(&opening).expect("short");
            assert!(json.len() <= size_hint(&opening), "{}", json.len());
            assert_eq!(super::super::peer::decode::<Opening>(&json).expect("reads"), opening);
        }
        let shown = format!("{:?}", carried());
        assert!(
            shown.contains("Proven(...)") && !shown.contains("secret") && !shown.contains("115, 101, 99, 114"),
            "{shown}"
        );
    }

    /// An opening of a daemon that knew no TLS at the other node reads, and so does ours there.
    #[test]
    fn an_opening_of_before_reads() {
        let before = br#"{"connection":{"client":"192.0.2.7:5","epoch":7}}"#;
        let opening = Opening::Connection { client: ([192, 0, 2, 7], 5).into(), epoch: Epoch(7), tls: None };
        assert_eq!(super::super::peer::decode::<Opening>(before).expect("reads"), opening);
        assert_eq!(&encode(&opening).expect("short")[..], before);
        assert_eq!((opening.epoch(), opening.client().port()), (Epoch(7), 5));
    }

    #[test]
    fn a_frames_head_reads_back_and_no_other_does() {
        for frame in [Frame::Octets, Frame::Stop, Frame::Opening, Frame::Ahead, Frame::End] {
            assert_eq!(Frame::parse(frame.head(0)), Ok((frame, 0)));
        }
        assert_eq!(Frame::parse(Frame::Octets.head(FRAME_MOST)), Ok((Frame::Octets, FRAME_MOST)));
        assert_eq!(Frame::parse(Frame::Ahead.head(0x01_02_03)), Ok((Frame::Ahead, 0x01_02_03)));
        assert!(matches!(Frame::parse(Frame::Opening.head(OPENING_LIMIT + 1)), Err(WireError::Oversize(..))));
        for head in [[5, 0, 0, 0], [b'E', 0, 0, 9], [1, 0, 0, 1], [4, 0, 0, 1]] {
            assert!(Frame::parse(head).is_err(), "{head:?}");
        }
    }

    #[test]
    fn what_is_too_long_is_refused() {
        let text = vec![b'x'; OPENING_LIMIT];
        let carried = Carried { statements: vec![Prepared { name: Vec::new(), text }], ..carried() };
        let refused = encode(&Opening::Session(Box::new(carried)));
        assert!(matches!(refused, Err(WireError::Oversize(n, OPENING_LIMIT)) if n > OPENING_LIMIT));
    }
}
