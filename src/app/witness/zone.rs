//! The zone of the embedded witness as a value: what it holds, what a question finds, what an UPDATE makes of it.
//!
//! It is pure: no lock, no file, no clock. Atomicity is the caller's (`super::responder`): an update makes a *new*
//! zone, so that readers see the old one or the new one, never something between.
//!
//! It is NOT a general zone: it takes addresses and text by update and nothing else, so that there are no aliases,
//! delegations, wildcards or signatures to get wrong. SOA and NS stand at the apex from the start and stay.
//!
//! **Invariants:** the apex has exactly one SOA and an NS; each change raises the serial; an update is taken whole or
//! not at all.

use hickory_server::proto::op::ResponseCode;
use hickory_server::proto::rr::rdata::{A, AAAA, NS, SOA};
use hickory_server::proto::rr::{DNSClass, Name, RData, Record, RecordType};
use std::collections::BTreeMap;
use std::net::IpAddr;

/// Most records the zone takes; an update that would go beyond is REFUSED.
const MAX_RECORDS: usize = 1000;

/// Largest TTL (RFC 2181 section 8), in seconds; an update with a larger one is a FORMERR.
const MAX_TTL: u32 = 0x7fff_ffff;

/// SOA timers, in seconds. There are no secondaries, so only the minimum (the negative TTL) matters.
const REFRESH_S: i32 = 3600;
const RETRY_S: i32 = 600;
const EXPIRE_S: i32 = 604_800;

/// All records of one name and type (RFC 2181 section 5): one TTL, no data twice.
#[derive(Debug, Clone, PartialEq, Eq)]
struct RrSet {
    ttl: u32,
    data: Vec<RData>,
}

/// The zone. Names compare without regard to case.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Zone {
    origin: Name,
    names: BTreeMap<Name, BTreeMap<u16, RrSet>>,
}

/// What a question finds.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Found {
    Records(Vec<Record>),
    /// The name is there (or one below it), but nothing of the type.
    NoData,
    NoName,
}

impl Zone {
    /// A zone with its SOA and NS and nothing else. Serial 1.
    pub(super) fn new(origin: Name, ns: Name, ttl: u32) -> Zone {
        let mut zone = Zone { origin: origin.clone(), names: BTreeMap::new() };
        let mailbox = origin.prepend_label("hostmaster").unwrap_or_else(|_| origin.clone());
        let soa = SOA::new(ns.clone(), mailbox, 1, REFRESH_S, RETRY_S, EXPIRE_S, ttl);
        zone.add(&origin, ttl, RData::SOA(soa));
        zone.add(&origin, ttl, RData::NS(NS(ns)));
        zone
    }

    /// From stored records; an error says what is missing.
    pub(super) fn from_records(origin: Name, records: Vec<Record>) -> Result<Zone, String> {
        let mut zone = Zone { origin, names: BTreeMap::new() };
        for record in records {
            if !zone.origin.zone_of(&record.name) {
                return Err(format!("{} is not in the zone", record.name));
            }
            zone.add(&record.name, record.ttl, record.data);
        }
        let of = |kind| zone.set(&zone.origin, kind).map_or(0, |set| set.data.len());
        if of(RecordType::SOA) != 1 || of(RecordType::NS) == 0 {
            return Err("its SOA or NS is missing".into());
        }
        Ok(zone)
    }

    pub(super) fn origin(&self) -> &Name {
        &self.origin
    }

    /// Puts an address in, as the first content of a new zone.
    pub(super) fn add_address(&mut self, name: &Name, ttl: u32, address: IpAddr) {
        let data = match address {
            IpAddr::V4(a) => RData::A(A(a)),
            IpAddr::V6(a) => RData::AAAA(AAAA(a)),
        };
        self.add(name, ttl, data);
    }

    /// All records, the SOA among them.
    pub(super) fn records(&self) -> Vec<Record> {
        let sets = self.names.iter().flat_map(|(name, sets)| sets.values().map(move |set| (name, set)));
        sets.flat_map(|(name, set)| set.records(name)).collect()
    }

    /// The SOA record, for negative answers (RFC 2308 section 3).
    pub(super) fn soa(&self) -> Vec<Record> {
        self.set(&self.origin, RecordType::SOA).map(|set| set.records(&self.origin)).unwrap_or_default()
    }

