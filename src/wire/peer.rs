//! The peer channel on the wire: frames, the greeting, and the envelope of questions and answers.
//!
//! ```text
//! frame     length: 4 octets, big-endian, then so many octets of JSON; 1 to FRAME_LIMIT
//! greeting  each side's first frame: Hello; the client's first, the server's only after it accepted that
//! then      client: Call::Ask | Call::Ping      server: Reply::Answer | Reply::Progress | Reply::Refused | Reply::Pong
//! or        client: Call::Tunnel, once          server: Reply::Framed | Reply::Tunnelled | Reply::Refused
//!                                               (wire::tunnel)
//! ```
//!
//! What this is NOT: secrecy or authenticity (TLS gives both), nor the meaning of a question: its body is whatever type
//! the caller chose, `engine::turn` in the product.
//!
//! **Invariant:** arbitrary bytes never panic, and nothing is set aside for a frame before its length is known good.

use crate::base::ids::NodeName;
use bytes::{Buf, Bytes, BytesMut};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// The version spoken here. Raised when an older daemon would misunderstand; both sides must agree.
pub const VERSION: u16 = 1;
/// Longest JSON text in a frame. A longer one is refused by the sender, and ends the connection at the receiver.
pub const FRAME_LIMIT: usize = 64 * 1024;
/// Octets of the length before it.
const HEADER: usize = 4;

/// Why bytes from the peer (or for it) are not a message.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// Its length, and what it may have.
    #[error("a message of {0} octets, and {1} is the limit")]
    Oversize(usize, usize),
    #[error("an empty frame")]
    Empty,
    /// Says what serde said: names of fields and positions, at most [`REASON_LIMIT`] characters of it.
    #[error("not a message of this protocol: {0}")]
    Malformed(String),
}

/// Longest account of a malformed message; it may quote the sender.
const REASON_LIMIT: usize = 120;

fn malformed(error: serde_json::Error) -> WireError {
    WireError::Malformed(error.to_string().escape_debug().take(REASON_LIMIT).collect())
}

/// The first frame in each direction. Fields of later versions are ignored, so that an older daemon can still say that
/// the *version* is what differs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    pub version: u16,
    /// Must agree with the name that the sender's TLS key stands for.
    pub node: NodeName,
}

/// What a client sends after the greeting.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Call {
    /// A question; `id` is the client's, new for each question of a connection.
    Ask { id: u64, body: Value },
    /// Only asks whether the connection still carries anything; answered at once, whatever handlers do.
    Ping,
    /// This connection becomes a tunnel: so many octets of its opening follow. Only the first call of a connection.
    /// `returns`: the client may be given back through it.
    Tunnel {
        octets: usize,
        #[serde(default)]
        returns: bool,
    },
}

/// What a server sends after the greeting.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reply {
    /// The last word on question `id`.
    Answer {
        id: u64,
        body: Value,
    },
    /// A word on the way; more follow.
    Progress {
        id: u64,
        body: Value,
    },
    /// The question was not understood, or there is no room for it; one sentence. The connection goes on.
    Refused {
        id: u64,
        reason: String,
    },
    Pong,
    /// All that follows is the tunnel's.
    Tunnelled,
    /// The same, in frames (`wire::tunnel::Frame`), to who said that it knows returns.
    Framed,
}

/// A message as a whole frame.
pub fn encode<T: Serialize>(message: &T) -> Result<Bytes, WireError> {
    let mut frame = vec![0; HEADER];
    serde_json::to_writer(&mut frame, message).map_err(malformed)?;
    let length = frame.len() - HEADER;
    match u32::try_from(length) {
        Ok(header) if length <= FRAME_LIMIT => frame[..HEADER].copy_from_slice(&header.to_be_bytes()),
        _ => return Err(WireError::Oversize(length, FRAME_LIMIT)),
    }
    Ok(frame.into())
}

/// Takes the first whole frame's JSON off the front of what was received; `None`: not all there yet.
pub fn next_frame(received: &mut BytesMut) -> Result<Option<Bytes>, WireError> {
    let Some(header) = received.first_chunk::<HEADER>() else { return Ok(None) };
    let length = usize::try_from(u32::from_be_bytes(*header)).unwrap_or(usize::MAX);
    match length {
        0 => Err(WireError::Empty),
        _ if length > FRAME_LIMIT => Err(WireError::Oversize(length, FRAME_LIMIT)),
        _ if received.len() < HEADER + length => Ok(None),
        _ => {
            received.advance(HEADER);
            Ok(Some(received.split_to(length).freeze()))
        }
    }
}

