//! Questions, answers and RFC 2136 updates of the witness: bytes to values and back, on hickory-proto.
//!
//! It is NOT a resolver (nothing is followed, cached or retried) and has no opinion: which answer counts for or against
//! a node is decided in `engine::evidence`. Sockets are in `io::dns`.
//!
//! **Invariants:** no bytes make it panic; with a key, an answer that is not signed by that key for this very question
//! is never turned into a value; a [`RecordPair`] keeps the record data exactly as read, so that it can be written back
//! as a prerequisite.

mod question;
mod soa;
mod tsig;
mod update;

pub use question::{Answer, Asked, Facts, Question};
pub use soa::{HeadQuestion, ZoneHead};
pub use tsig::{Signed, TsigFault, TsigKey, response_signature, verify};
pub use update::{Update, UpdateOutcome};

use hickory_proto::rr::Name;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::net::IpAddr;

/// One TXT record: its character-strings as they are on the wire.
pub type Text = Vec<Vec<u8>>;

/// Longest character-string (RFC 1035 section 3.3).
const MAX_STRING: usize = 255;

/// The names of one service at its witness.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServiceNames {
    pub zone: Name,
    /// The name clients use.
    pub name: Name,
    /// `_portcullis.` before it: where the marker stands.
    pub marker_name: Name,
}

impl ServiceNames {
    /// From the configuration's words (with or without the dot at the end). Errors are sentences that name the key.
    pub fn new(zone: &str, name: &str) -> Result<ServiceNames, String> {
        let zone = parse_name(zone).map_err(|why| format!("dns.zone \"{zone}\" is not a domain name: {why}"))?;
        let bad = |why: String| format!("service.name \"{name}\" is not a domain name: {why}");
        let name = parse_name(name).map_err(bad)?;
        if !zone.zone_of(&name) {
            return Err(format!("service.name {name} is not in dns.zone {zone}; name the zone that holds it"));
        }
        let marker_name = name
            .prepend_label("_portcullis")
            .map_err(|_| format!("service.name {name} is too long; its marker \"_portcullis.{name}\" has no room"))?;
        Ok(ServiceNames { zone, name, marker_name })
    }
}

/// An absolute name in lower case.
fn parse_name(text: &str) -> Result<Name, String> {
    let mut name = Name::from_ascii(text).map_err(|error| error.to_string())?.to_lowercase();
    if name.iter().next().is_none() {
        return Err("it is empty".into());
    }
    name.set_fqdn(true);
    Ok(name)
}

/// Both record sets of the service as they were read: the prerequisite of the next update.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
pub struct RecordPair {
    /// Data of A and AAAA together, sorted.
    pub addresses: Vec<IpAddr>,
    /// Seconds; the smallest of the address records, 0 when there is none.
    pub ttl: u32,
    /// One entry per TXT record, its character-strings joined (not UTF-8: replaced, so that it is no marker).
    pub marker: Vec<String>,
    /// The same TXT records exactly as read, sorted.
    texts: Vec<Text>,
}

impl RecordPair {
    /// From record data in any order.
    pub fn new(mut addresses: Vec<IpAddr>, ttl: u32, mut texts: Vec<Text>) -> RecordPair {
        addresses.sort_unstable();
        addresses.dedup();
        texts.sort_unstable();
        texts.dedup();
        let marker = texts.iter().map(|text| String::from_utf8_lossy(&text.concat()).into_owned()).collect();
        let ttl = if addresses.is_empty() { 0 } else { ttl };
        RecordPair { addresses, ttl, marker, texts }
    }

    /// What an update that writes these leaves behind.
    pub fn written(addresses: &[IpAddr], ttl: u32, marker: &str) -> RecordPair {
        RecordPair::new(addresses.to_vec(), ttl, vec![split_text(marker)])
    }

    /// Equal in all that prerequisites compare: the data, not the TTL (RFC 2136 section 3.2.3).
    pub fn same_data(&self, other: &RecordPair) -> bool {
        self.addresses == other.addresses && self.texts == other.texts
    }

    /// The TXT records exactly as read.
    pub fn texts(&self) -> &[Text] {
        &self.texts
    }
}