    pub(super) fn serial(&self) -> u32 {
        match self.set(&self.origin, RecordType::SOA).and_then(|set| set.data.first()) {
            Some(RData::SOA(soa)) => soa.serial,
            _ => 0,
        }
    }

    /// What is at `name` of `kind` (ANY: everything). No wildcards, no aliases.
    pub(super) fn find(&self, name: &Name, kind: RecordType) -> Found {
        let Some(sets) = self.names.get(name) else {
            let below = self.names.keys().any(|other| name.zone_of(other));
            return if below { Found::NoData } else { Found::NoName };
        };
        let wanted = |of: &u16| kind == RecordType::ANY || *of == u16::from(kind);
        let found: Vec<Record> =
            sets.iter().filter(|(of, _)| wanted(of)).flat_map(|(_, set)| set.records(name)).collect();
        if found.is_empty() { Found::NoData } else { Found::Records(found) }
    }

    /// RFC 2136 section 3.2: do the prerequisites hold? RRsets are compared whole (3.2.5).
    pub(super) fn check(&self, prerequisites: &[Record]) -> Result<(), ResponseCode> {
        let mut whole: BTreeMap<(Name, u16), Vec<&RData>> = BTreeMap::new();
        for record in prerequisites {
            let (kind, bare) = (record.record_type(), matches!(record.data, RData::Update0(_)));
            if record.ttl != 0 {
                return Err(ResponseCode::FormErr);
            }
            if !self.origin.zone_of(&record.name) {
                return Err(ResponseCode::NotZone);
            }
            let in_use = self.names.contains_key(&record.name);
            let exists = self.set(&record.name, kind).is_some();
            match (record.dns_class, kind) {
                (DNSClass::ANY | DNSClass::NONE, _) if !bare => return Err(ResponseCode::FormErr),
                (DNSClass::ANY, RecordType::ANY) if !in_use => return Err(ResponseCode::NXDomain),
                (DNSClass::NONE, RecordType::ANY) if in_use => return Err(ResponseCode::YXDomain),
                (DNSClass::ANY | DNSClass::NONE, RecordType::ANY) => {}
                (DNSClass::ANY, _) if !exists => return Err(ResponseCode::NXRRSet),
                (DNSClass::NONE, _) if exists => return Err(ResponseCode::YXRRSet),
                (DNSClass::ANY | DNSClass::NONE, _) => {}
                (DNSClass::IN, _) if !bare => {
                    let data = whole.entry((record.name.clone(), u16::from(kind))).or_default();
                    if !data.contains(&&record.data) {
                        data.push(&record.data);
                    }
                }
                _ => return Err(ResponseCode::FormErr),
            }
        }
        for ((name, kind), data) in whole {
            let same = self
                .set(&name, RecordType::from(kind))
                .is_some_and(|set| set.data.len() == data.len() && set.data.iter().all(|one| data.contains(&one)));
            if !same {
                return Err(ResponseCode::NXRRSet);
            }
        }
        Ok(())
    }

    /// RFC 2136 section 3.4: the zone after the update, or `None` when it changes nothing.
    pub(super) fn updated(&self, updates: &[Record]) -> Result<Option<Zone>, ResponseCode> {
        for record in updates {
            self.prescan(record)?;
        }
        let mut next = self.clone();
        for record in updates {
            next.apply(record);
        }
        if next == *self {
            return Ok(None);
        }
        if next.names.values().flat_map(BTreeMap::values).map(|set| set.data.len()).sum::<usize>() > MAX_RECORDS {
            return Err(ResponseCode::Refused);
        }
        next.raise_serial();
        Ok(Some(next))
    }

