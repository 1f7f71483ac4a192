//! One question to the witness and what its answer says.

use super::{Plain, ServiceNames, Text, TsigKey, tsig};
use hickory_proto::op::{Edns, Message, MessageType, OpCode, Query, ResponseCode};
use hickory_proto::rr::{DNSClass, Name, RData, Record, RecordType};
use std::net::IpAddr;

/// UDP answers up to this size, in bytes, are asked for (DNS flag day 2020); a larger one comes truncated and is asked
/// for again by TCP.
pub(super) const UDP_PAYLOAD: u16 = 1232;

/// The three questions that make one reading.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Asked {
    /// A at the service's name.
    V4,
    /// AAAA at the service's name.
    V6,
    /// TXT at the marker's name.
    Marker,
}

impl Asked {
    pub const ALL: [Asked; 3] = [Asked::V4, Asked::V6, Asked::Marker];

    fn kind(self) -> RecordType {
        match self {
            Asked::V4 => RecordType::A,
            Asked::V6 => RecordType::AAAA,
            Asked::Marker => RecordType::TXT,
        }
    }
}

/// A question ready to be sent, and all that is needed to know its answer.
#[derive(Debug, Clone)]
pub struct Question {
    bytes: Vec<u8>,
    id: u16,
    name: Name,
    kind: RecordType,
    signature: Option<(TsigKey, Vec<u8>)>,
}

/// What came back for a question.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// Not an answer to this question: over UDP go on listening.
    Stray,
    /// Too long for UDP: ask by TCP.
    Truncated,
    Facts(Facts),
}

/// What one authoritative answer holds.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Facts {
    pub addresses: Vec<IpAddr>,
    /// Seconds; the smallest of the records asked for.
    pub ttl: u32,
    pub texts: Vec<Text>,
    pub soa_serial: Option<u32>,
    pub strange: Option<String>,
    /// Seconds since 1970, of a verified signature.
    pub signed_time: Option<u64>,
}

impl Question {
    /// RD is clear: an authority is asked what it holds, never for the opinion of others. Signed when there is a key.
    pub fn new(
        names: &ServiceNames,
        asked: Asked,
        id: u16,
        key: Option<&TsigKey>,
        now_s: u64,
    ) -> Result<Question, String> {
        let name = match asked {
            Asked::V4 | Asked::V6 => &names.name,
            Asked::Marker => &names.marker_name,
        };
        let mut message = Message::new(id, MessageType::Query, OpCode::Query);
        message.add_query(Query::query(name.clone(), asked.kind()));
        let mut edns = Edns::new();
        edns.set_max_payload(UDP_PAYLOAD);
        message.set_edns(edns);
        let signature = match key {
            Some(key) => Some((key.clone(), key.sign_request(&mut message, now_s)?)),
            None => None,
        };
        let bytes = message.to_vec().map_err(|error| format!("the question cannot be encoded: {error}"))?;
        Ok(Question { bytes, id, name: name.clone(), kind: asked.kind(), signature })
    }

    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Reads an answer. An `Err` is a sentence that follows the server's name; such an answer counts as silence.
    pub fn read(&self, bytes: &[u8], now_s: u64) -> Result<Answer, String> {
        let Ok(message) = Message::from_vec(bytes) else { return Ok(Answer::Stray) };
        if message.message_type != MessageType::Response || message.id != self.id || message.op_code != OpCode::Query {
            return Ok(Answer::Stray);
        }
        let code = message.response_code;
        let is_error = code != ResponseCode::NoError && code != ResponseCode::NXDomain;
        // A server that could not read the question may leave it out (RFC 1035 section 4.1.1, FORMERR).
        let repeated = match message.queries.as_slice() {
            [] => is_error,
            [one] => one.name() == &self.name && one.query_type() == self.kind && one.query_class() == DNSClass::IN,
            _ => false,
        };
        if !repeated {
            return Ok(Answer::Stray);
        }
        if is_error {
            return Err(refusal(&message, code, &self.name));
        }
        if message.truncation {
            return Ok(Answer::Truncated);
        }
        let signed_time = match &self.signature {
            None => None,
            Some((key, mac)) => {
                let signed = tsig::verify(key, bytes, message.signature(), Some(mac), now_s)
                    .map_err(|fault| format!("its answer does not count, for {fault}"))?;
                Some(signed.time)
            }
        };
        if !message.authoritative {
            return Err(format!("it is no authority for {}; name the zone's own servers", Plain(&self.name)));
        }
        Ok(Answer::Facts(self.facts(&message, signed_time)))
    }

