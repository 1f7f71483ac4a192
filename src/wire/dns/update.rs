//! The RFC 2136 update: a compare-and-swap of both record sets of the service, and the judgement of its answer.

use super::question::code_name;
use super::{Plain, RecordPair, ServiceNames, Text, TsigFault, TsigKey, split_text, tsig};
use hickory_proto::op::{Message, MessageType, OpCode, Query, ResponseCode};
use hickory_proto::rr::rdata::tsig::TsigError;
use hickory_proto::rr::rdata::{A, AAAA, TXT};
use hickory_proto::rr::{DNSClass, Name, RData, Record, RecordType};
use std::net::IpAddr;

/// How an update ended. Only the first two say what the server did; `Refused` and `NotSent` say that it surely did
/// nothing; after `Unknown` it may have landed or land yet, which another update settles (rule R2), never a reading.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum UpdateOutcome {
    /// Verified NOERROR: it stands.
    Done,
    /// Verified refusal of a prerequisite: the records were not as they were read.
    Conflict,
    /// The server turned it away as a whole; a sentence with the remedy.
    Refused(String),
    /// No connection: not a byte of it left this machine.
    NotSent(String),
    /// No answer, or none that can be believed.
    Unknown(String),
}

/// An update ready to be sent, once.
#[derive(Debug, Clone)]
pub struct Update {
    bytes: Vec<u8>,
    id: u16,
    zone: Name,
    key: TsigKey,
    mac: Vec<u8>,
}

impl Update {
    /// Swaps both record sets for `addresses` and `marker` (both with `ttl`, in seconds) if they still are
    /// `prerequisite`.
    ///
    /// The prerequisites hold every record of A, AAAA and TXT as read ("RRset exists, value dependent", RFC 2136
    /// section 2.4.2), and "RRset does not exist" (2.4.3) for a type that was empty. The update deletes the three
    /// RRsets and adds the new ones whole.
    pub fn new(
        names: &ServiceNames,
        prerequisite: &RecordPair,
        (addresses, ttl, marker): (&[IpAddr], u32, &str),
        id: u16,
        key: &TsigKey,
        now_s: u64,
    ) -> Result<Update, String> {
        let mut message = Message::new(id, MessageType::Query, OpCode::Update);
        message.add_query(Query::query(names.zone.clone(), RecordType::SOA));
        let asked = sets(names, &prerequisite.addresses, prerequisite.texts());
        for (name, kind, data) in &asked {
            if data.is_empty() {
                message.add_answer(empty(name, *kind, DNSClass::NONE));
            }
            for one in data {
                message.add_answer(Record::from_rdata((*name).clone(), 0, one.clone()));
            }
        }
        let wanted = sets(names, addresses, &[split_text(marker)]);
        for (name, kind, data) in &wanted {
            message.add_authority(empty(name, *kind, DNSClass::ANY));
            for one in data {
                message.add_authority(Record::from_rdata((*name).clone(), ttl, one.clone()));
            }
        }
        let mac = key.sign_request(&mut message, now_s)?;
        let bytes = message.to_vec().map_err(|error| format!("the update cannot be encoded: {error}"))?;
        Ok(Update { bytes, id, zone: names.zone.clone(), key: key.clone(), mac })
    }

    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Judges the answer. The codes are looked at before the signature, because a refusal for the key cannot be signed;
    /// but success and conflict are believed only when verified.
    pub fn judge(&self, bytes: &[u8], now_s: u64) -> UpdateOutcome {
        use ResponseCode as Code;
        let Ok(message) = Message::from_vec(bytes) else {
            return UpdateOutcome::Unknown("the answer to the update cannot be read; run it again".into());
        };
        if message.message_type != MessageType::Response || message.id != self.id || message.op_code != OpCode::Update {
            return UpdateOutcome::Unknown("the answer is not one to the update; run it again".into());
        }
        let code = message.response_code;
        let verified = tsig::verify(&self.key, bytes, message.signature(), Some(&self.mac), now_s);
        match code {
            Code::NoError | Code::YXDomain | Code::NXDomain | Code::YXRRSet | Code::NXRRSet => match verified {
                Ok(_) if code == Code::NoError => UpdateOutcome::Done,
                Ok(_) => UpdateOutcome::Conflict,
                Err(fault) => UpdateOutcome::Unknown(unverified(code, &fault)),
            },
            Code::Refused | Code::NotAuth | Code::NotZone | Code::FormErr | Code::NotImp => {
                let inner = message.signature().and_then(|record| record.data.error);
                let server_time = message.signature().and_then(|record| server_time(&record.data.other));
                UpdateOutcome::Refused(self.refusal(code, inner, server_time, now_s))
            }
            // SERVFAIL may come after the journal was written (BIND), and so may whatever else there is.
            other => {
                UpdateOutcome::Unknown(format!("the server answered {} to the update; run it again", code_name(other)))
            }
        }
    }

