//! Record framing of the durable journal: `length (4, LE) | sequence (8, LE) | crc32c (4, LE) | payload`. The checksum
//! covers length, sequence and payload.
//!
//! A *torn tail* (nothing valid follows the first bad record) is what a crash in the middle of a write leaves: it was
//! never acknowledged, so it is cut off. A bad record with a valid one after it is corruption: what was recorded there
//! is not known, so the journal is refused.

/// Bytes before the payload.
const HEADER: usize = 16;
/// A payload is at most this long; the largest entry (a snapshot) is a few kilobytes.
const PAYLOAD_MAX: usize = 1 << 20;

/// The records of one file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Decoded {
    /// Sequence and payload, in order.
    pub records: Vec<(u64, Vec<u8>)>,
    /// Where the last good record ends; anything behind it is a torn tail.
    pub good_len: usize,
    pub torn: bool,
}

/// Why a journal is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("record {index} at byte {offset} is damaged although later ones are whole")]
pub struct Corrupt {
    pub index: usize,
    pub offset: usize,
}

fn checksum(length: u32, sequence: u64, payload: &[u8]) -> u32 {
    let sum = crc32c::crc32c(&length.to_le_bytes());
    let sum = crc32c::crc32c_append(sum, &sequence.to_le_bytes());
    crc32c::crc32c_append(sum, payload)
}

/// One record as bytes; `None` when the payload is longer than a record may be.
pub fn encode(sequence: u64, payload: &[u8]) -> Option<Vec<u8>> {
    let length = u32::try_from(payload.len()).ok().filter(|_| payload.len() <= PAYLOAD_MAX)?;
    let mut out = Vec::with_capacity(HEADER + payload.len());
    out.extend_from_slice(&length.to_le_bytes());
    out.extend_from_slice(&sequence.to_le_bytes());
    out.extend_from_slice(&checksum(length, sequence, payload).to_le_bytes());
    out.extend_from_slice(payload);
    Some(out)
}

/// The record at the start of `bytes`: sequence and payload.
fn read_one(bytes: &[u8]) -> Option<(u64, &[u8])> {
    let length = u32::from_le_bytes(bytes.get(0..4)?.try_into().ok()?);
    let sequence = u64::from_le_bytes(bytes.get(4..12)?.try_into().ok()?);
    let sum = u32::from_le_bytes(bytes.get(12..16)?.try_into().ok()?);
    let size = usize::try_from(length).ok().filter(|size| *size <= PAYLOAD_MAX)?;
    let payload = bytes.get(HEADER..HEADER + size)?;
    (checksum(length, sequence, payload) == sum).then_some((sequence, payload))
}

/// Reads a whole file.
pub fn decode(bytes: &[u8]) -> Result<Decoded, Corrupt> {
    let mut records: Vec<(u64, Vec<u8>)> = Vec::new();
    let mut at = 0;
    while at < bytes.len() {
        let next =
            read_one(&bytes[at..]).filter(|(sequence, _)| records.last().is_none_or(|(last, _)| *sequence == last + 1));
        match next {
            Some((sequence, payload)) => {
                at += HEADER + payload.len();
                records.push((sequence, payload.to_vec()));
            }
            None => {
                // A whole record that stands here out of sequence counts as one that follows.
                let later = (at..=bytes.len().saturating_sub(HEADER)).any(|from| read_one(&bytes[from..]).is_some());
                if later {
                    return Err(Corrupt { index: records.len(), offset: at });
                }
                return Ok(Decoded { records, good_len: at, torn: true });
            }
        }
    }
    Ok(Decoded { records, good_len: at, torn: false })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn file(payloads: &[&[u8]]) -> Vec<u8> {
        payloads.iter().enumerate().flat_map(|(i, p)| encode(i as u64 + 1, p).expect("short")).collect()
    }

    #[test]
    fn a_torn_tail_is_cut_off_at_every_byte() {
        let whole = file(&[b"one", b"two", b"three"]);
        let two = file(&[b"one", b"two"]).len();
        for cut in two..whole.len() {
            let decoded = decode(&whole[..cut]).expect("torn, not corrupt");
            assert_eq!((decoded.records.len(), decoded.good_len), (2, two));
            assert_eq!(decoded.torn, cut != two);
        }
    }

    #[test]
    fn a_flipped_byte_in_the_middle_is_refused_wherever_it_is() {
        let whole = file(&[b"one", b"two", b"three"]);
        let last = file(&[b"one", b"two"]).len();
        for at in 0..last {
            let mut bad = whole.clone();
            bad[at] ^= 0x40;
            assert!(decode(&bad).is_err(), "byte {at}");
        }
    }

    #[test]
    fn a_lost_record_in_the_middle_is_refused() {
        let mut bytes = encode(1, b"one").expect("short");
        bytes.extend(encode(3, b"three").expect("short"));
        assert!(decode(&bytes).is_err());
    }

    #[test]
    fn zeros_behind_the_end_are_a_torn_tail() {
        let mut bytes = file(&[b"one"]);
        let good = bytes.len();
        bytes.extend([0; 4096]);
        assert_eq!(decode(&bytes).expect("torn").good_len, good);
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..2000)) {
            let _ = decode(&bytes);
        }

        #[test]
        fn what_is_encoded_decodes_to_the_same(
            payloads in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..200), 0..20),
        ) {
            let encoded = payloads.iter().enumerate().map(|(i, p)| encode(i as u64 + 1, p).expect("short"));
            let bytes: Vec<u8> = encoded.flatten().collect();
            let decoded = decode(&bytes).expect("whole");
            prop_assert!(!decoded.torn);
            prop_assert_eq!(decoded.records.into_iter().map(|(_, p)| p).collect::<Vec<_>>(), payloads);
        }
    }
}