/// One TXT record for a text of any length: as few character-strings as it needs, at least one.
fn split_text(text: &str) -> Text {
    if text.is_empty() {
        return vec![Vec::new()];
    }
    text.as_bytes().chunks(MAX_STRING).map(<[u8]>::to_vec).collect()
}

/// What one server said when asked for A, AAAA and TXT at once.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub struct Reading {
    pub pair: RecordPair,
    /// Of the zone, where an answer carried it (each answer without data does).
    pub soa_serial: Option<u32>,
    /// Something that should not stand at these names (an alias), in words; the records are then not to be trusted.
    pub strange: Option<String>,
    /// The server's clock when it signed the earliest of the answers, in seconds since 1970; `None` without a key.
    pub signed_time: Option<u64>,
}

impl Reading {
    /// Joins the three answers of one server.
    pub fn of(facts: [Facts; 3]) -> Reading {
        let mut reading = Reading::default();
        let (mut addresses, mut texts, mut ttl) = (Vec::new(), Vec::new(), u32::MAX);
        for one in facts {
            if !one.addresses.is_empty() {
                ttl = ttl.min(one.ttl);
            }
            addresses.extend(one.addresses);
            texts.extend(one.texts);
            reading.soa_serial = reading.soa_serial.or(one.soa_serial);
            reading.strange = reading.strange.take().or(one.strange);
            reading.signed_time = match (reading.signed_time, one.signed_time) {
                (Some(a), Some(b)) => Some(a.min(b)),
                (a, b) => a.or(b),
            };
        }
        reading.pair = RecordPair::new(addresses, ttl, texts);
        reading
    }
}

/// Shows a name without the dot at its end, as people and the configuration write it.
struct Plain<'a>(&'a Name);

impl fmt::Display for Plain<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = self.0.to_ascii();
        f.write_str(text.strip_suffix('.').unwrap_or(&text))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_made_from_the_configuration() {
        let names = ServiceNames::new("example.org", "DB.example.org.").unwrap();
        assert_eq!(names.zone.to_ascii(), "example.org.");
        assert_eq!(names.name.to_ascii(), "db.example.org.");
        assert_eq!(names.marker_name.to_ascii(), "_portcullis.db.example.org.");
        assert!(ServiceNames::new("example.org", "example.org").is_ok(), "the apex may be the service");
        for (zone, name) in [("example.org", "db.example.net"), ("", "db"), ("a..b", "db"), ("example.org", "")] {
            assert!(ServiceNames::new(zone, name).is_err(), "{zone} {name}");
        }
        let long = format!("{}.{}.{}.{}.example.org", "a".repeat(63), "b".repeat(63), "c".repeat(63), "d".repeat(45));
        assert!(ServiceNames::new("example.org", &long).unwrap_err().contains("no room"));
    }

    #[test]
    fn a_pair_does_not_depend_on_the_order_of_answers() {
        let (a, b): (IpAddr, IpAddr) = ("192.0.2.2".parse().unwrap(), "2001:db8::1".parse().unwrap());
        let texts = vec![vec![b"x".to_vec()], vec![b"a".to_vec(), b"b".to_vec()]];
        let one = RecordPair::new(vec![b, a], 5, texts.clone());
        let other = RecordPair::new(vec![a, b], 9, texts.into_iter().rev().collect());
        assert!(one.same_data(&other));
        assert_ne!(one, other, "the TTL differs");
        assert_eq!(one.marker, ["ab", "x"]);
        let split = RecordPair::new(vec![], 5, vec![vec![b"ab".to_vec()]]);
        let joined = RecordPair::new(vec![], 7, vec![vec![b"a".to_vec(), b"b".to_vec()]]);
        assert_eq!((split.ttl, &split.marker), (0, &joined.marker));
        assert!(!split.same_data(&joined), "other strings are other data");
    }

    #[test]
    fn a_long_text_becomes_several_strings_of_one_record() {
        let text = "m".repeat(crate::wire::marker::MAX_LEN);
        let record = split_text(&text);
        assert_eq!(record.iter().map(Vec::len).collect::<Vec<_>>(), [255, 78]);
        assert_eq!(RecordPair::written(&[], 5, &text).marker, [text]);
        assert_eq!(split_text(""), vec![Vec::<u8>::new()]);
    }
}
