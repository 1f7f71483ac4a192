//! The second wall (R7, `fence.kernel_gate`): an nftables table of our own whose one set element lives exactly as long
//! as the lease, so that a dead or frozen daemon cannot leave even an open session passing.
//!
//! ```text
//! table inet portcullis {
//!   set lease  { type inet_proto; flags timeout; elements = { tcp timeout <what is left of the lease> } }
//!   set nodes4, nodes6                            the other nodes
//!   chain input  { PostgreSQL's port from lo or a node: accept;  that port and the gate's: jump wall }
//!   chain output { PostgreSQL's port to   lo or a node: accept;  that port and the gate's: jump wall }
//!   chain wall   { RST: accept;  meta l4proto @lease: accept;  reject with tcp reset }
//! }
//! ```
//!
//! Only what this host serves is looked at (destination port inbound, source port outbound): this host's own
//! connections to the other node's PostgreSQL are nobody's business here. A reset passes before the lease is asked, or
//! the wall would swallow the very resets that it sends. Local clients of the gate are clients: loopback is exempt for
//! PostgreSQL's port alone.
//!
//! What this is NOT: it keeps no lease and schedules nothing (`app::wall` does), and it touches no other table. Kernel
//! timeouts stand still while the machine is suspended, as the VIP's lifetime does; the gate's own clock does not.
//! Needs CAP_NET_ADMIN. Why this crate: docs/decisions/0006.
//!
//! **Invariants:** every change is one transaction, so there is no moment without the wall, and none between an old
//! and a new lease in which an open session is cut; nothing is forked and no descriptor is opened after the start; the
//! kernel answers within the call, so no call waits. The table has no owner flag: it must outlive its maker.

use netlink_packet_core::{
    DefaultNla, NLM_F_ACK, NLM_F_APPEND, NLM_F_CREATE, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload,
};
use netlink_packet_netfilter::nftables::{
    Bitwise, ChainAttribute, ChainMessage, Cmp, DataAttribute, ExpressionAttribute, Expressions, Hook, Immediate,
    InetHookNumber, ListAttribute, Lookup, Meta, MetaKey, NfTablesMessage, Operator, Payload, Register, RuleAttribute,
    RuleMessage, SetAttribute, SetElementAttribute, SetElementList, SetElementMessage, SetFlags, SetMessage,
    TableAttribute, TableMessage, Verdict, VerdictAttribute,
};
use netlink_packet_netfilter::none::ControlMessage;
use netlink_packet_netfilter::{NetfilterHeader, NetfilterMessage, NetfilterMessageInner, NetfilterProtoFamily};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_NETFILTER};
use std::net::IpAddr;
use std::time::Duration;

/// The table, in family `inet`; nobody else's by its name.
pub const TABLE: &str = "portcullis";
const LEASE: &str = "lease";
const NODES4: &str = "nodes4";
const NODES6: &str = "nodes6";
const WALL: &str = "wall";
/// linux/netfilter/nfnetlink.h, linux/netfilter/nf_tables.h, linux/in.h.
const NFNL_SUBSYS_NFTABLES: u16 = 10;
const NFT_REJECT_TCP_RST: u32 = 1;
const NFTA_REJECT_TYPE: u16 = 1;
const NF_ACCEPT: u32 = 1;
const BASE_NETWORK: u32 = 1;
const BASE_TRANSPORT: u32 = 2;
const NFPROTO_IPV4: u8 = 2;
const NFPROTO_IPV6: u8 = 10;
const IPPROTO_TCP: u8 = 6;
/// Where TCP keeps its flags, and RST among them.
const TCP_FLAGS: u32 = 13;
const TCP_RST: u8 = 4;
/// Types as `nft list` names them: ipv4_addr, ipv6_addr, inet_proto.
const TYPE_IPV4: u32 = 7;
const TYPE_IPV6: u32 = 8;
const TYPE_PROTO: u32 = 12;

/// Less than this is nothing: kernels before 6.12 round a timeout below their tick (up to 10 ms) down to 0, and an
/// element with that stays for ever.
const SHORTEST_MS: u64 = 12;

/// What the wall stands before.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// Ports of the gate (`service.listen`).
    pub gate: Vec<u16>,
    pub postgres: u16,
    /// The other nodes, which reach PostgreSQL whether there is a lease or not: replication, `pg_basebackup`, R6.
    pub nodes: Vec<IpAddr>,
}

