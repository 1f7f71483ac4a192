//! The marker: the TXT record beside the service's address that says whose epoch it is (design.md section 4).
//! One string of `key=value` words separated by single spaces.
//!
//! It is NOT the DNS record itself (see `wire::dns`) and judges nothing: whether a marker is stale, foreign or
//! our own is the engine's business.
//!
//! **Invariants:** what `Display` writes, `FromStr` reads back to the same value; no text makes `FromStr` panic; a
//! marker that lacks a word of ours, says one twice or says nonsense in one is unreadable as a whole.
//!
//! Size: one TXT character-string holds 255 bytes (RFC 1035 section 3.3). With epoch and seq of 10 digits, which at an
//! update a second last for 317 years, the words other than the two names take at most 187 bytes, so that two
//! names of 34 characters fit. Names may be 63 characters long; a longer marker (never above [`MAX_LEN`]) is written as
//! two character-strings of the same record by `wire::dns`, which joins them again when it reads.

use crate::base::ids::{Epoch, NodeName, SystemId, TimelineId};
use crate::base::time::millis;
use std::fmt;
use std::str::FromStr;
use std::time::Duration;

/// The longest text a marker can be, in bytes: every number at its widest, both names 63 characters.
pub const MAX_LEN: usize = 333;

/// The longest `lease` believed, in milliseconds (one day). A longer one is unreadable: nobody could wait it out, and
/// the arithmetic of the wait W must not overflow on a word from the network.
pub const MAX_LEASE_MS: u64 = 86_400_000;

/// The longest `boot`: a kernel boot_id is a UUID in text.
const MAX_BOOT_LEN: usize = 36;

/// What the marker says. Unknown words are kept out but do not make it unreadable (a newer version may add some).
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Marker {
    /// At least 1.
    pub epoch: Epoch,
    /// Rises with every update, so that a late one never lands on a value that came back.
    pub seq: u64,
    pub active: NodeName,
    /// The synchronous standby, or `None` (written `none`) while the active node is alone.
    pub sync: Option<NodeName>,
    pub timeline: TimelineId,
    /// Milliseconds on the wire; 1 ms to [`MAX_LEASE_MS`].
    pub lease: Duration,
    pub sysid: SystemId,
    /// The kernel boot_id of the active node: 1 to 36 hexadecimal digits and hyphens.
    pub boot: String,
    /// RFC 3339 with whole seconds, UTC: when `sync` or `active` last changed.
    pub since: String,
    /// `loss=1`: written by a takeover that accepted loss, until its first opening.
    pub loss: bool,
}

impl fmt::Display for Marker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let sync = self.sync.as_ref().map_or(NONE, NodeName::as_str);
        write!(
            f,
            "v=1 epoch={} seq={} active={} sync={sync} timeline={} lease={} sysid={} boot={} since={}",
            self.epoch,
            self.seq,
            self.active,
            self.timeline,
            millis(self.lease),
            self.sysid,
            self.boot,
            self.since
        )?;
        if self.loss { f.write_str(" loss=1") } else { Ok(()) }
    }
}

/// How `sync` is written while the active node is alone. A node of that name cannot be told from it, so it is never
/// read as a name.
const NONE: &str = "none";

