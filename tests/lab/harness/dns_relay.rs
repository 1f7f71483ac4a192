//! The DNS fault relay: stands in a network namespace of its own between the daemons and the real server, by UDP and
//! TCP, and passes, loses, delays, spoils or forges answers as told.
//!
//! It is NOT a DNS server: an honest answer is always the real server's. What it forges, it forges as somebody in its
//! place could (with the pair's key only where the fault is that of a key holder with a wrong clock).
//!
//! **Invariant:** [`DnsRelay::last_proof_asked`] knows, independently of the daemons, when the last question came whose
//! honest answer was let through: the moment from which a lease may count.

use super::net::{Plug, Switch, at};
use super::sys::{Fail, Outcome, enter_netns, millis, ms, now, secs};
use super::witness::{KEY_NAME, SERVICE, ZONE};
use hickory_proto::op::{Message, MessageType, OpCode, ResponseCode};
use hickory_proto::rr::rdata::{A, TXT};
use hickory_proto::rr::{RData, Record, RecordType};
use portcullis::base::time::{Duration, Instant};
use portcullis::wire::dns::{Asked, Question, ServiceNames, TsigKey, response_signature};
use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::SystemTime;

/// How long the relay waits for the real server, and for the rest of a request by TCP.
const PATIENCE: Duration = secs(4);

/// A daemon has given its question up after this.
const ASKERS_PATIENCE: Duration = secs(2);

/// Of no value; the pair's own is random.
const OTHER_SECRET: &str = "bm90IHRoZSBwYWlyJ3Mgb3duIHNlY3JldA==";

/// What becomes of questions and answers from now on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DnsFault {
    Pass,
    /// No answer at all.
    Drop,
    /// An answer with this code, unsigned, without records, with AA.
    Code(ResponseCode),
    /// UDP answers are empty with TC=1; TCP passes.
    TruncateUdp,
    StripSignature,
    CorruptMac,
    /// Another node's address and a marker of a later epoch, unsigned.
    ForgeUnsigned,
    /// The same, signed with a key of the same name but another secret.
    ForgeSigned,
    /// The real server's signed answer to another question of the same reading.
    OtherQuestion,
    /// The real answer under another message id.
    OtherId,
    /// The real answer, so long after its question.
    Delay(Duration),
    /// The last answer before the fault began, with the id of this question: a cache that serves stale.
    Replay,
    /// The real answer, signed anew with the pair's key and a clock so many seconds off.
    ServerClock(i64),
    /// The question, signed anew as by a daemon whose clock is so many seconds off: the real server says BADTIME.
    ClientClock(i64),
    /// The question, signed anew with a wrong secret: the real server says BADSIG.
    WrongKey,
}

impl DnsFault {
    /// Does a question that meets it still get the honest answer in the end?
    fn is_honest(self) -> bool {
        match self {
            DnsFault::Pass | DnsFault::TruncateUdp => true,
            DnsFault::Delay(delay) => delay < ASKERS_PATIENCE,
            _ => false,
        }
    }
}

/// A question whose honest answer was handed over.
#[derive(Debug, Clone, Copy)]
struct Passed {
    from: IpAddr,
    kind: RecordType,
    asked: Instant,
}

#[derive(Debug)]
struct State {
    fault: DnsFault,
    /// Questions that met the present fault, by asker.
    met: HashMap<IpAddr, u64>,
    passed: Vec<Passed>,
    /// The last honest answers, by what was asked.
    recorded: HashMap<RecordType, Vec<u8>>,
}

#[derive(Debug)]
struct Shared {
    server: SocketAddr,
    names: ServiceNames,
    key: TsigKey,
    other_key: TsigKey,
    state: Mutex<State>,
    stop: AtomicBool,
}

