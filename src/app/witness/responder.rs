//! One request, one answer: TSIG, questions and updates, on the sockets of hickory-server.
//!
//! hickory's `Catalog` is not used: it cannot sign a BADTIME answer with the client's time (RFC 8945 section 5.2.3),
//! signs no answer to an unknown zone, and answers SERVFAIL there (`docs/decisions/0005`).
//!
//! **Invariants:** an update without a good signature changes nothing; a good signature on a request is answered by a
//! signed answer, none by an unsigned one; an update is on disk before its answer is sent and before any question sees
//! it; updates run one after another, questions see one whole zone.

use super::store::{Store, Unwritten};
use super::zone::{Found, Zone};
use crate::wire::dns::{TsigFault, TsigKey, response_signature, verify};
use hickory_server::net::runtime::Time;
use hickory_server::net::xfer::Protocol;
use hickory_server::proto::op::{Edns, Header, HeaderCounts, MessageType, Metadata, OpCode, ResponseCode};
use hickory_server::proto::rr::rdata::TSIG;
use hickory_server::proto::rr::rdata::tsig::{TsigError, make_tsig_record};
use hickory_server::proto::rr::{DNSClass, Record, RecordType};
use hickory_server::proto::serialize::binary::BinEncoder;
use hickory_server::server::{Request, RequestHandler, ResponseHandler, ResponseInfo};
use hickory_server::zone_handler::MessageResponseBuilder;
use std::sync::{Arc, Mutex, OnceLock, PoisonError, RwLock};
use std::time::SystemTime;
use tokio_util::sync::CancellationToken;

/// Largest UDP answer, in bytes, also when the client would take more (DNS flag day 2020); beyond it the answer is
/// truncated and the client asks by TCP.
const MAX_UDP: u16 = 1232;

/// Smallest size every client takes by UDP (RFC 1035 section 4.2.1).
const MIN_UDP: u16 = 512;

/// The zone and its file.
pub(super) struct Keeper {
    /// What questions see. Held only for the time of a pointer's copy.
    zone: RwLock<Arc<Zone>>,
    /// Held for a whole update, prerequisites to fsync: the lock that makes updates atomic.
    store: Mutex<Store>,
    /// Why the store can no longer be trusted; from then on everything is answered SERVFAIL.
    lost: OnceLock<String>,
    /// Raised with `lost`: the witness ends.
    pub(super) ended: CancellationToken,
}

impl Keeper {
    pub(super) fn new(zone: Zone, store: Store) -> Keeper {
        Keeper {
            zone: RwLock::new(Arc::new(zone)),
            store: Mutex::new(store),
            lost: OnceLock::new(),
            ended: CancellationToken::new(),
        }
    }

    fn zone(&self) -> Arc<Zone> {
        self.zone.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(super) fn lost(&self) -> Option<&str> {
        self.lost.get().map(String::as_str)
    }

    /// RFC 2136 sections 3.2 to 3.7 under one lock. Blocks on the disk.
    fn update(&self, prerequisites: &[Record], updates: &[Record]) -> ResponseCode {
        let store = self.store.lock().unwrap_or_else(PoisonError::into_inner);
        if self.lost().is_some() {
            return ResponseCode::ServFail;
        }
        let zone = self.zone();
        let next = match zone.check(prerequisites).and_then(|()| zone.updated(updates)) {
            Ok(Some(next)) => next,
            Ok(None) => return ResponseCode::NoError,
            Err(code) => return code,
        };
        match store.write(&next) {
            Ok(()) => {
                tracing::info!(serial = next.serial(), "the zone was updated");
                *self.zone.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(next);
                ResponseCode::NoError
            }
            Err(Unwritten::Old(error)) => {
                tracing::error!(%error, "an update was not written and is refused; make room on the disk");
                ResponseCode::ServFail
            }
            // Which zone a restart would read is unknown, so nothing may be answered from either until then.
            Err(Unwritten::Unclear(error)) => {
                let _ = self
                    .lost
                    .set(format!("the disk failed while the zone was written ({error}); check it and start again"));
                self.ended.cancel();
                ResponseCode::ServFail
            }
        }
    }
}

/// Answers requests for one zone.
pub(super) struct Responder {
    pub(super) keeper: Arc<Keeper>,
    pub(super) key: TsigKey,
}

/// How an answer is signed.
enum Signing {
    No,
    /// With the key, over the request's MAC.
    Key {
        mac: Vec<u8>,
        time_s: u64,
        error: Option<TsigError>,
        other: Vec<u8>,
    },
    /// A TSIG record without MAC that carries the error: BADKEY, BADSIG (RFC 8945 section 5.3.2).
    Empty(TsigError),
}

struct Reply {
    code: ResponseCode,
    authoritative: bool,
    answers: Vec<Record>,
    authorities: Vec<Record>,
    signing: Signing,
}

impl Reply {
    fn code(code: ResponseCode, signing: Signing) -> Reply {
        Reply { code, authoritative: false, answers: Vec::new(), authorities: Vec::new(), signing }
    }
}

impl Responder {
    async fn reply(&self, request: &Request) -> Reply {
        let now_s = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |age| age.as_secs());
        let signing = match self.authenticate(request, now_s) {
            Ok(signing) => signing,
            Err(reply) => return reply,
        };
        if request.metadata.message_type != MessageType::Query {
            return Reply::code(ResponseCode::FormErr, signing);
        }
        if request.edns.as_ref().is_some_and(|edns| edns.version() > 0) {
            return Reply::code(ResponseCode::BADVERS, signing);
        }
        if self.keeper.lost().is_some() {
            return Reply::code(ResponseCode::ServFail, signing);
        }
        match request.metadata.op_code {
            OpCode::Query => self.query(request, signing),
            OpCode::Update => self.update(request, signing).await,
            _ => Reply::code(ResponseCode::NotImp, signing),
        }
    }