/// Why the kernel did not do what it was asked.
#[derive(Debug, thiserror::Error)]
enum Trouble {
    /// An errno.
    #[error("{}", std::io::Error::from_raw_os_error(*.0))]
    Kernel(i32),
    #[error("{0}")]
    Socket(#[from] std::io::Error),
    #[error("the kernel's answer cannot be read: {0}")]
    Answer(String),
}

/// The wall, made and shut until [`KernelGate::set`] opens it.
pub struct KernelGate {
    socket: Socket,
    plan: Plan,
    sequence: u32,
}

impl std::fmt::Debug for KernelGate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("KernelGate").field("plan", &self.plan).finish_non_exhaustive()
    }
}

/// What [`KernelGate::set`] found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stood {
    Yes,
    /// Somebody had taken the table away (`nft flush ruleset`, as a reload of nftables.service does it); it stands
    /// again.
    No,
}

impl KernelGate {
    /// Makes the table, shut; one that a former life left is replaced in the same transaction. Errors say what is
    /// missing.
    pub fn new(plan: Plan) -> Result<KernelGate, String> {
        let socket = open().map_err(|error| unmakeable(&error))?;
        let mut gate = KernelGate { socket, plan, sequence: 0 };
        let messages = gate.everything(None);
        gate.transact(messages).map_err(|error| unmakeable(&error))?;
        Ok(gate)
    }

    /// Lets traffic pass for so long from now (whole milliseconds, rounded down), whatever was set before; `None`: not
    /// at all. Fails without harm: what was set before runs out by itself.
    pub fn set(&mut self, left: Option<Duration>) -> Result<Stood, String> {
        let millis = left.map(|left| u64::try_from(left.as_millis()).unwrap_or(u64::MAX));
        let millis = millis.filter(|ms| *ms >= SHORTEST_MS);
        let mut messages = vec![flush_lease()];
        messages.extend(millis.map(lease_element));
        match self.transact(messages) {
            Ok(()) => Ok(Stood::Yes),
            Err(Trouble::Kernel(libc::ENOENT)) => {
                let all = self.everything(millis);
                self.transact(all).map(|()| Stood::No).map_err(|error| failed(&error))
            }
            Err(error) => Err(failed(&error)),
        }
    }

    /// Takes the table away: the clean end.
    pub fn remove(mut self) -> Result<(), String> {
        match self.transact(vec![delete_table()]) {
            Ok(()) | Err(Trouble::Kernel(libc::ENOENT)) => Ok(()),
            Err(error) => Err(failed(&error)),
        }
    }

    /// The table made anew: "add, delete, add" replaces what there may be, in one transaction.
    fn everything(&self, lease: Option<u64>) -> Vec<NfTablesMessage> {
        let mut all = vec![new_table(), delete_table(), new_table()];
        all.push(new_set(LEASE, 1, TYPE_PROTO, 1, SetFlags::Timeout));
        all.push(new_set(NODES4, 2, TYPE_IPV4, 4, SetFlags::default()));
        all.push(new_set(NODES6, 3, TYPE_IPV6, 16, SetFlags::default()));
        for node in &self.plan.nodes {
            all.push(match node.to_canonical() {
                IpAddr::V4(v4) => element(NODES4, v4.octets().to_vec(), None),
                IpAddr::V6(v6) => element(NODES6, v6.octets().to_vec(), None),
            });
        }
        all.extend(lease.map(lease_element));
        all.push(chain(WALL, None));
        let tcp_flags = vec![meta(MetaKey::L4Proto), equals(vec![IPPROTO_TCP]), payload(BASE_TRANSPORT, TCP_FLAGS, 1)];
        all.push(rule(WALL, [tcp_flags, has_bit(TCP_RST), vec![accept()]].concat()));
        all.push(rule(WALL, vec![meta(MetaKey::L4Proto), in_set(LEASE), accept()]));
        all.push(rule(WALL, vec![reset()]));
        let sides = [
            ("input", InetHookNumber::LocalIn, MetaKey::Iifname, 2, (12, 8)),
            ("output", InetHookNumber::LocalOut, MetaKey::Oifname, 0, (16, 24)),
        ];
        for (name, hook, interface, port_at, (address4_at, address6_at)) in sides {
            all.push(chain(name, Some(hook)));
            let to = |port: u16, more: Vec<Expression>| rule(name, [tcp_port(port_at, port), more].concat());
            let postgres = self.plan.postgres;
            // nft compares interface names over all sixteen octets.
            let mut loopback = b"lo".to_vec();
            loopback.resize(16, 0);
            all.push(to(postgres, vec![meta(interface), equals(loopback), accept()]));
            for (family, at, length, set) in
                [(NFPROTO_IPV4, address4_at, 4, NODES4), (NFPROTO_IPV6, address6_at, 16, NODES6)]
            {
                let of_family = [meta(MetaKey::Nfproto), equals(vec![family])];
                let in_nodes = [payload(BASE_NETWORK, at, length), in_set(set), accept()];
                all.push(to(postgres, [of_family.to_vec(), in_nodes.to_vec()].concat()));
            }
            let mut ports = self.plan.gate.clone();
            ports.push(postgres);
            ports.sort_unstable();
            ports.dedup();
            all.extend(ports.into_iter().map(|port| to(port, vec![jump_to_wall()])));
        }
        all
    }