/// The relay; ends when dropped.
#[derive(Debug)]
pub struct DnsRelay {
    pub plug: Plug,
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl DnsRelay {
    /// Plugs the relay in and listens; `secret` is the pair's key in base64.
    pub fn start(plug: Plug, switch: &Switch, server: &str, secret: &str) -> Outcome<DnsRelay> {
        switch.plug_in(&plug)?;
        let key = |secret: &str| TsigKey::new(KEY_NAME, "hmac-sha256", secret).map_err(Fail);
        let shared = Arc::new(Shared {
            server: at(server, 53).parse()?,
            names: ServiceNames::new(ZONE, SERVICE).map_err(Fail)?,
            key: key(secret)?,
            other_key: key(OTHER_SECRET)?,
            state: Mutex::new(State {
                fault: DnsFault::Pass,
                met: HashMap::new(),
                passed: Vec::new(),
                recorded: HashMap::new(),
            }),
            stop: AtomicBool::new(false),
        });
        let door: SocketAddr = at(&plug.address, 53).parse()?;
        let (udp, tcp) = super::sys::in_netns(&plug.ns, || Ok((UdpSocket::bind(door)?, TcpListener::bind(door)?)))?;
        // Short, so that the end of the lab is seen.
        udp.set_read_timeout(Some(millis(100)))?;
        tcp.set_nonblocking(true)?;
        let spawn = |name: &str, work: Box<dyn FnOnce(Arc<Shared>) + Send>| {
            let (ns, shared) = (plug.ns.clone(), shared.clone());
            // Sockets towards the server are made by this thread and its children: inside the relay's namespace.
            let body = move || enter_netns(&ns).map(|()| work(shared)).unwrap_or(());
            std::thread::Builder::new().name(name.to_owned()).spawn(body)
        };
        let threads = vec![
            spawn("relay-udp", Box::new(move |shared| shared.serve_udp(&udp)))?,
            spawn("relay-tcp", Box::new(move |shared| shared.serve_tcp(&tcp)))?,
        ];
        Ok(DnsRelay { plug, shared, threads })
    }

    pub fn address(&self) -> &str {
        &self.plug.address
    }

    /// From now on; returns the moment just after the change.
    pub fn set(&self, fault: DnsFault) -> Instant {
        let mut state = self.shared.state();
        state.fault = fault;
        state.met.clear();
        now()
    }

    /// How many questions of this asker have met the present fault.
    pub fn met(&self, asker: &str) -> u64 {
        let Ok(asker) = asker.parse::<IpAddr>() else { return 0 };
        self.shared.state().met.get(&asker).copied().unwrap_or_default()
    }

    /// When the first question came of the last complete reading (A, AAAA and TXT) whose three honest answers this
    /// asker was given.
    pub fn last_proof_asked(&self, asker: &str) -> Option<Instant> {
        let asker: IpAddr = asker.parse().ok()?;
        let state = self.shared.state();
        let mine: Vec<&Passed> = state.passed.iter().filter(|one| one.from == asker).collect();
        let near = |kind: RecordType, to: Instant| {
            let close = |one: &&&Passed| one.kind == kind && ms(one.asked, to).abs() < 300;
            mine.iter().rev().find(close).map(|one| one.asked)
        };
        mine.iter().rev().filter(|one| one.kind == RecordType::TXT).find_map(|text| {
            let (v4, v6) = (near(RecordType::A, text.asked)?, near(RecordType::AAAA, text.asked)?);
            Some(text.asked.min(v4).min(v6))
        })
    }
}

impl Drop for DnsRelay {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn serve_udp(self: Arc<Shared>, socket: &UdpSocket) {
        let mut buffer = [0u8; 4096];
        while !self.stop.load(Ordering::Relaxed) {
            let Ok((length, client)) = socket.recv_from(&mut buffer) else { continue };
            let (shared, request, asked) = (self.clone(), buffer[..length].to_vec(), now());
            let Ok(back) = socket.try_clone() else { continue };
            std::thread::spawn(move || {
                shared.handle(client, asked, &request, false, |answer| back.send_to(answer, client).map(drop));
            });
        }
    }

