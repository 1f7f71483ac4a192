//! The bench's own PostgreSQL client: just enough protocol to move a gigabyte either way, to read slowly, and to sit
//! idle by the ten thousand.

use crate::harness::sys::{Fail, Outcome};
use crate::rig::{DATABASE, USER};
use crate::systems::Running;
use ring::digest;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;

/// The largest piece read or written at once.
const CHUNK: usize = 64 * 1024;
/// Bytes of one CopyData message, as psql sends them.
const COPY_DATA: usize = 8 * 1024;

trait Wire: Read + Write + Send {}
impl<T: Read + Write + Send> Wire for T {}

/// One session without TLS and password.
pub struct Client {
    wire: Box<dyn Wire>,
    buffer: Vec<u8>,
    start: usize,
    end: usize,
}

/// The start-up packet of the load's role.
pub fn startup() -> Vec<u8> {
    let mut body = 196_608u32.to_be_bytes().to_vec();
    for word in ["user", USER, "database", DATABASE, ""] {
        body.extend_from_slice(word.as_bytes());
        body.push(0);
    }
    let mut packet = length(body.len() + 4).to_vec();
    packet.extend(body);
    packet
}

/// A simple query.
pub fn query(sql: &str) -> Vec<u8> {
    let mut packet = vec![b'Q'];
    packet.extend(length(sql.len() + 5));
    packet.extend_from_slice(sql.as_bytes());
    packet.push(0);
    packet
}

fn length(bytes: usize) -> [u8; 4] {
    u32::try_from(bytes).unwrap_or(u32::MAX).to_be_bytes()
}

impl Client {
    /// Connects (in the namespace of the calling thread) and logs in.
    pub fn open(on: &Running) -> Outcome<Client> {
        let wire: Box<dyn Wire> = if on.host.starts_with('/') {
            Box::new(UnixStream::connect(format!("{}/.s.PGSQL.{}", on.host, on.port))?)
        } else {
            let stream = TcpStream::connect(on.address()?)?;
            stream.set_nodelay(true)?;
            Box::new(stream)
        };
        let mut client = Client { wire, buffer: vec![0; CHUNK], start: 0, end: 0 };
        client.wire.write_all(&startup())?;
        client.until_ready()?;
        Ok(client)
    }

    /// Reads more; false at the end of the stream.
    fn fill(&mut self) -> Outcome<bool> {
        self.start = 0;
        self.end = self.wire.read(&mut self.buffer)?;
        Ok(self.end > 0)
    }

    fn take(&mut self, into: &mut [u8]) -> Outcome {
        let mut at = 0;
        while at < into.len() {
            if self.start == self.end && !self.fill()? {
                return Err(Fail("the session ended in the middle of an answer".to_owned()));
            }
            let n = (into.len() - at).min(self.end - self.start);
            into[at..at + n].copy_from_slice(&self.buffer[self.start..self.start + n]);
            self.start += n;
            at += n;
        }
        Ok(())
    }

    /// Reads messages up to ReadyForQuery or the start of a COPY from the client; hands over the bodies of CopyData and
    /// DataRow piece by piece, and how many bytes were read. An error message is an error.
    pub fn each(&mut self, mut on_data: impl FnMut(&[u8])) -> Outcome<()> {
        let mut error = None;
        loop {
            let mut head = [0; 5];
            self.take(&mut head)?;
            let mut left = u32::from_be_bytes([head[1], head[2], head[3], head[4]]).saturating_sub(4) as usize;
            if matches!(head[0], b'd' | b'D') {
                while left > 0 {
                    if self.start == self.end && !self.fill()? {
                        return Err(Fail("the session ended in the middle of a row".to_owned()));
                    }
                    let n = left.min(self.end - self.start);
                    on_data(&self.buffer[self.start..self.start + n]);
                    self.start += n;
                    left -= n;
                }
                continue;
            }
            let mut body = vec![0; left];
            self.take(&mut body)?;
            match head[0] {
                b'E' => {
                    let text = String::from_utf8_lossy(&body).replace('\0', " ");
                    // At the start of a session no ReadyForQuery follows.
                    if body.starts_with(b"SFATAL") {
                        return Err(Fail(text));
                    }
                    error = Some(text);
                }
                b'Z' | b'G' => return error.map_or(Ok(()), |error| Err(Fail(error))),
                _ => {}
            }
        }
    }

    fn until_ready(&mut self) -> Outcome {
        self.each(|_| {})
    }

    /// Runs a statement and hands over what it returns.
    pub fn run(&mut self, sql: &str, on_data: impl FnMut(&[u8])) -> Outcome {
        self.wire.write_all(&query(sql))?;
        self.each(on_data)
    }

    /// `COPY ... FROM STDIN` of these bytes.
    pub fn copy_in(&mut self, sql: &str, data: &[u8]) -> Outcome {
        self.run(sql, |_| {})?;
        let mut packet = Vec::with_capacity(CHUNK + 1024);
        for chunk in data.chunks(COPY_DATA) {
            packet.push(b'd');
            packet.extend(length(chunk.len() + 4));
            packet.extend_from_slice(chunk);
            if packet.len() + COPY_DATA > CHUNK {
                self.wire.write_all(&packet)?;
                packet.clear();
            }
        }
        packet.extend([b'c', 0, 0, 0, 4]);
        self.wire.write_all(&packet)?;
        self.until_ready()
    }
}

/// SHA-256 of what a statement returns.
pub fn sha256_of(client: &mut Client, sql: &str) -> Outcome<String> {
    let mut hash = digest::Context::new(&digest::SHA256);
    client.run(sql, |piece| hash.update(piece))?;
    Ok(data_encoding::HEXLOWER.encode(hash.finish().as_ref()))
}
