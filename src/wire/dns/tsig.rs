//! TSIG (RFC 8945): the key, signatures of requests and answers, and their verification.
//!
//! The verification is done here and not by hickory's `TSigVerifier`, because that loses the error code of an answer
//! with an empty MAC (BADKEY, BADSIG), and subtracts the fudge from a time off the wire without a check.

use hickory_proto::op::Message;
use hickory_proto::rr::rdata::TSIG;
use hickory_proto::rr::rdata::tsig::{TsigAlgorithm, TsigError, make_tsig_record, signed_bitmessage_to_buf};
use hickory_proto::rr::{Name, Record, TSigner};
use std::fmt;

/// How far two clocks may differ, in seconds (RFC 8945 section 10 recommends 300).
const FUDGE_S: u16 = 300;

/// A shared TSIG key. `Debug` shows its name only.
#[derive(Clone)]
pub struct TsigKey(TSigner);

impl TsigKey {
    /// `algorithm` is `hmac-sha256`, `hmac-sha384` or `hmac-sha512`; `secret` the base64 text of the key file (white
    /// space around it is ignored). Errors are sentences without the secret.
    pub fn new(name: &str, algorithm: &str, secret: &str) -> Result<TsigKey, String> {
        let key_name =
            super::parse_name(name).map_err(|why| format!("dns.tsig_name \"{name}\" is not a name: {why}"))?;
        let algorithm = match algorithm {
            "hmac-sha256" => TsigAlgorithm::HmacSha256,
            "hmac-sha384" => TsigAlgorithm::HmacSha384,
            "hmac-sha512" => TsigAlgorithm::HmacSha512,
            other => {
                return Err(format!(
                    "dns.tsig_algorithm \"{other}\" is not known; use hmac-sha256, hmac-sha384 or hmac-sha512"
                ));
            }
        };
        let bytes = data_encoding::BASE64.decode(secret.trim().as_bytes()).map_err(|_| {
            format!("the secret of TSIG key {name} is not base64; put only its base64 text in the file")
        })?;
        if bytes.is_empty() {
            return Err(format!("the secret of TSIG key {name} is empty; put its base64 text in the file"));
        }
        TSigner::new(bytes, algorithm, key_name, FUDGE_S)
            .map(TsigKey)
            .map_err(|_| format!("the TSIG key {name} cannot be used; make a new one with `tsig-keygen`"))
    }

    /// The key's name, absolute.
    pub fn name(&self) -> &Name {
        self.0.signer_name()
    }

    /// The algorithm as the configuration writes it.
    pub fn algorithm(&self) -> String {
        self.0.algorithm().to_string()
    }

    /// Signs a request; returns the MAC, which the answer's signature covers.
    pub(super) fn sign_request(&self, message: &mut Message, now_s: u64) -> Result<Vec<u8>, String> {
        let (record, _) =
            self.0.sign_message(message, now_s).map_err(|error| format!("the request cannot be signed: {error}"))?;
        let mac = record.data.mac.clone();
        message.set_signature(record);
        Ok(mac)
    }
}

impl fmt::Debug for TsigKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "TsigKey({} {})", self.algorithm(), self.name())
    }
}

/// A signature that was verified.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Signed {
    /// The signer's clock, in seconds since 1970.
    pub time: u64,
    pub mac: Vec<u8>,
    /// BADTIME in a signed answer.
    pub error: Option<TsigError>,
}

/// Why a signature does not count.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TsigFault {
    #[error("it is not signed")]
    Unsigned,
    #[error("it is signed with another key")]
    WrongKey,
    #[error("its signature is wrong")]
    BadSignature,
    #[error("its clock and ours differ by {skew_s} s")]
    BadTime { skew_s: u64, signed: Signed },
}

/// Verifies the signature of `bytes` (RFC 8945 section 5.2: key, MAC, then time). `parsed` is the same message decoded;
/// `request_mac` is given for an answer. The time is judged last, so that [`TsigFault::BadTime`] is always of a holder
/// of the key.
pub fn verify(
    key: &TsigKey,
    bytes: &[u8],
    parsed: Option<&Record<TSIG>>,
    request_mac: Option<&[u8]>,
    now_s: u64,
) -> Result<Signed, TsigFault> {
    let record = parsed.ok_or(TsigFault::Unsigned)?;
    let tsig = &record.data;
    if record.name != *key.name() || tsig.algorithm != *key.0.algorithm() {
        return Err(TsigFault::WrongKey);
    }
    let (covered, _) = signed_bitmessage_to_buf(bytes, request_mac, true).map_err(|_| TsigFault::BadSignature)?;
    key.0.verify(&covered, &tsig.mac).map_err(|_| TsigFault::BadSignature)?;
    let signed = Signed { time: tsig.time, mac: tsig.mac.clone(), error: tsig.error };
    let skew_s = now_s.abs_diff(tsig.time);
    if skew_s > u64::from(tsig.fudge) { Err(TsigFault::BadTime { skew_s, signed }) } else { Ok(signed) }
}