    fn refusal(&self, code: ResponseCode, inner: Option<TsigError>, server_s: Option<u64>, now_s: u64) -> String {
        let (zone, key) = (Plain(&self.zone), Plain(self.key.name()));
        match (inner, code) {
            (Some(TsigError::BadKey), _) => format!(
                "the server does not know the TSIG key {key} ({}); compare dns.tsig_name and \
                 dns.tsig_algorithm with its configuration",
                self.key.algorithm()
            ),
            (Some(TsigError::BadSig), _) => format!(
                "the server finds the signature with TSIG key {key} wrong (BADSIG); compare the secret in \
                 dns.tsig_key_file with its own"
            ),
            (Some(TsigError::BadTime), _) => match server_s {
                Some(server_s) => format!(
                    "the server's clock and ours differ by {} s (BADTIME); set both clocks",
                    server_s.abs_diff(now_s)
                ),
                None => "the server's clock and ours differ too much (BADTIME); set both clocks".into(),
            },
            (_, ResponseCode::NotAuth) => {
                format!(
                    "the server is not the primary of zone {zone} (NOTAUTH); put the server that takes updates \
                     first in dns.servers"
                )
            }
            (_, ResponseCode::Refused) => {
                format!("the server refused the update (REFUSED); allow TSIG key {key} to update zone {zone} there")
            }
            (_, other) => format!(
                "the server does not take the update of zone {zone} ({}); compare dns.zone with its configuration",
                code_name(other)
            ),
        }
    }
}

fn unverified(code: ResponseCode, fault: &TsigFault) -> String {
    format!("the server answered {} to the update, but it does not count, for {fault}; run it again", code_name(code))
}

/// The server's time in a BADTIME answer: 48 bits (RFC 8945 section 5.2.3).
fn server_time(other: &[u8]) -> Option<u64> {
    (other.len() == 6).then(|| other.iter().fold(0, |time, byte| time << 8 | u64::from(*byte)))
}