/// Reads one frame's JSON.
pub fn decode<T: DeserializeOwned>(json: &[u8]) -> Result<T, WireError> {
    serde_json::from_slice(json).map_err(malformed)
}

/// A question or answer for the body of an envelope.
pub fn to_body<T: Serialize>(message: &T) -> Result<Value, WireError> {
    serde_json::to_value(message).map_err(malformed)
}

/// The question or answer in the body of an envelope.
pub fn from_body<T: DeserializeOwned>(body: Value) -> Result<T, WireError> {
    serde_json::from_value(body).map_err(malformed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_frame_is_its_length_and_its_json() {
        let hello = Hello { version: 1, node: "alp".parse().expect("name") };
        let frame = encode(&hello).expect("small");
        assert_eq!(&frame[..], b"\x00\x00\x00\x1a{\"version\":1,\"node\":\"alp\"}");
    }

    #[test]
    fn frames_come_out_whole_however_they_were_cut() {
        let calls = [Call::Ping, Call::Ask { id: 7, body: "x".repeat(3000).into() }, Call::Ping];
        let stream: Vec<u8> = calls.iter().flat_map(|call| encode(call).expect("small").to_vec()).collect();
        for size in [1, 2, 3, 5, 1000, stream.len()] {
            let (mut received, mut seen) = (BytesMut::new(), Vec::new());
            for chunk in stream.chunks(size) {
                received.extend_from_slice(chunk);
                while let Some(json) = next_frame(&mut received).expect("good") {
                    seen.push(decode::<Call>(&json).expect("good"));
                }
            }
            assert_eq!((seen.as_slice(), received.len()), (calls.as_slice(), 0), "in pieces of {size}");
        }
    }

    #[test]
    fn the_limit_holds_on_both_sides() {
        let fits = "x".repeat(FRAME_LIMIT - 2);
        assert_eq!(encode(&fits).expect("just fits").len(), FRAME_LIMIT + HEADER);
        assert_eq!(encode(&format!("{fits}x")), Err(WireError::Oversize(FRAME_LIMIT + 1, FRAME_LIMIT)));
        let oversize = u32::try_from(FRAME_LIMIT + 1).expect("small").to_be_bytes();
        assert_eq!(
            next_frame(&mut BytesMut::from(&oversize[..])),
            Err(WireError::Oversize(FRAME_LIMIT + 1, FRAME_LIMIT))
        );
        assert_eq!(next_frame(&mut BytesMut::from(&[0; 4][..])), Err(WireError::Empty));
    }

    #[test]
    fn a_later_versions_greeting_is_still_read() {
        let text = br#"{"version":9,"node":"midna","colour":"blue"}"#;
        assert_eq!(decode::<Hello>(text).expect("read").version, 9);
        assert!(decode::<Hello>(br#"{"version":9,"node":"No Name"}"#).is_err());
    }

    #[test]
    fn what_is_malformed_is_told_in_short_and_harmlessly() {
        let long = format!("{{\"ask\":{{\"id\":\"\u{1b}[31m{}\"}}}}", "y".repeat(500));
        let Err(WireError::Malformed(text)) = decode::<Call>(long.as_bytes()) else { panic!("refused") };
        assert!(text.len() <= REASON_LIMIT && !text.contains('\u{1b}'), "{text}");
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let mut received = BytesMut::from(&bytes[..]);
            while let Ok(Some(json)) = next_frame(&mut received) {
                let _ = decode::<Call>(&json);
                let _ = decode::<Reply>(&json);
                let _ = decode::<Hello>(&json);
            }
        }

        #[test]
        fn what_is_encoded_reads_back(id in any::<u64>(), text in ".*") {
            let reply = Reply::Progress { id, body: text.into() };
            let mut received = BytesMut::from(&encode(&reply).expect("small")[..]);
            let json = next_frame(&mut received).expect("good").expect("whole");
            prop_assert_eq!(decode::<Reply>(&json).expect("good"), reply);
        }
    }
}