    /// All or nothing. The kernel works inside `send`, so its answers are there when that returns.
    fn transact(&mut self, messages: Vec<NfTablesMessage>) -> Result<(), Trouble> {
        // What an earlier, broken-off talk left behind.
        while self.receive()?.is_some() {}
        let first = self.sequence.wrapping_add(1);
        let mut bytes = Vec::new();
        let count = messages.len();
        self.append(&mut bytes, ControlMessage::BatchBegin, 0);
        for (n, message) in messages.into_iter().enumerate() {
            let create = matches!(
                message,
                NfTablesMessage::NewTable(_)
                    | NfTablesMessage::NewChain(_)
                    | NfTablesMessage::NewRule(_)
                    | NfTablesMessage::NewSet(_)
                    | NfTablesMessage::NewSetElement(_)
            );
            let append = matches!(message, NfTablesMessage::NewRule(_));
            // Every refusal is told; of what was done only the last message is told, when all of it was.
            let flags = [(create, NLM_F_CREATE), (append, NLM_F_APPEND), (n + 1 == count, NLM_F_ACK)];
            let flags = flags.iter().filter(|(on, _)| *on).fold(0, |all, (_, flag)| all | flag);
            self.append(&mut bytes, message, flags);
        }
        let acknowledged = self.sequence;
        self.append(&mut bytes, ControlMessage::BatchEnd, 0);
        self.socket.send(&bytes, 0)?;
        loop {
            let Some((sequence, code)) = self.receive()? else {
                return Err(Trouble::Answer("there is none".to_owned()));
            };
            if code != 0 && sequence.wrapping_sub(first) <= self.sequence.wrapping_sub(first) {
                return Err(Trouble::Kernel(code));
            }
            if sequence == acknowledged {
                return Ok(());
            }
        }
    }

    fn append(&mut self, bytes: &mut Vec<u8>, inner: impl Into<NetfilterMessageInner>, flags: u16) {
        let inner = inner.into();
        let header = match inner {
            NetfilterMessageInner::None(_) => {
                NetfilterHeader::new(NetfilterProtoFamily::Unspec, 0, NFNL_SUBSYS_NFTABLES)
            }
            _ => NetfilterHeader::new(NetfilterProtoFamily::Inet, 0, 0),
        };
        let mut message = NetlinkMessage::from(NetfilterMessage::new(header, inner));
        self.sequence = self.sequence.wrapping_add(1);
        message.header.sequence_number = self.sequence;
        message.header.flags = NLM_F_REQUEST | flags;
        message.finalize();
        let start = bytes.len();
        bytes.resize(start + message.buffer_len().next_multiple_of(4), 0);
        message.serialize(&mut bytes[start..]);
    }

