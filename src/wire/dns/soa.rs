//! The question for a zone's own head (SOA), by which `doctor` sees whether a server is an authority at all.

use super::question::code_name;
use super::{Plain, ServiceNames, TsigKey, tsig};
use hickory_proto::op::{Edns, Message, MessageType, OpCode, Query, ResponseCode};
use hickory_proto::rr::{Name, RData, RecordType};

/// What the head of a zone says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ZoneHead {
    /// The server that takes updates, by its name.
    pub primary: String,
    pub serial: u32,
}

/// A question ready to be sent by TCP.
#[derive(Debug, Clone)]
pub struct HeadQuestion {
    bytes: Vec<u8>,
    id: u16,
    zone: Name,
    signature: Option<(TsigKey, Vec<u8>)>,
}

impl HeadQuestion {
    /// Signed when there is a key.
    ///
    /// # Errors
    /// It cannot be encoded.
    pub fn new(names: &ServiceNames, id: u16, key: Option<&TsigKey>, now_s: u64) -> Result<HeadQuestion, String> {
        let mut message = Message::new(id, MessageType::Query, OpCode::Query);
        message.add_query(Query::query(names.zone.clone(), RecordType::SOA));
        message.set_edns(Edns::new());
        let signature = match key {
            Some(key) => Some((key.clone(), key.sign_request(&mut message, now_s)?)),
            None => None,
        };
        let bytes = message.to_vec().map_err(|error| format!("the question cannot be encoded: {error}"))?;
        Ok(HeadQuestion { bytes, id, zone: names.zone.clone(), signature })
    }

    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Reads the answer.
    ///
    /// # Errors
    /// A sentence that follows the server's name.
    pub fn read(&self, bytes: &[u8], now_s: u64) -> Result<ZoneHead, String> {
        let zone = Plain(&self.zone);
        let message = Message::from_vec(bytes).map_err(|_| format!("its answer for zone {zone} cannot be read"))?;
        if message.message_type != MessageType::Response || message.id != self.id {
            return Err(format!("its answer is none to the question for zone {zone}"));
        }
        if message.response_code != ResponseCode::NoError {
            return Err(format!("it answered {} to the question for zone {zone}", code_name(message.response_code)));
        }
        if let Some((key, mac)) = &self.signature {
            tsig::verify(key, bytes, message.signature(), Some(mac), now_s)
                .map_err(|fault| format!("its answer for zone {zone} does not count, for {fault}"))?;
        }
        if !message.authoritative {
            return Err(format!("it is no authority for zone {zone}"));
        }
        let head = message.answers.iter().find_map(|record| match &record.data {
            RData::SOA(soa) if record.name == self.zone => {
                Some(ZoneHead { primary: Plain(&soa.mname).to_string(), serial: soa.serial })
            }
            _ => None,
        });
        head.ok_or_else(|| format!("it has no zone {zone}; dns.zone must be the zone's own name"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hickory_proto::rr::Record;
    use hickory_proto::rr::rdata::SOA;

    fn answer(change: impl Fn(&mut Message)) -> Result<ZoneHead, String> {
        let names = ServiceNames::new("example.org", "db.example.org").expect("names");
        let question = HeadQuestion::new(&names, 7, None, 0).expect("encodes");
        let mut message = Message::new(7, MessageType::Response, OpCode::Query);
        message.metadata.authoritative = true;
        let ns = Name::from_ascii("ns.example.org.").expect("a name");
        let soa = SOA::new(ns.clone(), ns, 42, 1, 1, 1, 1);
        message.add_answer(Record::from_rdata(names.zone.clone(), 5, RData::SOA(soa)));
        change(&mut message);
        question.read(&message.to_vec().expect("encodes"), 0)
    }

    #[test]
    fn an_authority_is_told_from_all_else() {
        assert_eq!(answer(|_| {}), Ok(ZoneHead { primary: "ns.example.org".into(), serial: 42 }));
        let why = answer(|message| message.metadata.authoritative = false).expect_err("a resolver");
        assert!(why.contains("no authority for zone example.org"), "{why}");
        let why = answer(|message| message.metadata.response_code = ResponseCode::Refused).expect_err("refused");
        assert!(why.contains("REFUSED"), "{why}");
        let why = answer(|message| message.answers.clear()).expect_err("no SOA");
        assert!(why.contains("has no zone"), "{why}");
        assert!(answer(|message| message.metadata.id = 8).is_err());
    }
}