    /// RFC 2136 section 3.4.1, and what this zone does not take: other types than addresses and text, and wildcards.
    fn prescan(&self, record: &Record) -> Result<(), ResponseCode> {
        let (kind, bare) = (record.record_type(), matches!(record.data, RData::Update0(_)));
        // 128 to 255 are question and meta types (RFC 6895 section 3.1); OPT is one too.
        let meta = matches!(u16::from(kind), 128..=255) || kind == RecordType::OPT;
        if !self.origin.zone_of(&record.name) {
            return Err(ResponseCode::NotZone);
        }
        match record.dns_class {
            DNSClass::IN if bare || meta || record.ttl > MAX_TTL => Err(ResponseCode::FormErr),
            DNSClass::IN => {
                let taken = matches!(kind, RecordType::A | RecordType::AAAA | RecordType::TXT);
                let wildcard = record.name.iter().any(|label| label == b"*");
                if taken && !wildcard { Ok(()) } else { Err(ResponseCode::Refused) }
            }
            DNSClass::ANY if record.ttl == 0 && bare && (!meta || kind == RecordType::ANY) => Ok(()),
            DNSClass::NONE if record.ttl == 0 && !bare && !meta => Ok(()),
            _ => Err(ResponseCode::FormErr),
        }
    }

    /// RFC 2136 section 3.4.2: one record, after the prescan.
    fn apply(&mut self, record: &Record) {
        let kind = record.record_type();
        // SOA and NS of the apex stay whatever is asked (3.4.2.3 and 3.4.2.4).
        let at_apex = record.name == self.origin;
        let kept = |kind: u16| at_apex && matches!(RecordType::from(kind), RecordType::SOA | RecordType::NS);
        match record.dns_class {
            DNSClass::IN => self.add(&record.name, record.ttl, record.data.clone()),
            _ if !self.names.contains_key(&record.name) => {}
            class => {
                let sets = self.names.entry(record.name.clone()).or_default();
                if class == DNSClass::ANY {
                    sets.retain(|of, _| kept(*of) || (kind != RecordType::ANY && *of != u16::from(kind)));
                } else if !kept(u16::from(kind)) {
                    if let Some(set) = sets.get_mut(&u16::from(kind)) {
                        set.data.retain(|data| *data != record.data);
                    }
                    sets.retain(|_, set| !set.data.is_empty());
                }
                if sets.is_empty() {
                    self.names.remove(&record.name);
                }
            }
        }
    }

    /// Adds to a set; the set takes the TTL of what was added last.
    fn add(&mut self, name: &Name, ttl: u32, data: RData) {
        let sets = self.names.entry(name.to_lowercase()).or_default();
        let set = sets.entry(u16::from(data.record_type())).or_insert(RrSet { ttl, data: Vec::new() });
        set.ttl = ttl;
        if !set.data.contains(&data) {
            set.data.push(data);
        }
    }

    fn set(&self, name: &Name, kind: RecordType) -> Option<&RrSet> {
        self.names.get(name)?.get(&u16::from(kind))
    }

    /// RFC 1982: around the circle, without zero (which some take for "unset").
    fn raise_serial(&mut self) {
        let sets = self.names.entry(self.origin.clone()).or_default();
        if let Some(RData::SOA(soa)) = sets.get_mut(&u16::from(RecordType::SOA)).and_then(|set| set.data.first_mut()) {
            soa.serial = soa.serial.wrapping_add(1).max(1);
        }
    }
}