/// Why a text is not a marker.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BadMarker {
    #[error("the marker has no word \"{0}=\"")]
    Missing(&'static str),
    #[error("the marker says \"{0}=\" twice")]
    Twice(&'static str),
    #[error("the marker's word \"{0}=\" has a value that makes no sense")]
    Value(&'static str),
    #[error("the marker is of another version than v=1")]
    Version,
}

/// The words of version 1, in the order they are written; `loss` alone may be missing.
const WORDS: [&str; 11] =
    ["v", "epoch", "seq", "active", "sync", "timeline", "lease", "sysid", "boot", "since", "loss"];

impl FromStr for Marker {
    type Err = BadMarker;

    fn from_str(text: &str) -> Result<Marker, BadMarker> {
        let mut values: [Option<&str>; WORDS.len()] = [None; WORDS.len()];
        for word in text.split(' ') {
            let Some((key, value)) = word.split_once('=') else { continue };
            let Some(place) = WORDS.iter().position(|known| *known == key) else { continue };
            if values[place].replace(value).is_some() {
                return Err(BadMarker::Twice(WORDS[place]));
            }
        }
        let [v, epoch, seq, active, sync, timeline, lease, sysid, boot, since, loss] = values;
        if v.ok_or(BadMarker::Missing("v"))? != "1" {
            return Err(BadMarker::Version);
        }
        let lease_ms: u64 = number("lease", lease)?;
        let marker = Marker {
            epoch: Epoch(number("epoch", epoch)?),
            seq: number("seq", seq)?,
            active: name("active", active)?.ok_or(BadMarker::Value("active"))?,
            sync: name("sync", sync)?,
            timeline: TimelineId(number("timeline", timeline)?),
            lease: Duration::from_millis(lease_ms),
            sysid: SystemId(number("sysid", sysid)?),
            boot: boot.ok_or(BadMarker::Missing("boot"))?.to_owned(),
            since: since.ok_or(BadMarker::Missing("since"))?.to_owned(),
            loss: match loss {
                None => false,
                Some("1") => true,
                Some(_) => return Err(BadMarker::Value("loss")),
            },
        };
        if marker.epoch == Epoch::NONE {
            return Err(BadMarker::Value("epoch"));
        }
        if lease_ms == 0 || lease_ms > MAX_LEASE_MS {
            return Err(BadMarker::Value("lease"));
        }
        let hex = marker.boot.bytes().all(|b| b.is_ascii_hexdigit() || b == b'-');
        if marker.boot.is_empty() || marker.boot.len() > MAX_BOOT_LEN || !hex {
            return Err(BadMarker::Value("boot"));
        }
        if !is_utc_second(&marker.since) {
            return Err(BadMarker::Value("since"));
        }
        Ok(marker)
    }
}

/// A decimal number without sign or leading zero, so that one value has one spelling.
fn number<N: FromStr>(key: &'static str, value: Option<&str>) -> Result<N, BadMarker> {
    let text = value.ok_or(BadMarker::Missing(key))?;
    let plain = text.bytes().all(|b| b.is_ascii_digit()) && (text == "0" || !text.starts_with('0'));
    if !plain {
        return Err(BadMarker::Value(key));
    }
    text.parse().map_err(|_| BadMarker::Value(key))
}

fn name(key: &'static str, value: Option<&str>) -> Result<Option<NodeName>, BadMarker> {
    match value.ok_or(BadMarker::Missing(key))? {
        NONE => Ok(None),
        text => text.parse().map(Some).map_err(|_| BadMarker::Value(key)),
    }
}

/// `2026-11-20T15:11:00Z` and nothing else that RFC 3339 allows.
fn is_utc_second(text: &str) -> bool {
    text.len() == 20 && text.as_bytes()[10] == b'T' && text.ends_with('Z') && text.parse::<jiff::Timestamp>().is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const TEXT: &str = "v=1 epoch=7 seq=41 active=alp sync=midna timeline=3 lease=5000 sysid=7318000111222333444 \
                        boot=5f1c0000-0000-4000-8000-000000000001 since=2026-11-20T15:11:00Z";

    fn sample() -> Marker {
        Marker {
            epoch: Epoch(7),
            seq: 41,
            active: "alp".parse().unwrap(),
            sync: Some("midna".parse().unwrap()),
            timeline: TimelineId(3),
            lease: Duration::from_secs(5),
            sysid: SystemId(7_318_000_111_222_333_444),
            boot: "5f1c0000-0000-4000-8000-000000000001".into(),
            since: "2026-11-20T15:11:00Z".into(),
            loss: false,
        }
    }

    #[test]
    fn writes_exactly_what_the_design_shows() {
        assert_eq!(sample().to_string(), TEXT);
        let alone = Marker { sync: None, loss: true, ..sample() };
        assert_eq!(alone.to_string(), TEXT.replace("sync=midna", "sync=none") + " loss=1");
        assert_eq!(alone.to_string().parse(), Ok(alone));
    }

    #[test]
    fn words_of_a_newer_version_are_ignored() {
        assert_eq!(format!("{TEXT} colour=blue odd").parse(), Ok(sample()));
        let (first, rest) = TEXT.split_once(' ').unwrap();
        assert_eq!(format!("{rest} {first}").parse(), Ok(sample()), "order does not matter");
    }

    #[test]
    fn a_known_word_that_is_missing_or_twice_is_an_error() {
        for word in WORDS.iter().filter(|w| **w != "loss") {
            let without: Vec<&str> = TEXT.split(' ').filter(|w| !w.starts_with(&format!("{word}="))).collect();
            assert_eq!(without.join(" ").parse::<Marker>(), Err(BadMarker::Missing(word)));
            let again = TEXT.split(' ').find(|w| w.starts_with(&format!("{word}="))).unwrap();
            assert_eq!(format!("{TEXT} {again}").parse::<Marker>(), Err(BadMarker::Twice(word)));
        }
    }

    #[test]
    fn nonsense_in_a_known_word_is_an_error() {
        for (from, to, word) in [
            ("epoch=7", "epoch=0", "epoch"),
            ("epoch=7", "epoch=+7", "epoch"),
            ("epoch=7", "epoch=07", "epoch"),
            ("seq=41", "seq=", "seq"),
            ("seq=41", "seq=99999999999999999999", "seq"),
            ("active=alp", "active=none", "active"),
            ("active=alp", "active=Alp", "active"),
            ("sync=midna", "sync=", "sync"),
            ("timeline=3", "timeline=4294967296", "timeline"),
            ("lease=5000", "lease=0", "lease"),
            ("lease=5000", "lease=86400001", "lease"),
            ("lease=5000", "lease=5s", "lease"),
            ("boot=5f1c", "boot=xyz", "boot"),
            ("15:11:00Z", "15:11:00.5Z", "since"),
            ("15:11:00Z", "15:61:00Z", "since"),
            ("2026-11-20T", "2026-13-20T", "since"),
        ] {
            assert_eq!(TEXT.replace(from, to).parse::<Marker>(), Err(BadMarker::Value(word)), "{to}");
        }
        assert_eq!(format!("{TEXT} loss=0").parse::<Marker>(), Err(BadMarker::Value("loss")));
        assert_eq!(TEXT.replace("v=1", "v=2").parse::<Marker>(), Err(BadMarker::Version));
        assert_eq!("".parse::<Marker>(), Err(BadMarker::Missing("v")));
    }

    #[test]
    fn size_is_as_the_module_head_says() {
        let widest = |name: &str, number: u64| Marker {
            epoch: Epoch(number),
            seq: number,
            active: name.parse().unwrap(),
            sync: Some(name.parse().unwrap()),
            timeline: TimelineId(u32::MAX),
            lease: Duration::from_millis(MAX_LEASE_MS),
            sysid: SystemId(u64::MAX),
            loss: true,
            ..sample()
        };
        assert_eq!(widest(&"a".repeat(63), u64::MAX).to_string().len(), MAX_LEN);
        assert!(widest(&"a".repeat(34), 9_999_999_999).to_string().len() <= 255);
    }

    fn markers() -> impl Strategy<Value = Marker> {
        let names = "[a-z0-9][a-z0-9_-]{0,62}".prop_filter("none is no name", |n| n != "none");
        (
            (1..=u64::MAX, any::<u64>(), names.clone(), proptest::option::of(names), any::<u32>()),
            (1..=MAX_LEASE_MS, any::<u64>(), "[0-9a-f-]{1,36}", 0..4_000_000_000i64, any::<bool>()),
        )
            .prop_map(|((epoch, seq, active, sync, timeline), (lease, sysid, boot, since, loss))| Marker {
                epoch: Epoch(epoch),
                seq,
                active: active.parse().unwrap(),
                sync: sync.map(|s| s.parse().unwrap()),
                timeline: TimelineId(timeline),
                lease: Duration::from_millis(lease),
                sysid: SystemId(sysid),
                boot,
                since: jiff::Timestamp::from_second(since).unwrap().to_string(),
                loss,
            })
    }

    proptest! {
        #[test]
        fn what_is_written_reads_back_the_same(marker in markers()) {
            let text = marker.to_string();
            prop_assert!(text.len() <= MAX_LEN);
            prop_assert_eq!(text.parse::<Marker>(), Ok(marker));
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            let _ = String::from_utf8_lossy(&bytes).parse::<Marker>();
        }

        #[test]
        fn what_parses_writes_back_to_something_that_parses_the_same(
            words in proptest::collection::vec(concat!(
                "(v=1|epoch=[0-9]{0,3}|seq=[0-9]{0,3}|active=[a-z=]{0,3}|sync=none|timeline=1|lease=5|sysid=1",
                "|boot=[0-9g]{1,2}|since=2026-11-20T15:11:0[0-9]Z|loss=1|x)",
            ), 0..13)
        ) {
            if let Ok(marker) = words.join(" ").parse::<Marker>() {
                prop_assert_eq!(marker.to_string().parse::<Marker>(), Ok(marker));
            }
        }
    }
}