/// The TSIG record of an answer whose bytes without it are `unsigned` (RFC 8945 section 5.3). `other` is the server's
/// time with BADTIME, else empty.
pub fn response_signature(
    key: &TsigKey,
    unsigned: &[u8],
    id: u16,
    request_mac: &[u8],
    time_s: u64,
    error: Option<TsigError>,
    other: Vec<u8>,
) -> Result<Box<Record<TSIG>>, String> {
    let stub = TSIG::new(key.0.algorithm().clone(), time_s, FUDGE_S, Vec::new(), id, error, other);
    let covered = key.0.encode_response_tbs(request_mac, unsigned, &stub).map_err(|error| error.to_string())?;
    let mac = key.0.sign(&covered).map_err(|error| error.to_string())?;
    Ok(Box::new(make_tsig_record(key.name().clone(), stub.set_mac(mac))))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key() -> TsigKey {
        TsigKey::new("portcullis", "hmac-sha256", "c2VjcmV0IG9mIHRoZSB0ZXN0\n").unwrap()
    }

    fn verified(key: &TsigKey, bytes: &[u8], mac: Option<&[u8]>, now: u64) -> Result<Signed, TsigFault> {
        let parsed = Message::from_vec(bytes).unwrap();
        verify(key, bytes, parsed.signature(), mac, now)
    }

    #[test]
    fn a_key_says_what_is_wrong_with_it_and_never_its_secret() {
        assert!(TsigKey::new("k", "hmac-md5", "aGk=").unwrap_err().contains("hmac-sha256"));
        let error = TsigKey::new("k", "hmac-sha512", "sesame!!").unwrap_err();
        assert!(error.contains("base64") && !error.contains("sesame"));
        assert!(TsigKey::new("k", "hmac-sha512", " \n").is_err());
        assert!(TsigKey::new("", "hmac-sha512", "aGk=").is_err());
        assert_eq!(format!("{:?}", key()), "TsigKey(hmac-sha256 portcullis.)");
    }

    #[test]
    fn requests_and_answers_verify_only_with_the_same_key_question_and_hour() {
        for algorithm in ["hmac-sha256", "hmac-sha384", "hmac-sha512"] {
            let key = TsigKey::new("portcullis", algorithm, "c2VjcmV0").unwrap();
            let other_secret = TsigKey::new("portcullis", algorithm, "c2VjcmU=").unwrap();
            let other_name = TsigKey::new("drawbridge", algorithm, "c2VjcmV0").unwrap();
            let mut request = Message::query();
            assert_eq!(verified(&key, &request.to_vec().unwrap(), None, 1000), Err(TsigFault::Unsigned));
            let mac = key.sign_request(&mut request, 1000).unwrap();
            let bytes = request.to_vec().unwrap();
            assert_eq!(verified(&key, &bytes, None, 1300).map(|s| (s.time, s.mac)), Ok((1000, mac.clone())));
            assert!(matches!(verified(&key, &bytes, None, 1301), Err(TsigFault::BadTime { skew_s: 301, .. })));
            assert!(matches!(verified(&key, &bytes, None, 0), Err(TsigFault::BadTime { .. })));
            assert_eq!(verified(&other_secret, &bytes, None, 1000), Err(TsigFault::BadSignature));
            assert_eq!(verified(&other_name, &bytes, None, 1000), Err(TsigFault::WrongKey));
            assert_eq!(verified(&key, &bytes, Some(b"x"), 1000), Err(TsigFault::BadSignature));

            let mut answer = Message::response(request.id, request.op_code);
            let unsigned = answer.to_vec().unwrap();
            answer.set_signature(response_signature(&key, &unsigned, request.id, &mac, 1000, None, vec![]).unwrap());
            let bytes = answer.to_vec().unwrap();
            assert!(verified(&key, &bytes, Some(&mac), 1000).is_ok());
            assert_eq!(verified(&key, &bytes, Some(&mac[1..]), 1000), Err(TsigFault::BadSignature));
            assert_eq!(verified(&key, &bytes, None, 1000), Err(TsigFault::BadSignature));
        }
    }

    #[test]
    fn a_signed_time_near_zero_does_not_overflow() {
        let mut request = Message::query();
        key().sign_request(&mut request, 3).unwrap();
        assert!(verified(&key(), &request.to_vec().unwrap(), None, 3).is_ok());
    }
}
