//! The zone on disk: one JSON file with a checksum, replaced as a whole.
//!
//! **Invariants:** when `Store::write` returns `Ok`, the new zone survives a crash of the machine; a crash at any
//! moment leaves the old file or the new one; a file whose checksum does not fit is never served; one process at a
//! time.

use super::zone::Zone;
use crate::base::fault::{ExitCode, Fault};
use data_encoding::HEXLOWER;
use hickory_server::proto::rr::{Name, Record};
use hickory_server::proto::serialize::binary::{BinDecodable, BinEncodable};
use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// Largest file read, in bytes; a zone of as many records as it takes stays far below. A larger one is refused.
const MAX_FILE: u64 = 16 * 1024 * 1024;

/// What kind of file it is, and in which form.
const FORMAT: &str = "portcullis witness zone 1";

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct ZoneFile {
    format: String,
    /// CRC-32C of `zone` as compact JSON, in hexadecimal.
    checksum: String,
    zone: Body,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Body {
    origin: String,
    records: Vec<Line>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Line {
    /// For people; the program reads `wire`.
    text: String,
    /// The record as in a DNS message, in hexadecimal.
    wire: String,
}

/// The file, held by this process alone.
#[derive(Debug)]
pub(super) struct Store {
    path: PathBuf,
    /// Holds the lock; the kernel lets it go with the process, however that ends.
    _lock: File,
}

/// Why a zone was not written.
#[derive(Debug)]
pub(super) enum Unwritten {
    /// The old file stands.
    Old(io::Error),
    /// The old or the new file stands, and only a restart can tell.
    Unclear(io::Error),
}

impl Store {
    /// Takes the store at `path`; fails when another witness has it.
    pub(super) fn open(path: &Path) -> Result<Store, Fault> {
        let failed = |why: io::Error| {
            fault(format!("the witness's store {} cannot be used: {why}; make its directory writable", path.display()))
        };
        let lock_path = beside(path, "lock");
        let lock = OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(lock_path);
        let lock = lock.map_err(failed)?;
        match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Store { path: path.to_owned(), _lock: lock }),
            Err(rustix::io::Errno::WOULDBLOCK) => {
                Err(fault(format!("another witness uses the store {}; stop that one first", path.display())))
            }
            Err(error) => Err(failed(error.into())),
        }
    }

    /// The zone as last written, `None` when there never was one.
    pub(super) fn read(&self) -> Result<Option<Zone>, Fault> {
        let file = match File::open(&self.path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => {
                let path = self.path.display();
                return Err(fault(format!("the witness's store {path} cannot be read: {error}; correct its rights")));
            }
        };
        let mut bytes = Vec::new();
        let read = file.take(MAX_FILE).read_to_end(&mut bytes).map_err(|error| error.to_string());
        read.and_then(|_| decode(&bytes)).map(Some).map_err(|why| {
            fault(format!(
                "the witness's store {} is damaged ({why}); nothing is served from it: restore it from a \
                 backup, or move it away and run `portcullis promote` on the node that shall be active",
                self.path.display()
            ))
        })
    }

    /// Replaces the file: write beside it, fsync, rename, fsync the directory.
    pub(super) fn write(&self, zone: &Zone) -> Result<(), Unwritten> {
        let fresh = beside(&self.path, "new");
        self.prepare(zone, &fresh).map_err(Unwritten::Old)?;
        std::fs::rename(&fresh, &self.path).map_err(Unwritten::Unclear)?;
        let directory = self.path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        File::open(directory).and_then(|directory| directory.sync_all()).map_err(Unwritten::Unclear)
    }

    fn prepare(&self, zone: &Zone, fresh: &Path) -> io::Result<()> {
        let bytes = encode(zone).map_err(io::Error::other)?;
        let mut file = OpenOptions::new().create(true).truncate(true).write(true).mode(0o600).open(fresh)?;
        file.write_all(&bytes)?;
        file.sync_all()
    }
}

fn beside(path: &Path, extension: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".");
    name.push(extension);
    PathBuf::from(name)
}

fn fault(text: String) -> Fault {
    Fault::new(ExitCode::Failed, text)
}