    fn facts(&self, message: &Message, signed_time: Option<u64>) -> Facts {
        let mut facts = Facts { signed_time, ttl: u32::MAX, ..Facts::default() };
        for record in &message.answers {
            if record.name != self.name || record.dns_class != DNSClass::IN {
                continue;
            }
            match &record.data {
                RData::A(a) if self.kind == RecordType::A => facts.addresses.push(IpAddr::V4(a.0)),
                RData::AAAA(aaaa) if self.kind == RecordType::AAAA => facts.addresses.push(IpAddr::V6(aaaa.0)),
                RData::TXT(txt) if self.kind == RecordType::TXT => {
                    facts.texts.push(txt.txt_data.iter().map(|string| string.to_vec()).collect());
                }
                RData::CNAME(target) => {
                    facts.strange = Some(format!("{} is an alias of {}", Plain(&self.name), Plain(&target.0)));
                }
                _ => continue,
            }
            facts.ttl = facts.ttl.min(record.ttl);
        }
        // A negative answer carries the zone's SOA (RFC 2308 section 3).
        facts.soa_serial = message.authorities.iter().find_map(serial);
        facts
    }
}

fn serial(record: &Record) -> Option<u32> {
    match &record.data {
        RData::SOA(soa) => Some(soa.serial),
        _ => None,
    }
}

/// The error code, and the one inside the TSIG record where there is one (RFC 8945 section 5.3.2). It is read before
/// any verification: an answer with BADKEY or BADSIG cannot be signed.
fn refusal(message: &Message, code: ResponseCode, name: &Name) -> String {
    let inner = message.signature().and_then(|record| record.data.error);
    match inner {
        Some(error) => format!("it refused the question for {}: {} ({error:?})", Plain(name), code_name(code)),
        None => format!("it answered {} to the question for {}", code_name(code), Plain(name)),
    }
}

/// The mnemonic of RFC 6895 section 2.3, as `dig` prints it.
pub(super) fn code_name(code: ResponseCode) -> String {
    match code {
        ResponseCode::NoError => "NOERROR".into(),
        ResponseCode::FormErr => "FORMERR".into(),
        ResponseCode::ServFail => "SERVFAIL".into(),
        ResponseCode::NXDomain => "NXDOMAIN".into(),
        ResponseCode::NotImp => "NOTIMP".into(),
        ResponseCode::Refused => "REFUSED".into(),
        ResponseCode::YXDomain => "YXDOMAIN".into(),
        ResponseCode::YXRRSet => "YXRRSET".into(),
        ResponseCode::NXRRSet => "NXRRSET".into(),
        ResponseCode::NotAuth => "NOTAUTH".into(),
        ResponseCode::NotZone => "NOTZONE".into(),
        other => format!("error code {}", u16::from(other)),
    }
}

#[cfg(test)]
mod tests {
    use super::super::Reading;
    use super::*;
    use hickory_proto::rr::rdata::{A, AAAA, CNAME, SOA, TXT};
    use proptest::prelude::*;

    const NOW: u64 = 1_800_000_000;