    /// RFC 8945 section 5.2: key, MAC, time.
    fn authenticate(&self, request: &Request, now_s: u64) -> Result<Signing, Reply> {
        let Some(record) = request.signature.as_deref() else { return Ok(Signing::No) };
        if record.dns_class != DNSClass::ANY || record.ttl != 0 {
            return Err(Reply::code(ResponseCode::FormErr, Signing::No));
        }
        let not_auth = |signing| Err(Reply::code(ResponseCode::NotAuth, signing));
        match verify(&self.key, request.as_slice(), Some(record), None, now_s) {
            Ok(signed) => Ok(Signing::Key { mac: signed.mac, time_s: now_s, error: None, other: Vec::new() }),
            Err(TsigFault::Unsigned) => Ok(Signing::No),
            Err(TsigFault::WrongKey) => not_auth(Signing::Empty(TsigError::BadKey)),
            Err(TsigFault::BadSignature) => not_auth(Signing::Empty(TsigError::BadSig)),
            Err(TsigFault::BadTime { signed, .. }) => not_auth(Signing::Key {
                mac: signed.mac,
                // The client's time, so that it can verify; ours goes beside it (section 5.2.3).
                time_s: signed.time,
                error: Some(TsigError::BadTime),
                other: now_s.to_be_bytes()[2..].to_vec(),
            }),
        }
    }

    fn query(&self, request: &Request, signing: Signing) -> Reply {
        let [query] = request.queries.queries() else { return Reply::code(ResponseCode::FormErr, signing) };
        let (name, kind) = (query.original().name(), query.query_type());
        let zone = self.keeper.zone();
        let transfer = matches!(kind, RecordType::AXFR | RecordType::IXFR);
        if query.query_class() != DNSClass::IN || transfer || !zone.origin().zone_of(name) {
            return Reply::code(ResponseCode::Refused, signing);
        }
        let (code, answers) = match zone.find(name, kind) {
            Found::Records(records) => (ResponseCode::NoError, records),
            Found::NoData => (ResponseCode::NoError, Vec::new()),
            Found::NoName => (ResponseCode::NXDomain, Vec::new()),
        };
        let authorities = if answers.is_empty() { zone.soa() } else { Vec::new() };
        Reply { code, authoritative: true, answers, authorities, signing }
    }

    /// RFC 2136 section 3. The right to update (3.3) is asked before the prerequisites, so that these tell nothing to
    /// strangers.
    async fn update(&self, request: &Request, signing: Signing) -> Reply {
        let [zone] = request.queries.queries() else { return Reply::code(ResponseCode::FormErr, signing) };
        if zone.query_type() != RecordType::SOA {
            return Reply::code(ResponseCode::FormErr, signing);
        }
        if !matches!(signing, Signing::Key { .. }) {
            return Reply::code(ResponseCode::Refused, signing);
        }
        if zone.query_class() != DNSClass::IN || zone.original().name() != self.keeper.zone().origin() {
            return Reply::code(ResponseCode::NotAuth, signing);
        }
        let (keeper, prerequisites, updates) =
            (self.keeper.clone(), request.answers.clone(), request.authorities.clone());
        // The closure runs to its end even when this request is dropped: a write is never torn from its lock.
        let done = tokio::task::spawn_blocking(move || keeper.update(&prerequisites, &updates)).await;
        Reply::code(done.unwrap_or(ResponseCode::ServFail), signing)
    }