fn encode(zone: &Zone) -> Result<Vec<u8>, String> {
    let line = |record: Record| {
        let wire = record.to_bytes().map_err(|error| error.to_string())?;
        Ok(Line { text: record.to_string(), wire: HEXLOWER.encode(&wire) })
    };
    let records = zone.records().into_iter().map(line).collect::<Result<_, String>>()?;
    let zone = Body { origin: zone.origin().to_ascii(), records };
    let file = ZoneFile { format: FORMAT.into(), checksum: checksum(&zone)?, zone };
    serde_json::to_vec_pretty(&file).map_err(|error| error.to_string())
}

fn decode(bytes: &[u8]) -> Result<Zone, String> {
    let file: ZoneFile = serde_json::from_slice(bytes).map_err(|error| error.to_string())?;
    if file.format != FORMAT {
        return Err(format!("its format is not \"{FORMAT}\""));
    }
    if checksum(&file.zone)? != file.checksum {
        return Err("its checksum does not fit".into());
    }
    let origin = Name::from_ascii(&file.zone.origin).map_err(|error| error.to_string())?;
    let record = |line: &Line| {
        let wire = HEXLOWER.decode(line.wire.as_bytes()).map_err(|error| error.to_string())?;
        Record::from_bytes(&wire).map_err(|error| error.to_string())
    };
    Zone::from_records(origin, file.zone.records.iter().map(record).collect::<Result<_, String>>()?)
}

fn checksum(body: &Body) -> Result<String, String> {
    let bytes = serde_json::to_vec(body).map_err(|error| error.to_string())?;
    Ok(format!("{:08x}", crc32c::crc32c(&bytes)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn zone(last: u8) -> Zone {
        let name = |text: &str| Name::from_ascii(text).unwrap();
        let mut zone = Zone::new(name("example.org."), name("ns.example.org."), 5);
        zone.add_address(&name("db.example.org."), 5, std::net::IpAddr::from([192, 0, 2, last]));
        zone
    }

    #[test]
    fn what_is_written_is_read_again() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("witness.zone.json");
        let store = Store::open(&path).unwrap();
        assert_eq!(store.read().unwrap(), None);
        for last in 1..4 {
            store.write(&zone(last)).unwrap();
            assert_eq!(store.read().unwrap(), Some(zone(last)));
        }
        let second = Store::open(&path).unwrap_err();
        assert!(second.text.contains("another witness"), "{second}");
        drop(store);
        assert!(Store::open(&path).is_ok());
    }

    #[test]
    fn a_crash_before_the_rename_leaves_the_old_zone() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("witness.zone.json");
        let store = Store::open(&path).unwrap();
        store.write(&zone(1)).unwrap();
        std::fs::write(beside(&path, "new"), b"{ half a fi").unwrap();
        assert_eq!(store.read().unwrap(), Some(zone(1)));
        store.write(&zone(2)).unwrap();
        assert_eq!(store.read().unwrap(), Some(zone(2)));
    }

    #[test]
    fn a_damaged_file_is_refused_whatever_byte_was_hit() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("witness.zone.json");
        let store = Store::open(&path).unwrap();
        store.write(&zone(1)).unwrap();
        let good = std::fs::read(&path).unwrap();
        for place in 0..good.len() {
            let mut bad = good.clone();
            bad[place] ^= 1;
            std::fs::write(&path, &bad).unwrap();
            // White space between the words may change without harm; then the zone must be the same.
            match store.read() {
                Ok(read) => assert_eq!(read, Some(zone(1)), "byte {place}"),
                Err(fault) => assert!(fault.text.contains("damaged") && fault.text.contains("restore"), "{fault}"),
            }
        }
        for length in [0, 1, good.len() / 2, good.len() - 1] {
            std::fs::write(&path, &good[..length]).unwrap();
            assert!(store.read().is_err(), "{length} bytes");
        }
    }

    #[test]
    fn a_disk_that_takes_nothing_is_an_error_and_the_old_zone_stands() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("witness.zone.json");
        let store = Store::open(&path).unwrap();
        store.write(&zone(1)).unwrap();
        std::fs::create_dir(beside(&path, "new")).unwrap();
        assert!(matches!(store.write(&zone(2)), Err(Unwritten::Old(_))));
        assert_eq!(store.read().unwrap(), Some(zone(1)));
    }
}