    fn names() -> ServiceNames {
        ServiceNames::new("example.org", "db.example.org").unwrap()
    }
    fn key() -> TsigKey {
        TsigKey::new("portcullis", "hmac-sha256", "c2VjcmV0").unwrap()
    }
    fn ask(asked: Asked, key: Option<&TsigKey>) -> Question {
        Question::new(&names(), asked, 77, key, NOW).unwrap()
    }
    fn answer(question: &Question, change: impl FnOnce(&mut Message)) -> Vec<u8> {
        let mut message = Message::response(question.id, OpCode::Query);
        message.add_query(Query::query(question.name.clone(), question.kind));
        message.metadata.authoritative = true;
        change(&mut message);
        if let Some((key, mac)) = &question.signature {
            let unsigned = message.to_vec().unwrap();
            let record = tsig::response_signature(key, &unsigned, 77, mac, NOW + 1, None, vec![]).unwrap();
            message.set_signature(record);
        }
        message.to_vec().unwrap()
    }
    fn facts(question: &Question, change: impl FnOnce(&mut Message)) -> Facts {
        match question.read(&answer(question, change), NOW).unwrap() {
            Answer::Facts(facts) => facts,
            other => panic!("{other:?}"),
        }
    }
    fn record(question: &Question, ttl: u32, data: RData) -> Record {
        Record::from_rdata(question.name.clone(), ttl, data)
    }

    #[test]
    fn a_question_asks_for_no_recursion_and_is_signed_with_a_key() {
        let question = ask(Asked::Marker, Some(&key()));
        let sent = Message::from_vec(question.bytes()).unwrap();
        assert!(!sent.recursion_desired);
        assert_eq!(sent.queries[0].name().to_ascii(), "_portcullis.db.example.org.");
        assert_eq!(sent.queries[0].query_type(), RecordType::TXT);
        assert!(tsig::verify(&key(), question.bytes(), sent.signature(), None, NOW).is_ok());
        assert!(Message::from_vec(ask(Asked::V4, None).bytes()).unwrap().signature().is_none());
    }