    /// Encodes once without the signature, signs that, and sends. Too long for UDP: truncated (and still signed).
    async fn send<R: ResponseHandler>(&self, request: &Request, mut reply: Reply, mut handle: R) -> ResponseInfo {
        let udp = request.protocol() == Protocol::Udp;
        let limit =
            if udp { usize::from(request.max_payload().clamp(MIN_UDP, MAX_UDP)) } else { usize::from(u16::MAX) };
        let edns = request.edns.as_ref().map(|_| {
            let mut edns = Edns::new();
            edns.set_max_payload(MAX_UDP);
            edns
        });
        let mut metadata = Metadata::response_from_request(&request.metadata);
        metadata.response_code = reply.code;
        metadata.authoritative = reply.authoritative;
        let mut unsigned = encode(request, metadata, edns.as_ref(), &reply);
        let room = self.signature_room(request, &reply.signing);
        if unsigned.as_ref().is_some_and(|bytes| bytes.len() + room > limit) {
            metadata.truncation = true;
            reply.answers.clear();
            reply.authorities.clear();
            unsigned = encode(request, metadata, edns.as_ref(), &reply);
        }
        let signature = unsigned.ok_or(()).and_then(|bytes| self.signature(request, reply.signing, &bytes));
        let builder = MessageResponseBuilder::new(&request.queries, edns.as_ref());
        let mut response = builder.build(metadata, &reply.answers, &reply.authorities, [], []);
        match signature {
            Ok(Some(record)) => response.set_signature(record),
            Ok(None) => {}
            // An answer that cannot be signed as it must is not sent at all: silence is what it would count as.
            Err(()) => return failed(request),
        }
        match handle.send_response(response).await {
            Ok(info) => info,
            Err(error) => {
                tracing::debug!(%error, client = %request.src(), "an answer could not be sent");
                failed(request)
            }
        }
    }

    /// An upper bound of the bytes a TSIG record adds.
    fn signature_room(&self, request: &Request, signing: &Signing) -> usize {
        /// Type, class, TTL, length, time, fudge, MAC length, id, error, other length, other; longest algorithm name
        /// (13) and MAC (64) of ours.
        const FIXED: usize = 2 + 2 + 4 + 2 + 6 + 2 + 2 + 2 + 2 + 2 + 6 + 13 + 64;
        match (signing, request.signature.as_deref()) {
            (Signing::Empty(_), Some(record)) => FIXED + record.name.len() + record.data.algorithm.to_name().len() + 2,
            (Signing::Empty(_), None) | (Signing::No, _) => 0,
            (Signing::Key { .. }, _) => FIXED + self.key.name().len() + 1,
        }
    }

    fn signature(&self, request: &Request, signing: Signing, unsigned: &[u8]) -> Result<Option<Box<Record<TSIG>>>, ()> {
        let id = request.metadata.id;
        match (signing, request.signature.as_deref()) {
            (Signing::No, _) => Ok(None),
            (Signing::Key { mac, time_s, error, other }, _) => {
                response_signature(&self.key, unsigned, id, &mac, time_s, error, other).map(Some).map_err(drop)
            }
            (Signing::Empty(error), Some(record)) => {
                let asked = &record.data;
                let algorithm = asked.algorithm.clone();
                let empty = TSIG::new(algorithm, asked.time, asked.fudge, Vec::new(), id, Some(error), Vec::new());
                Ok(Some(Box::new(make_tsig_record(record.name.clone(), empty))))
            }
            (Signing::Empty(_), None) => Err(()),
        }
    }
}

fn encode(request: &Request, metadata: Metadata, edns: Option<&Edns>, reply: &Reply) -> Option<Vec<u8>> {
    let builder = MessageResponseBuilder::new(&request.queries, edns);
    let response = builder.build(metadata, &reply.answers, &reply.authorities, [], []);
    let mut bytes = Vec::with_capacity(usize::from(MIN_UDP));
    let mut encoder = BinEncoder::new(&mut bytes);
    response.destructive_emit(&mut encoder).ok()?;
    Some(bytes)
}

/// What hickory-server logs of a request whose answer could not be sent.
fn failed(request: &Request) -> ResponseInfo {
    let mut metadata = Metadata::response_from_request(&request.metadata);
    metadata.response_code = ResponseCode::ServFail;
    Header { metadata, counts: HeaderCounts::default() }.into()
}

#[async_trait::async_trait]
impl RequestHandler for Responder {
    async fn handle_request<R: ResponseHandler, T: Time>(&self, request: &Request, handle: R) -> ResponseInfo {
        let reply = self.reply(request).await;
        self.send(request, reply, handle).await
    }
}