    /// The next answer: to which message, and its errno (0: done). `None`: there is none.
    fn receive(&self) -> Result<Option<(u32, i32)>, Trouble> {
        let mut buffer = Vec::with_capacity(8192);
        match self.socket.recv(&mut buffer, libc::MSG_DONTWAIT) {
            Ok(_) => {}
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => return Ok(None),
            Err(error) => return Err(error.into()),
        }
        let message = NetlinkMessage::<NetfilterMessage>::deserialize(&buffer)
            .map_err(|error| Trouble::Answer(error.to_string()))?;
        let code = match message.payload {
            NetlinkPayload::Error(error) => error.raw_code().abs(),
            _ => 0,
        };
        Ok(Some((message.header.sequence_number, code)))
    }
}

/// Takes away a table that a former life left, where this one is configured without a wall. Says whether there was
/// one; a kernel without nftables, or one that does not let us, has none of ours.
pub fn remove_leftover() -> Result<bool, String> {
    let delete = || -> Result<(), Trouble> {
        let mut gate =
            KernelGate { socket: open()?, plan: Plan { gate: vec![], postgres: 0, nodes: vec![] }, sequence: 0 };
        gate.transact(vec![delete_table()])
    };
    match delete() {
        Ok(()) => Ok(true),
        Err(Trouble::Kernel(libc::ENOENT | libc::EPERM | libc::EOPNOTSUPP)) => Ok(false),
        Err(Trouble::Socket(error)) if error.raw_os_error() == Some(libc::EPROTONOSUPPORT) => Ok(false),
        Err(error) => Err(format!("a kernel gate of a former life may still stand: {error}; see `nft list tables`")),
    }
}

fn open() -> Result<Socket, Trouble> {
    let mut socket = Socket::new(NETLINK_NETFILTER)?;
    socket.bind_auto()?;
    socket.connect(&SocketAddr::new(0, 0))?;
    // Answers without a copy of the question.
    socket.set_cap_ack(true)?;
    Ok(socket)
}

fn unmakeable(error: &Trouble) -> String {
    let why = match error {
        Trouble::Kernel(libc::EPERM) => "the daemon has not CAP_NET_ADMIN",
        Trouble::Kernel(libc::EOPNOTSUPP) => "this kernel has no nftables (CONFIG_NF_TABLES, CONFIG_NF_TABLES_INET)",
        Trouble::Kernel(libc::ENOENT) => "this kernel's nftables lacks the inet family or `reject` (CONFIG_NFT_REJECT)",
        Trouble::Socket(e) if e.raw_os_error() == Some(libc::EPROTONOSUPPORT) => "this kernel has no netfilter",
        _ => "the kernel refused the table",
    };
    format!("fence.kernel_gate: the table inet {TABLE} cannot be made: {why}: {error}; mend that, or set it to false")
}

fn failed(error: &Trouble) -> String {
    format!("the table inet {TABLE} could not be changed: {error}; what it lets pass runs out with the lease")
}

type Expression = ListAttribute<ExpressionAttribute>;

fn new_table() -> NfTablesMessage {
    NfTablesMessage::NewTable(TableMessage { attributes: vec![TableAttribute::Name(TABLE.to_owned())] })
}

fn delete_table() -> NfTablesMessage {
    NfTablesMessage::DeleteTable(TableMessage { attributes: vec![TableAttribute::Name(TABLE.to_owned())] })
}

fn new_set(name: &str, id: u32, key_type: u32, key_length: u32, flags: SetFlags) -> NfTablesMessage {
    NfTablesMessage::NewSet(SetMessage {
        attributes: vec![
            SetAttribute::Table(TABLE.to_owned()),
            SetAttribute::Name(name.to_owned()),
            SetAttribute::Flags(flags),
            SetAttribute::KeyType(key_type),
            SetAttribute::KeyLen(key_length),
            SetAttribute::Id(id),
        ],
    })
}

fn element(set: &str, key: Vec<u8>, timeout: Option<u64>) -> NfTablesMessage {
    let mut parts = vec![SetElementAttribute::Key(DataAttribute::Value(key))];
    parts.extend(timeout.map(SetElementAttribute::Timeout));
    NfTablesMessage::NewSetElement(SetElementMessage {
        attributes: vec![
            SetElementList::Table(TABLE.to_owned()),
            SetElementList::Set(set.to_owned()),
            SetElementList::Elements(vec![ListAttribute::Element(parts)]),
        ],
    })
}

fn lease_element(millis: u64) -> NfTablesMessage {
    element(LEASE, vec![IPPROTO_TCP], Some(millis))
}

