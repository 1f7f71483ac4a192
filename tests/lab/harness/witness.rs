//! The witness of the lab: BIND 9 or the embedded `portcullis witness`, on a host of its own; records moved by hand
//! with nsupdate, and direct questions to the authority.

use super::host::{Host, send, wait_dead};
use super::sys::{Fail, Outcome, in_netns, millis, secs, wait_until};
use hickory_proto::op::{Message, Query};
use hickory_proto::rr::{Name, RData, RecordType};
use rustix::process::Signal;
use std::fs;
use std::net::UdpSocket;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

pub const ZONE: &str = "example.org";
pub const SERVICE: &str = "db.example.org";
pub const MARKER: &str = "_portcullis.db.example.org";
pub const KEY_NAME: &str = "portcullis";

/// Which program answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Bind,
    Embedded,
}

/// The DNS server of the lab; may be killed, frozen and started again.
#[derive(Debug)]
pub struct Witness {
    pub host: Host,
    pub kind: Kind,
    pub log: PathBuf,
    dir: PathBuf,
    /// The key in base64, as all sides share it.
    key: String,
    command: Vec<String>,
    pid: Mutex<Option<i32>>,
}

impl Witness {
    /// BIND with the zone, the service's first address, and updates allowed to the key.
    pub fn bind(host: Host, key: &str, first_address: &str) -> Outcome<Witness> {
        let dir = host.lab_dir.join("named");
        fs::create_dir(&dir)?;
        let address = host.address().to_owned();
        let zone = format!(
            "$TTL 5\n@ IN SOA ns.{ZONE}. admin.{ZONE}. 1 3600 600 86400 1\n@ IN NS ns.{ZONE}.\n\
             ns IN A {address}\ndb IN A {first_address}\n"
        );
        fs::write(dir.join("zone"), zone)?;
        let conf = format!(
            "options {{ directory \"{dir}\"; listen-on port 53 {{ {address}; }}; listen-on-v6 {{ none; }};\n\
             recursion no; dnssec-validation no; notify no; pid-file none; allow-query {{ any; }};\n\
             session-keyfile \"{dir}/session.key\"; }};\n\
             controls {{ }};\n\
             key \"{KEY_NAME}\" {{ algorithm hmac-sha256; secret \"{key}\"; }};\n\
             zone \"{ZONE}\" {{ type primary; file \"zone\"; allow-update {{ key \"{KEY_NAME}\"; }}; }};\n",
            dir = dir.display()
        );
        fs::write(dir.join("named.conf"), conf)?;
        let command = ["named", "-g", "-4", "-n", "1", "-c"].map(str::to_owned).into_iter();
        let command = command.chain([dir.join("named.conf").display().to_string()]).collect();
        Witness::new(host, Kind::Bind, key, dir, command)
    }

    /// The embedded server, with its part of the pair's own configuration file.
    pub fn embedded(host: Host, key: &str, config: &Path) -> Outcome<Witness> {
        let dir = host.lab_dir.join("witness");
        fs::create_dir_all(&dir)?;
        let program = host.lab_dir.join("portcullis").display().to_string();
        let command = vec![program, "--config".to_owned(), config.display().to_string(), "witness".to_owned()];
        Witness::new(host, Kind::Embedded, key, dir, command)
    }

    fn new(host: Host, kind: Kind, key: &str, dir: PathBuf, command: Vec<String>) -> Outcome<Witness> {
        let key_text = format!("key \"{KEY_NAME}\" {{ algorithm hmac-sha256; secret \"{key}\"; }};\n");
        fs::write(dir.join("nsupdate.key"), key_text)?;
        let log = host.lab_dir.join("witness.log");
        Ok(Witness { host, kind, log, dir, key: key.to_owned(), command, pid: Mutex::new(None) })
    }

    pub fn address(&self) -> &str {
        self.host.address()
    }