    fn serve_tcp(self: Arc<Shared>, listener: &TcpListener) {
        while !self.stop.load(Ordering::Relaxed) {
            let Ok((mut stream, client)) = listener.accept() else {
                super::sys::pause(millis(5));
                continue;
            };
            let shared = self.clone();
            std::thread::spawn(move || {
                let _ = stream.set_nonblocking(false);
                let _ = stream.set_read_timeout(Some(PATIENCE));
                let Ok(request) = read_framed(&mut stream) else { return };
                shared.handle(client, now(), &request, true, |answer| stream.write_all(&framed(answer)));
                // Silence is an open connection without an answer; it ends when the client does.
                let _ = stream.read(&mut [0]);
            });
        }
    }

    /// One request: the present fault decides; then it is remembered whether the honest answer went out.
    fn handle(
        &self,
        client: SocketAddr,
        asked: Instant,
        request: &[u8],
        tcp: bool,
        send: impl FnOnce(&[u8]) -> std::io::Result<()>,
    ) {
        let Ok(message) = Message::from_vec(request) else { return };
        let fault = {
            let mut state = self.state();
            *state.met.entry(client.ip()).or_default() += 1;
            state.fault
        };
        // Updates meet an honest or a silent relay only: the faults are those of questions.
        let kind = message.queries.first().map_or(RecordType::ANY, |query| query.query_type());
        let answer = match (message.op_code, fault) {
            (_, DnsFault::Drop) => None,
            (OpCode::Update, _) => self.ask_server(request, true),
            _ => self.answer(&message, request, fault, kind, tcp),
        };
        let Some(answer) = answer else { return };
        if let DnsFault::Delay(delay) = fault {
            super::sys::pause(delay.saturating_sub(now().since(asked)));
        }
        let told = Message::from_vec(&answer).is_ok_and(|message| {
            !message.truncation && matches!(message.response_code, ResponseCode::NoError | ResponseCode::NXDomain)
        });
        if send(&answer).is_ok() && fault.is_honest() && told {
            let mut state = self.state();
            state.passed.push(Passed { from: client.ip(), kind, asked });
            state.recorded.insert(kind, answer);
        }
    }

    fn answer(
        &self,
        question: &Message,
        request: &[u8],
        fault: DnsFault,
        kind: RecordType,
        tcp: bool,
    ) -> Option<Vec<u8>> {
        let honest = |request: &[u8]| self.ask_server(request, tcp);
        let id = question.id;
        let changed = |answer: Vec<u8>, change: &dyn Fn(&mut Message)| {
            let mut message = Message::from_vec(&answer).ok()?;
            change(&mut message);
            message.to_vec().ok()
        };
        match fault {
            DnsFault::Drop => None,
            DnsFault::Pass | DnsFault::Delay(_) => honest(request),
            DnsFault::TruncateUdp if tcp => honest(request),
            DnsFault::TruncateUdp => {
                let mut empty = empty_answer(question);
                empty.metadata.truncation = true;
                empty.to_vec().ok()
            }
            DnsFault::Code(code) => {
                let mut empty = empty_answer(question);
                empty.metadata.response_code = code;
                empty.to_vec().ok()
            }
            DnsFault::StripSignature => changed(honest(request)?, &|message| drop(message.take_signature())),
            DnsFault::CorruptMac => changed(honest(request)?, &|message| {
                if let Some(mut signature) = message.take_signature() {
                    signature.data.mac[0] ^= 1;
                    message.set_signature(signature);
                }
            }),
            DnsFault::ForgeUnsigned => forged(question, kind).to_vec().ok(),
            DnsFault::ForgeSigned => sign(forged(question, kind), question, &self.other_key, 0),
            DnsFault::OtherId => {
                let mut answer = honest(request)?;
                answer[1] ^= 1;
                Some(answer)
            }
            DnsFault::OtherQuestion => {
                let other = if kind == RecordType::TXT { Asked::V4 } else { Asked::Marker };
                honest(self.question(other, id, &self.key, 0)?.bytes())
            }
            DnsFault::Replay => {
                let mut answer = self.state().recorded.get(&kind)?.clone();
                answer[..2].copy_from_slice(&id.to_be_bytes());
                Some(answer)
            }
            DnsFault::ServerClock(skew) => {
                let mut message = Message::from_vec(&honest(request)?).ok()?;
                message.take_signature()?;
                sign(message, question, &self.key, skew)
            }
            DnsFault::ClientClock(skew) => honest(self.question(asked(kind), id, &self.key, skew)?.bytes()),
            DnsFault::WrongKey => honest(self.question(asked(kind), id, &self.other_key, 0)?.bytes()),
        }
    }

