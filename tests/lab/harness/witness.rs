//! The witness of the lab: BIND 9, Knot or the embedded `portcullis witness`, on a host of its own; records moved by
//! hand with nsupdate, and direct questions to the authority.

use super::host::{Host, send, wait_dead};
use super::net::at;
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
    Knot,
    Embedded,
}

fn zone_text(server: &str, first_address: &str) -> String {
    let kind = |address: &str| if address.contains(':') { "AAAA" } else { "A" };
    format!(
        "$TTL 5\n@ IN SOA ns.{ZONE}. admin.{ZONE}. 1 3600 600 86400 1\n@ IN NS ns.{ZONE}.\n\
         ns IN {} {server}\ndb IN {} {first_address}\n",
        kind(server),
        kind(first_address)
    )
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
        fs::write(dir.join("zone"), zone_text(host.address(), first_address))?;
        let zone = format!("type primary; file \"zone\"; allow-update {{ key \"{KEY_NAME}\"; }};");
        Witness::named(host, key, dir, &zone)
    }

    /// A BIND that fetches the zone from `primary` when it starts without one, and then only when the SOA's refresh
    /// time (an hour) has passed: it lags for as long as a test lasts.
    pub fn secondary(host: Host, key: &str, primary: &str) -> Outcome<Witness> {
        let dir = host.lab_dir.join("named2");
        fs::create_dir(&dir)?;
        let zone = format!("type secondary; file \"zone\"; primaries {{ {primary} key \"{KEY_NAME}\"; }};");
        Witness::named(host, key, dir, &zone)
    }

    fn named(host: Host, key: &str, dir: PathBuf, zone: &str) -> Outcome<Witness> {
        let address = host.address().to_owned();
        let (v4, v6) = if address.contains(':') { ("none", &*address) } else { (&*address, "none") };
        let conf = format!(
            "options {{ directory \"{dir}\"; listen-on port 53 {{ {v4}; }}; listen-on-v6 port 53 {{ {v6}; }};\n\
             recursion no; dnssec-validation no; notify no; pid-file none; include \"{dir}/acl\";\n\
             session-keyfile \"{dir}/session.key\"; }};\n\
             controls {{ }};\n\
             key \"{KEY_NAME}\" {{ algorithm hmac-sha256; secret \"{key}\"; }};\n\
             zone \"{ZONE}\" {{ {zone} }};\n",
            dir = dir.display()
        );
        fs::write(dir.join("acl"), "allow-query { any; };\n")?;
        fs::write(dir.join("named.conf"), conf)?;
        let command = ["named", "-g", "-n", "1", "-c"].map(str::to_owned).into_iter();
        let command = command.chain([dir.join("named.conf").display().to_string()]).collect();
        Witness::new(host, Kind::Bind, key, dir, command)
    }

    /// Knot with the same zone; it takes an update only by an `acl` that names the key and the action.
    pub fn knot(host: Host, key: &str, first_address: &str) -> Outcome<Witness> {
        let dir = host.lab_dir.join("knot");
        fs::create_dir(&dir)?;
        let address = host.address().to_owned();
        fs::write(dir.join("zone"), zone_text(&address, first_address))?;
        let conf = format!(
            "server:\n    rundir: \"{dir}\"\n    listen: {address}@53\n    udp-workers: 1\n    tcp-workers: 1\n\
             log:\n  - target: stderr\n    any: info\n\
             database:\n    storage: \"{dir}\"\n\
             key:\n  - id: {KEY_NAME}\n    algorithm: hmac-sha256\n    secret: {key}\n\
             acl:\n  - id: updates\n    key: {KEY_NAME}\n    action: update\n\
             zone:\n  - domain: {ZONE}\n    storage: \"{dir}\"\n    file: zone\n    acl: updates\n",
            dir = dir.display()
        );
        let file = dir.join("knot.conf");
        fs::write(&file, conf)?;
        let command = vec!["knotd".to_owned(), "-c".to_owned(), file.display().to_string()];
        Witness::new(host, Kind::Knot, key, dir, command)
    }

    /// The embedded server, with its part of the pair's own configuration file.
    /// With `stepped`, its wall clock is what the file `witness/clock` adds to the machine's (libfaketime).
    pub fn embedded(host: Host, key: &str, config: &Path, stepped: bool) -> Outcome<Witness> {
        let dir = host.lab_dir.join("witness");
        fs::create_dir_all(&dir)?;
        let program = host.lab_dir.join("portcullis").display().to_string();
        let mut command = vec![program, "--config".to_owned(), config.display().to_string(), "witness".to_owned()];
        if stepped {
            let clock = dir.join("clock");
            fs::write(&clock, "+0\n")?;
            let words = [
                "env",
                "LD_PRELOAD=/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1",
                "DONT_FAKE_MONOTONIC=1",
                "FAKETIME_NO_CACHE=1",
            ];
            let file = format!("FAKETIME_TIMESTAMP_FILE={}", clock.display());
            command = words.map(str::to_owned).into_iter().chain([file]).chain(command).collect();
        }
        Witness::new(host, Kind::Embedded, key, dir, command)
    }

    fn new(host: Host, kind: Kind, key: &str, dir: PathBuf, command: Vec<String>) -> Outcome<Witness> {
        let key_text = format!("key \"{KEY_NAME}\" {{ algorithm hmac-sha256; secret \"{key}\"; }};\n");
        fs::write(dir.join("nsupdate.key"), key_text)?;
        let log = host.lab_dir.join(if host.name == "dns" { "witness.log" } else { "witness2.log" });
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
        wait_until(secs(60), "the DNS server to answer", || {
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

    /// A question over UDP to the authority itself, from the given network namespace; asked again after half a second
    /// of silence, three times. An answer without records is an empty list.
    pub fn ask(&self, from_ns: &str, name: &str, kind: RecordType) -> Outcome<Vec<RData>> {
        let server = at(self.address(), 53);
        in_netns(from_ns, || {
            let silent = |error: &Fail| error.0.contains("os error 11");
            let mut answer = ask_here(&server, name, kind);
            for _ in 0..2 {
                if answer.as_ref().err().is_some_and(silent) {
                    answer = ask_here(&server, name, kind);
                }
            }
            answer
        })
    }

    /// The addresses the service name has now.
    pub fn service_addresses(&self) -> Outcome<Vec<String>> {
        let kind = if self.address().contains(':') { RecordType::AAAA } else { RecordType::A };
        let data = self.ask(self.host.ns(), SERVICE, kind)?;
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
        self.host.exec("", &["nsupdate", "-t", "10", "-k", &key, &script]).map(drop)
    }

    /// Points the service name at an address by hand; the marker is left alone.
    pub fn move_record_to(&self, address: &str) -> Outcome {
        let kind = if address.contains(':') { "AAAA" } else { "A" };
        self.nsupdate(&format!("update delete {SERVICE} {kind}\nupdate add {SERVICE} 5 {kind} {address}"))
    }

    /// Who may ask BIND from now on, by its own word for it (`any`, `none`).
    pub fn allow_query(&self, who: &str) -> Outcome {
        fs::write(self.dir.join("acl"), format!("allow-query {{ {who}; }};\n"))?;
        let pid = *self.pid.lock().unwrap_or_else(PoisonError::into_inner);
        send(pid.ok_or("no DNS server is running")?, Signal::HUP)
    }

    /// The files that hold the zone (the zone itself and its journal), as a backup takes them; the server is stopped.
    pub fn backup(&self) -> Outcome<Vec<(PathBuf, Vec<u8>)>> {
        let mut kept = Vec::new();
        for name in ["zone", "zone.jnl"] {
            let path = self.dir.join(name);
            if path.exists() {
                kept.push((path.clone(), fs::read(&path)?));
            }
        }
        Ok(kept)
    }

    /// Puts a backup back in place of what there is; the server is stopped.
    pub fn restore(&self, backup: &[(PathBuf, Vec<u8>)]) -> Outcome {
        self.forget_zone()?;
        for (path, bytes) in backup {
            fs::write(path, bytes)?;
        }
        Ok(())
    }

    /// Removes the zone from disk (a secondary fetches it anew when it starts); the server is stopped.
    pub fn forget_zone(&self) -> Outcome {
        for name in ["zone", "zone.jnl"] {
            let path = self.dir.join(name);
            if path.exists() {
                fs::remove_file(path)?;
            }
        }
        Ok(())
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
    let socket = UdpSocket::bind(if server.starts_with('[') { "[::]:0" } else { "0.0.0.0:0" })?;
    socket.connect(server)?;
    socket.set_read_timeout(Some(millis(1500)))?;
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
    let address = |data: &RData| match data {
        RData::A(a) => Some(a.0.to_string()),
        RData::AAAA(aaaa) => Some(aaaa.0.to_string()),
        _ => None,
    };
    data.iter().filter_map(address).collect()
}

pub fn marker_in(data: &[RData]) -> Option<String> {
    let [RData::TXT(text)] = data else { return None };
    Some(text.txt_data.iter().map(|part| String::from_utf8_lossy(part).into_owned()).collect())
}