impl RrSet {
    fn records(&self, name: &Name) -> Vec<Record> {
        self.data.iter().map(|data| Record::from_rdata(name.clone(), self.ttl, data.clone())).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hickory_server::proto::rr::rdata::{CNAME, TXT};

    fn name(text: &str) -> Name {
        Name::from_ascii(text).unwrap()
    }
    fn a(last: u8) -> RData {
        RData::A(A::new(192, 0, 2, last))
    }
    fn record(at: &str, ttl: u32, class: DNSClass, data: RData) -> Record {
        let mut record = Record::from_rdata(name(at), ttl, data);
        record.dns_class = class;
        record
    }
    fn bare(at: &str, class: DNSClass, kind: RecordType) -> Record {
        record(at, 0, class, RData::Update0(kind))
    }
    const DB: &str = "db.example.org.";

    /// `db` with two addresses.
    fn zone() -> Zone {
        let mut zone = Zone::new(name("example.org."), name("ns.example.org."), 5);
        zone.add_address(&name(DB), 5, "192.0.2.1".parse().unwrap());
        zone.add_address(&name(DB), 5, "192.0.2.2".parse().unwrap());
        zone
    }

    #[test]
    fn prerequisites_compare_whole_sets() {
        let zone = zone();
        let both = [record(DB, 0, DNSClass::IN, a(2)), record("DB.Example.ORG.", 0, DNSClass::IN, a(1))];
        assert_eq!(zone.check(&both), Ok(()));
        assert_eq!(zone.check(&both[..1]), Err(ResponseCode::NXRRSet), "a part is not the whole");
        let more = [both[0].clone(), both[1].clone(), record(DB, 0, DNSClass::IN, a(3))];
        assert_eq!(zone.check(&more), Err(ResponseCode::NXRRSet));
        let twice = [both[0].clone(), both[0].clone()];
        assert_eq!(zone.check(&twice), Err(ResponseCode::NXRRSet), "one said twice is one");
        assert_eq!(zone.check(&[both[0].clone(), both[0].clone(), both[1].clone()]), Ok(()));
        let elsewhere = [record("other.example.org.", 0, DNSClass::IN, a(1))];
        assert_eq!(zone.check(&elsewhere), Err(ResponseCode::NXRRSet));
    }

    #[test]
    fn each_kind_of_prerequisite_answers_as_rfc_2136_says() {
        use DNSClass as Class;
        use ResponseCode as Code;
        for (record, expected) in [
            (bare(DB, Class::ANY, RecordType::ANY), Ok(())),
            (bare("no.example.org.", Class::ANY, RecordType::ANY), Err(Code::NXDomain)),
            (bare(DB, Class::NONE, RecordType::ANY), Err(Code::YXDomain)),
            (bare("no.example.org.", Class::NONE, RecordType::ANY), Ok(())),
            (bare(DB, Class::ANY, RecordType::A), Ok(())),
            (bare(DB, Class::ANY, RecordType::AAAA), Err(Code::NXRRSet)),
            (bare(DB, Class::NONE, RecordType::A), Err(Code::YXRRSet)),
            (bare(DB, Class::NONE, RecordType::AAAA), Ok(())),
            (bare("db.example.net.", Class::NONE, RecordType::A), Err(Code::NotZone)),
            (record(DB, 5, Class::IN, a(1)), Err(Code::FormErr)),
            (record(DB, 0, Class::ANY, a(1)), Err(Code::FormErr)),
            (record(DB, 0, Class::NONE, a(1)), Err(Code::FormErr)),
            (record(DB, 0, Class::CH, a(1)), Err(Code::FormErr)),
            (bare(DB, Class::IN, RecordType::A), Err(Code::FormErr)),
        ] {
            assert_eq!(zone().check(std::slice::from_ref(&record)), expected, "{record}");
        }
    }

    #[test]
    fn a_change_raises_the_serial_and_none_does_not() {
        let zone = zone();
        let update = [
            bare(DB, DNSClass::ANY, RecordType::A),
            record(DB, 9, DNSClass::IN, a(7)),
            record("new.example.org.", 5, DNSClass::IN, RData::TXT(TXT::from_bytes(vec![b"x"]))),
        ];
        let next = zone.updated(&update).unwrap().expect("a change");
        assert_eq!((zone.serial(), next.serial()), (1, 2));
        assert_eq!(
            next.find(&name("DB.example.org."), RecordType::A),
            Found::Records(vec![record(DB, 9, DNSClass::IN, a(7))])
        );
        assert!(matches!(next.find(&name("new.example.org."), RecordType::TXT), Found::Records(_)));
        assert_eq!(next.updated(&update), Ok(None));
        let mut last = zone;
        let Some(RData::SOA(soa)) =
            last.names.get_mut(&name("example.org.")).unwrap().get_mut(&6).unwrap().data.first_mut()
        else {
            panic!()
        };
        soa.serial = u32::MAX;
        assert_eq!(last.updated(&update).unwrap().unwrap().serial(), 1);
    }

    #[test]
    fn deletions_take_what_they_name() {
        let zone = zone();
        let gone = |update: Record| zone.updated(&[update]).unwrap().map(|zone| zone.find(&name(DB), RecordType::A));
        let left = Found::Records(vec![record(DB, 5, DNSClass::IN, a(2))]);
        assert_eq!(gone(record(DB, 0, DNSClass::NONE, a(1))), Some(left));
        assert_eq!(gone(record(DB, 0, DNSClass::NONE, a(9))), None);
        assert_eq!(gone(bare(DB, DNSClass::ANY, RecordType::A)), Some(Found::NoName));
        assert_eq!(gone(bare(DB, DNSClass::ANY, RecordType::ANY)), Some(Found::NoName));
        assert_eq!(gone(bare(DB, DNSClass::ANY, RecordType::AAAA)), None);
        assert_eq!(gone(bare("no.example.org.", DNSClass::ANY, RecordType::ANY)), None);
    }

    #[test]
    fn the_apex_keeps_its_soa_and_ns() {
        let mut zone = zone();
        zone.add_address(&name("example.org."), 5, "192.0.2.9".parse().unwrap());
        let (soa, ns) = (zone.soa().remove(0), RData::NS(NS(name("ns.example.org."))));
        for wipe in [
            bare("example.org.", DNSClass::ANY, RecordType::SOA),
            bare("example.org.", DNSClass::ANY, RecordType::NS),
            record("example.org.", 0, DNSClass::NONE, soa.data.clone()),
            record("example.org.", 0, DNSClass::NONE, ns.clone()),
        ] {
            assert_eq!(zone.updated(&[wipe]), Ok(None));
        }
        let wiped = zone.updated(&[bare("example.org.", DNSClass::ANY, RecordType::ANY)]).unwrap().unwrap();
        let kinds: Vec<_> =
            wiped.records().iter().filter(|r| r.name == name("example.org.")).map(Record::record_type).collect();
        assert_eq!(kinds, [RecordType::NS, RecordType::SOA], "the address is gone, they stay");
        for add in [soa.data, ns] {
            let add = record("example.org.", 5, DNSClass::IN, add);
            assert_eq!(zone.updated(&[add]), Err(ResponseCode::Refused));
        }
    }

    #[test]
    fn what_the_zone_does_not_take_changes_nothing() {
        let good = record("new.example.org.", 5, DNSClass::IN, a(1));
        for (bad, code) in [
            (record("*.example.org.", 5, DNSClass::IN, a(1)), ResponseCode::Refused),
            (record(DB, 5, DNSClass::IN, RData::CNAME(CNAME(name("x.org.")))), ResponseCode::Refused),
            (record("db.example.net.", 5, DNSClass::IN, a(1)), ResponseCode::NotZone),
            (record(DB, u32::MAX, DNSClass::IN, a(1)), ResponseCode::FormErr),
            (bare(DB, DNSClass::IN, RecordType::A), ResponseCode::FormErr),
            (record(DB, 5, DNSClass::ANY, RData::Update0(RecordType::A)), ResponseCode::FormErr),
            (bare(DB, DNSClass::NONE, RecordType::ANY), ResponseCode::FormErr),
            (record(DB, 5, DNSClass::CH, a(1)), ResponseCode::FormErr),
        ] {
            assert_eq!(zone().updated(&[good.clone(), bad.clone()]), Err(code), "{bad}");
        }
        let many = |count: u16| {
            let text = |n: u16| RData::TXT(TXT::from_bytes(vec![&n.to_be_bytes()]));
            (0..count).map(|n| record(DB, 5, DNSClass::IN, text(n))).collect::<Vec<_>>()
        };
        assert!(zone().updated(&many(900)).is_ok());
        assert_eq!(zone().updated(&many(1000)), Err(ResponseCode::Refused));
    }

    #[test]
    fn names_without_data_and_missing_names_differ() {
        let zone = zone();
        assert_eq!(zone.find(&name(DB), RecordType::AAAA), Found::NoData);
        assert_eq!(zone.find(&name("no.example.org."), RecordType::A), Found::NoName);
        let deep = record("_m.deep.example.org.", 5, DNSClass::IN, a(1));
        let next = zone.updated(&[deep]).unwrap().unwrap();
        assert_eq!(next.find(&name("deep.example.org."), RecordType::A), Found::NoData, "an empty non-terminal");
        let Found::Records(all) = next.find(&name("example.org."), RecordType::ANY) else { panic!() };
        assert_eq!(all.len(), 2);
    }

    #[test]
    fn a_zone_made_of_its_own_records_is_the_same() {
        let zone = zone();
        assert_eq!(Zone::from_records(name("example.org."), zone.records()), Ok(zone.clone()));
        let without: Vec<Record> = zone.records().into_iter().filter(|r| r.record_type() != RecordType::SOA).collect();
        assert!(Zone::from_records(name("example.org."), without).is_err());
        assert!(Zone::from_records(name("example.net."), zone.records()).is_err());
    }
}