    fn question(&self, asked: Asked, id: u16, key: &TsigKey, skew: i64) -> Option<Question> {
        Question::new(&self.names, asked, id, Some(key), unix_seconds(skew)).ok()
    }

    /// The real server's answer, by the same way as the question came.
    fn ask_server(&self, request: &[u8], tcp: bool) -> Option<Vec<u8>> {
        if tcp {
            let mut stream = TcpStream::connect_timeout(&self.server, PATIENCE).ok()?;
            stream.set_read_timeout(Some(PATIENCE)).ok()?;
            stream.write_all(&framed(request)).ok()?;
            return read_framed(&mut stream).ok();
        }
        let any = if self.server.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
        let socket = UdpSocket::bind(any).ok()?;
        socket.connect(self.server).ok()?;
        socket.set_read_timeout(Some(PATIENCE)).ok()?;
        socket.send(request).ok()?;
        let mut buffer = [0u8; 4096];
        let length = socket.recv(&mut buffer).ok()?;
        Some(buffer[..length].to_vec())
    }
}

fn asked(kind: RecordType) -> Asked {
    match kind {
        RecordType::A => Asked::V4,
        RecordType::AAAA => Asked::V6,
        _ => Asked::Marker,
    }
}

fn empty_answer(question: &Message) -> Message {
    let mut answer = Message::response(question.id, question.op_code);
    answer.metadata.message_type = MessageType::Response;
    answer.metadata.authoritative = true;
    for query in &question.queries {
        answer.add_query(query.clone());
    }
    answer
}

/// "The other node has it, at an epoch far above": were it believed, the node would fence itself for good.
fn forged(question: &Message, kind: RecordType) -> Message {
    let mut answer = empty_answer(question);
    let Some(query) = question.queries.first() else { return answer };
    let data = match kind {
        RecordType::A => RData::A(A::new(192, 0, 2, 12)),
        RecordType::TXT => {
            let text = "v=1 epoch=99 seq=1 active=b sync=none timeline=9 lease=3000 sysid=1 \
                        boot=5f1c0000-0000-4000-8000-000000000001 since=2026-11-20T15:11:00Z";
            RData::TXT(TXT::from_bytes(vec![text.as_bytes()]))
        }
        _ => return answer,
    };
    answer.add_answer(Record::from_rdata(query.name().clone(), 5, data));
    answer
}

/// The answer with a signature over it and the question's, by a clock `skew` seconds off.
fn sign(mut answer: Message, question: &Message, key: &TsigKey, skew: i64) -> Option<Vec<u8>> {
    let mac = &question.signature()?.data.mac;
    let unsigned = answer.to_vec().ok()?;
    let signature = response_signature(key, &unsigned, question.id, mac, unix_seconds(skew), None, Vec::new()).ok()?;
    answer.set_signature(signature);
    answer.to_vec().ok()
}

fn unix_seconds(skew: i64) -> u64 {
    let age = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    age.as_secs().saturating_add_signed(skew)
}

fn framed(message: &[u8]) -> Vec<u8> {
    let length = u16::try_from(message.len()).unwrap_or(u16::MAX);
    [&length.to_be_bytes(), message].concat()
}

fn read_framed(stream: &mut TcpStream) -> std::io::Result<Vec<u8>> {
    let mut length = [0u8; 2];
    stream.read_exact(&mut length)?;
    let mut message = vec![0; usize::from(u16::from_be_bytes(length))];
    stream.read_exact(&mut message)?;
    Ok(message)
}