/// Empties the set; deleting the element itself would fail when it has run out.
fn flush_lease() -> NfTablesMessage {
    let attributes = vec![SetElementList::Table(TABLE.to_owned()), SetElementList::Set(LEASE.to_owned())];
    NfTablesMessage::DeleteSetElement(SetElementMessage { attributes })
}

/// A chain of the hook, or one that is only jumped to.
fn chain(name: &str, hook: Option<InetHookNumber>) -> NfTablesMessage {
    let mut attributes = vec![ChainAttribute::Table(TABLE.to_owned()), ChainAttribute::Name(name.to_owned())];
    if let Some(hook) = hook {
        attributes.push(ChainAttribute::Policy(NF_ACCEPT));
        attributes.push(ChainAttribute::Type("filter".to_owned()));
        attributes.push(ChainAttribute::Hook(vec![Hook::Number(hook.into()), Hook::Priority(0)]));
    }
    NfTablesMessage::NewChain(ChainMessage { attributes })
}

fn rule(chain: &str, expressions: Vec<Expression>) -> NfTablesMessage {
    NfTablesMessage::NewRule(RuleMessage {
        attributes: vec![
            RuleAttribute::Table(TABLE.to_owned()),
            RuleAttribute::Chain(chain.to_owned()),
            RuleAttribute::Expressions(expressions),
        ],
    })
}

/// `meta l4proto tcp`, then the port at this offset.
fn tcp_port(at: u32, port: u16) -> Vec<Expression> {
    let tcp = [meta(MetaKey::L4Proto), equals(vec![IPPROTO_TCP])];
    let port = [payload(BASE_TRANSPORT, at, 2), equals(port.to_be_bytes().to_vec())];
    [tcp.to_vec(), port.to_vec()].concat()
}

fn meta(key: MetaKey) -> Expression {
    Expressions::Meta(vec![Meta::Key(key), Meta::DestinationRegister(Register::Reg1)]).into()
}

fn payload(base: u32, offset: u32, length: u32) -> Expression {
    let parts = vec![
        Payload::DestinationRegister(Register::Reg1),
        Payload::Base(base),
        Payload::Offset(offset),
        Payload::Len(length),
    ];
    Expressions::Payload(parts).into()
}

fn compare(operator: Operator, value: Vec<u8>) -> Expression {
    let parts = vec![Cmp::SourceRegister(Register::Reg1), Cmp::Op(operator), Cmp::Data(DataAttribute::Value(value))];
    Expressions::Cmp(parts).into()
}

fn equals(value: Vec<u8>) -> Expression {
    compare(Operator::Equal, value)
}

/// The octet in the register has this bit.
fn has_bit(bit: u8) -> Vec<Expression> {
    let mask = Expressions::Bitwise(vec![
        Bitwise::SourceRegister(Register::Reg1),
        Bitwise::DestinationRegister(Register::Reg1),
        Bitwise::Length(1),
        Bitwise::Mask(DataAttribute::Value(vec![bit])),
        Bitwise::Xor(DataAttribute::Value(vec![0])),
    ]);
    vec![mask.into(), compare(Operator::NotEqual, vec![0])]
}

fn in_set(set: &str) -> Expression {
    Expressions::Lookup(vec![Lookup::Set(set.to_owned()), Lookup::SourceRegister(Register::Reg1)]).into()
}

fn accept() -> Expression {
    verdict(vec![VerdictAttribute::Code(Verdict::Other(NF_ACCEPT))])
}

fn jump_to_wall() -> Expression {
    verdict(vec![VerdictAttribute::Code(Verdict::Jump), VerdictAttribute::Chain(WALL.to_owned())])
}

fn verdict(parts: Vec<VerdictAttribute>) -> Expression {
    let parts = vec![Immediate::DestinationRegister(Register::Verdict), Immediate::Data(DataAttribute::Verdict(parts))];
    Expressions::Immediate(parts).into()
}

/// `reject with tcp reset`.
fn reset() -> Expression {
    let kind = DefaultNla::new(NFTA_REJECT_TYPE, NFT_REJECT_TCP_RST.to_be_bytes().to_vec());
    Expressions::Other { expression_type: "reject".to_owned(), attributes: vec![kind] }.into()
}