    #[test]
    fn three_answers_make_a_reading() {
        let questions = Asked::ALL.map(|asked| ask(asked, Some(&key())));
        let [v4, v6, marker] = &questions;
        let reading = Reading::of([
            facts(v4, |m| {
                m.add_answer(record(v4, 5, RData::A(A::new(192, 0, 2, 2))));
                m.add_answer(record(v4, 4, RData::A(A::new(192, 0, 2, 1))));
            }),
            facts(v6, |m| {
                m.add_answer(record(v6, 9, RData::AAAA(AAAA::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1))));
            }),
            facts(marker, |m| {
                m.add_answer(record(marker, 5, RData::TXT(TXT::from_bytes(vec![b"v=1 ", b"epoch=7"]))));
            }),
        ]);
        let texts: Vec<String> = reading.pair.addresses.iter().map(ToString::to_string).collect();
        assert_eq!(texts, ["192.0.2.1", "192.0.2.2", "2001:db8::1"]);
        assert_eq!((reading.pair.ttl, reading.signed_time), (4, Some(NOW + 1)));
        assert_eq!(reading.pair.marker, ["v=1 epoch=7"]);
        assert_eq!(reading.pair.texts(), [vec![b"v=1 ".to_vec(), b"epoch=7".to_vec()]]);
        assert_eq!((reading.soa_serial, reading.strange), (None, None));
    }

    #[test]
    fn no_data_and_no_such_name_are_empty_answers_with_the_serial() {
        let question = ask(Asked::V6, Some(&key()));
        for code in [ResponseCode::NoError, ResponseCode::NXDomain] {
            let facts = facts(&question, |m| {
                m.metadata.response_code = code;
                let soa = SOA::new(names().zone, names().zone, 42, 1, 1, 1, 1);
                m.add_authority(Record::from_rdata(names().zone, 5, RData::SOA(soa)));
            });
            assert_eq!((facts.addresses.len(), facts.soa_serial), (0, Some(42)));
        }
    }

    #[test]
    fn an_alias_is_strange_and_records_of_other_names_are_not_ours() {
        let question = ask(Asked::V4, None);
        let facts = facts(&question, |m| {
            let target = Name::from_ascii("elsewhere.example.net.").unwrap();
            m.add_answer(record(&question, 5, RData::CNAME(CNAME(target.clone()))));
            m.add_answer(Record::from_rdata(target, 5, RData::A(A::new(192, 0, 2, 66))));
        });
        assert_eq!(facts.addresses, [] as [IpAddr; 0]);
        assert_eq!(facts.strange.as_deref(), Some("db.example.org is an alias of elsewhere.example.net"));
    }

    #[test]
    fn an_unsigned_or_badly_signed_answer_to_a_signed_question_is_silence() {
        let signed = ask(Asked::V4, Some(&key()));
        let unsigned = answer(&ask(Asked::V4, None), |_| {});
        assert!(signed.read(&unsigned, NOW).unwrap_err().contains("not signed"));
        let mut forged = signed.clone();
        forged.signature = Some((TsigKey::new("portcullis", "hmac-sha256", "Zm9yZ2Vk").unwrap(), vec![1; 32]));
        assert!(signed.read(&answer(&forged, |_| {}), NOW).unwrap_err().contains("signature is wrong"));
        forged.signature = Some((TsigKey::new("other", "hmac-sha256", "c2VjcmV0").unwrap(), vec![1; 32]));
        assert!(signed.read(&answer(&forged, |_| {}), NOW).unwrap_err().contains("another key"));
        assert!(signed.read(&answer(&signed, |_| {}), NOW + 3600).unwrap_err().contains("differ by 3599 s"));
        let mut bytes = answer(&signed, |m| {
            m.add_answer(record(&signed, 5, RData::A(A::new(192, 0, 2, 1))));
        });
        let place = bytes.windows(4).position(|w| w == [192, 0, 2, 1]).unwrap();
        bytes[place + 3] = 2;
        assert!(signed.read(&bytes, NOW).is_err(), "a changed address must not verify");
    }

    #[test]
    fn what_is_not_an_answer_to_this_question_is_stray() {
        let question = ask(Asked::V4, None);
        let stray = |change: fn(&mut Message)| question.read(&answer(&question, change), NOW);
        assert_eq!(stray(|m| m.metadata.id = 78), Ok(Answer::Stray));
        assert_eq!(stray(|m| m.queries.clear()), Ok(Answer::Stray));
        assert_eq!(stray(|m| m.metadata.message_type = MessageType::Query), Ok(Answer::Stray));
        let other = answer(&ask(Asked::V6, None), |_| {});
        assert_eq!(question.read(&other, NOW), Ok(Answer::Stray));
        assert_eq!(question.read(b"rubbish", NOW), Ok(Answer::Stray));
        assert_eq!(question.read(question.bytes(), NOW), Ok(Answer::Stray));
    }

    #[test]
    fn errors_name_the_code_and_truncation_asks_for_tcp() {
        let question = ask(Asked::V4, None);
        let fail = |code| question.read(&answer(&question, |m| m.metadata.response_code = code), NOW).unwrap_err();
        assert!(fail(ResponseCode::ServFail).contains("SERVFAIL"));
        assert!(fail(ResponseCode::Refused).contains("REFUSED"));
        assert_eq!(question.read(&answer(&question, |m| m.metadata.truncation = true), NOW), Ok(Answer::Truncated));
        let lame = question.read(&answer(&question, |m| m.metadata.authoritative = false), NOW);
        assert!(lame.unwrap_err().contains("no authority"));
        let bare = answer(&question, |m| {
            m.queries.clear();
            m.metadata.response_code = ResponseCode::FormErr;
        });
        assert!(question.read(&bare, NOW).unwrap_err().contains("FORMERR"));
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(
            bytes in proptest::collection::vec(any::<u8>(), 0..300),
            cut in 0usize..400,
            at in 0usize..400,
            with: u8,
        ) {
            let question = ask(Asked::Marker, Some(&key()));
            let _ = question.read(&bytes, NOW);
            let mut real = answer(&question, |m| {
                m.add_answer(record(&question, 5, RData::TXT(TXT::from_bytes(vec![b"v=1"]))));
            });
            if let Some(byte) = real.get_mut(at) {
                *byte = with;
            }
            real.truncate(real.len().max(cut));
            let _ = question.read(&real, NOW);
        }
    }
}
