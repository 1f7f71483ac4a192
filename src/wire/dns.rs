//! stub, replaced by the dns branch
use std::net::IpAddr;
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct RecordPair {
    pub addresses: Vec<IpAddr>,
    pub ttl: u32,
    pub marker: Vec<String>,
}
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Reading {
    pub pair: RecordPair,
    pub soa_serial: Option<u32>,
    pub strange: Option<String>,
    pub signed_time: Option<u64>,
}
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum UpdateOutcome {
    Done,
    Conflict,
    Refused(String),
    Unknown(String),
    NotSent(String),
}