    /// Starts the server and waits until it answers for the service.
    pub fn start(&self) -> Outcome {
        let words: Vec<&str> = self.command.iter().map(String::as_str).collect();
        let pid = self.host.spawn(&self.log, &[], &words)?;
        *self.pid.lock().unwrap_or_else(PoisonError::into_inner) = Some(pid);
        wait_until(secs(10), "the DNS server to answer", || {
            Ok(self.ask(self.host.ns(), MARKER, RecordType::SOA).is_ok())
        })
        .map_err(|error| Fail(format!("{error}; its log: {}", super::sys::tail(&self.log, 8))))
        .map(drop)
    }

    /// SIGKILL; the zone and its journal stay on disk.
    pub fn kill(&self) -> Outcome {
        let pid = self.pid.lock().unwrap_or_else(PoisonError::into_inner).take().ok_or("no DNS server is running")?;
        send(pid, Signal::KILL)?;
        wait_dead(pid)
    }

    /// Deaf and dumb, but its machine still accepts packets: the worse way to be dead.
    pub fn freeze(&self) -> Outcome {
        self.host.freeze().map(drop)
    }

    pub fn thaw(&self) -> Outcome {
        self.host.thaw().map(drop)
    }

    /// One question over UDP to the authority itself, from the given network namespace; half a second of patience.
    /// An answer without records is an empty list.
    pub fn ask(&self, from_ns: &str, name: &str, kind: RecordType) -> Outcome<Vec<RData>> {
        let server = format!("{}:53", self.address());
        in_netns(from_ns, || ask_here(&server, name, kind))
    }

    /// The addresses the service name has now.
    pub fn service_addresses(&self) -> Outcome<Vec<String>> {
        let data = self.ask(self.host.ns(), SERVICE, RecordType::A)?;
        Ok(addresses_in(&data))
    }

    /// The marker's text, when there is exactly one.
    pub fn marker(&self) -> Outcome<Option<String>> {
        Ok(marker_in(&self.ask(self.host.ns(), MARKER, RecordType::TXT)?))
    }

    /// Runs an nsupdate script (without `server` and `send`) signed with the pair's key, as a person would by hand.
    pub fn nsupdate(&self, script: &str) -> Outcome {
        let file = self.dir.join("script");
        fs::write(&file, format!("server {}\nzone {ZONE}\n{script}\nsend\n", self.address()))?;
        let key = self.dir.join("nsupdate.key").display().to_string();
        let script = file.display().to_string();
        self.host.exec("", &["nsupdate", "-t", "3", "-k", &key, &script]).map(drop)
    }

    /// Points the service name at an address by hand; the marker is left alone.
    pub fn move_record_to(&self, address: &str) -> Outcome {
        self.nsupdate(&format!("update delete {SERVICE} A\nupdate add {SERVICE} 5 A {address}"))
    }

    pub fn key(&self) -> &str {
        &self.key
    }
}

/// [`Witness::ask`] from the namespace the calling thread is in.
pub fn ask_here(server: &str, name: &str, kind: RecordType) -> Outcome<Vec<RData>> {
    let wrong = |error: &dyn std::fmt::Display| Fail(format!("asking {server} for {name}: {error}"));
    let mut question = Message::query();
    question.metadata.recursion_desired = false;
    let name = Name::from_ascii(format!("{name}.")).map_err(|error| wrong(&error))?;
    question.add_query(Query::query(name, kind));
    let socket = UdpSocket::bind("0.0.0.0:0")?;
    socket.connect(server)?;
    socket.set_read_timeout(Some(millis(500)))?;
    socket.send(&question.to_vec().map_err(|error| wrong(&error))?)?;
    let mut buffer = [0u8; 4096];
    let length = socket.recv(&mut buffer)?;
    let answer = Message::from_vec(&buffer[..length]).map_err(|error| wrong(&error))?;
    if answer.metadata.id != question.metadata.id {
        return Err(wrong(&"an answer to another question"));
    }
    Ok(answer.answers.into_iter().map(|record| record.data).collect())
}

pub fn addresses_in(data: &[RData]) -> Vec<String> {
    data.iter().filter_map(|data| if let RData::A(a) = data { Some(a.0.to_string()) } else { None }).collect()
}

pub fn marker_in(data: &[RData]) -> Option<String> {
    let [RData::TXT(text)] = data else { return None };
    Some(text.txt_data.iter().map(|part| String::from_utf8_lossy(part).into_owned()).collect())
}