/// The three RRsets of a service.
fn sets<'a>(names: &'a ServiceNames, addresses: &[IpAddr], texts: &[Text]) -> [(&'a Name, RecordType, Vec<RData>); 3] {
    let (mut v4, mut v6) = (Vec::new(), Vec::new());
    for address in addresses {
        match address {
            IpAddr::V4(a) => v4.push(RData::A(A(*a))),
            IpAddr::V6(a) => v6.push(RData::AAAA(AAAA(*a))),
        }
    }
    let txt = |text: &Text| RData::TXT(TXT::from_bytes(text.iter().map(Vec::as_slice).collect()));
    [
        (&names.name, RecordType::A, v4),
        (&names.name, RecordType::AAAA, v6),
        (&names.marker_name, RecordType::TXT, texts.iter().map(txt).collect()),
    ]
}

/// A record without data: with class NONE a prerequisite, with class ANY a deletion.
fn empty(name: &Name, kind: RecordType, class: DNSClass) -> Record {
    let mut record = Record::update0(name.clone(), 0, kind);
    record.dns_class = class;
    record
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: u64 = 1_800_000_000;

    fn key() -> TsigKey {
        TsigKey::new("portcullis", "hmac-sha256", "c2VjcmV0").unwrap()
    }
    fn update(prerequisite: &RecordPair) -> Update {
        let names = ServiceNames::new("example.org", "db.example.org").unwrap();
        let addresses = ["192.0.2.12".parse().unwrap()];
        Update::new(&names, prerequisite, (&addresses, 5, "v=1 epoch=8"), 9, &key(), NOW).unwrap()
    }
    fn shown(records: &[Record]) -> Vec<String> {
        records.iter().map(|r| format!("{} {} {} {} {}", r.name, r.ttl, r.dns_class, r.record_type(), r.data)).collect()
    }

    #[test]
    fn prerequisites_are_both_record_sets_exactly_as_read() {
        let read = RecordPair::new(
            vec!["192.0.2.2".parse().unwrap(), "192.0.2.1".parse().unwrap()],
            60,
            vec![vec![b"v=1".to_vec(), b" epoch=7".to_vec()]],
        );
        let sent = Message::from_vec(update(&read).bytes()).unwrap();
        assert_eq!(sent.op_code, OpCode::Update);
        assert_eq!(
            (sent.queries[0].name().to_ascii(), sent.queries[0].query_type()),
            ("example.org.".into(), RecordType::SOA)
        );
        assert_eq!(
            shown(&sent.answers),
            [
                "db.example.org. 0 IN A 192.0.2.1",
                "db.example.org. 0 IN A 192.0.2.2",
                "db.example.org. 0 NONE AAAA UPDATE",
                "_portcullis.db.example.org. 0 IN TXT v=1 epoch=7",
            ]
        );
        let RData::TXT(txt) = &sent.answers[3].data else { panic!() };
        assert_eq!(txt.txt_data.len(), 2, "two character-strings stay two");
        assert_eq!(
            shown(&sent.authorities),
            [
                "db.example.org. 0 ANY A UPDATE",
                "db.example.org. 5 IN A 192.0.2.12",
                "db.example.org. 0 ANY AAAA UPDATE",
                "_portcullis.db.example.org. 0 ANY TXT UPDATE",
                "_portcullis.db.example.org. 5 IN TXT v=1 epoch=8",
            ]
        );
        assert!(tsig::verify(&key(), update(&read).bytes(), sent.signature(), None, NOW).is_ok());
    }

    #[test]
    fn where_nothing_was_read_nothing_may_exist() {
        let sent = Message::from_vec(update(&RecordPair::default()).bytes()).unwrap();
        assert_eq!(
            shown(&sent.answers),
            [
                "db.example.org. 0 NONE A UPDATE",
                "db.example.org. 0 NONE AAAA UPDATE",
                "_portcullis.db.example.org. 0 NONE TXT UPDATE",
            ]
        );
    }

    fn answer(update: &Update, code: ResponseCode, signed: bool, error: Option<TsigError>) -> Vec<u8> {
        let mut message = Message::response(update.id, OpCode::Update);
        message.metadata.response_code = code;
        if signed {
            let unsigned = message.to_vec().unwrap();
            let other = if error == Some(TsigError::BadTime) { vec![0, 0, 0, 0, 0, 9] } else { vec![] };
            let record = tsig::response_signature(&update.key, &unsigned, update.id, &update.mac, NOW, error, other);
            message.set_signature(record.unwrap());
        }
        message.to_vec().unwrap()
    }

    #[test]
    fn success_and_conflict_are_believed_only_when_verified() {
        let update = update(&RecordPair::default());
        let conflicts = [ResponseCode::YXDomain, ResponseCode::NXDomain, ResponseCode::YXRRSet, ResponseCode::NXRRSet];
        assert_eq!(update.judge(&answer(&update, ResponseCode::NoError, true, None), NOW), UpdateOutcome::Done);
        for code in conflicts {
            assert_eq!(update.judge(&answer(&update, code, true, None), NOW), UpdateOutcome::Conflict);
        }
        for code in conflicts.into_iter().chain([ResponseCode::NoError]) {
            let outcome = update.judge(&answer(&update, code, false, None), NOW);
            assert!(matches!(&outcome, UpdateOutcome::Unknown(s) if s.contains("not signed")), "{outcome:?}");
            let mut forged = update.clone();
            forged.mac[0] ^= 1;
            let outcome = update.judge(&answer(&forged, code, true, None), NOW);
            assert!(matches!(&outcome, UpdateOutcome::Unknown(s) if s.contains("wrong")), "{outcome:?}");
        }
    }

    #[test]
    fn a_refusal_names_its_remedy_signed_or_not() {
        let update = update(&RecordPair::default());
        for signed in [true, false] {
            for (code, word) in [
                (ResponseCode::Refused, "allow TSIG key portcullis to update zone example.org"),
                (ResponseCode::NotAuth, "not the primary of zone example.org"),
                (ResponseCode::NotZone, "NOTZONE"),
                (ResponseCode::FormErr, "FORMERR"),
                (ResponseCode::NotImp, "NOTIMP"),
            ] {
                let outcome = update.judge(&answer(&update, code, signed, None), NOW);
                assert!(matches!(&outcome, UpdateOutcome::Refused(s) if s.contains(word)), "{outcome:?}");
            }
        }
        for (error, word) in [
            (TsigError::BadKey, "does not know the TSIG key portcullis (hmac-sha256)"),
            (TsigError::BadSig, "compare the secret"),
            (TsigError::BadTime, "differ by 1799999991 s"),
        ] {
            let outcome = update.judge(&answer(&update, ResponseCode::NotAuth, true, Some(error)), NOW);
            assert!(matches!(&outcome, UpdateOutcome::Refused(s) if s.contains(word)), "{outcome:?}");
        }
    }

    #[test]
    fn anything_else_leaves_it_unknown() {
        let update = update(&RecordPair::default());
        let servfail = update.judge(&answer(&update, ResponseCode::ServFail, true, None), NOW);
        assert!(matches!(&servfail, UpdateOutcome::Unknown(s) if s.contains("SERVFAIL")));
        let mut other = update.clone();
        other.id = 10;
        assert!(matches!(
            update.judge(&answer(&other, ResponseCode::NoError, true, None), NOW),
            UpdateOutcome::Unknown(_)
        ));
        assert!(matches!(update.judge(b"", NOW), UpdateOutcome::Unknown(_)));
        assert!(matches!(update.judge(update.bytes(), NOW), UpdateOutcome::Unknown(_)));
    }
}
