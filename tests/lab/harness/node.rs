//! A node of the pair: a machine with a PostgreSQL cluster and the daemon under test, its configuration file, and the
//! ways to ask it (HTTP, command line) and to hurt it.

use super::host::{Host, is_alive, send, wait_dead};
use super::net;
use super::postgres::{Cluster, SYSTEM_USER, Template};
use super::sys::{Fail, Outcome, in_netns, now, secs, tail, wait_until};
use portcullis::base::time::{Duration, Instant};
use rustix::process::Signal;
use serde_json::Value;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Output;
use std::sync::{Mutex, PoisonError};

pub const GATE_PORT: u16 = 6432;
pub const PEER_PORT: u16 = 6433;
pub const STATUS_PORT: u16 = 6434;

/// How long any verb of the program may take; a promote of a dead node takes W and a few seconds.
const VERB_LIMIT: Duration = secs(180);

/// What a verb of the program said.
#[derive(Debug, Clone)]
pub struct Said {
    pub line: String,
    pub code: i32,
    pub out: String,
    pub err: String,
    pub started: Instant,
    pub ended: Instant,
}

impl Said {
    fn of(line: String, started: Instant, output: &Output) -> Said {
        Said {
            line,
            code: output.status.code().unwrap_or(-1),
            out: String::from_utf8_lossy(&output.stdout).into_owned(),
            err: String::from_utf8_lossy(&output.stderr).into_owned(),
            started,
            ended: now(),
        }
    }

    /// Fails with everything it said unless it ended with this code.
    pub fn expect(self, code: i32) -> Outcome<Said> {
        if self.code == code {
            return Ok(self);
        }
        Err(Fail(format!("`portcullis {}` ended with {}, not {code}:\n{}{}", self.line, self.code, self.out, self.err)))
    }
}

#[derive(Debug)]
pub struct Node {
    pub host: Host,
    pub postgres: Cluster,
    /// The node's own folder: state, run, sock, pg, config.
    pub dir: PathBuf,
    pub config: PathBuf,
    pub log: PathBuf,
    daemon: Mutex<Option<i32>>,
}

impl Node {
    /// Lays out the folders; nothing runs yet.
    pub fn new(host: Host) -> Outcome<Node> {
        let template = Template::once()?;
        let dir = host.lab_dir.join(&host.name);
        std::fs::create_dir(&dir)?;
        template.give(&dir, 0o755)?;
        for (name, mode) in [("state", 0o700), ("run", 0o755)] {
            std::fs::create_dir(dir.join(name))?;
            template.give(&dir.join(name), mode)?;
        }
        let postgres = Cluster::new(&dir)?;
        let config = host.lab_dir.join(format!("{}.toml", host.name));
        let log = host.lab_dir.join(format!("{}.log", host.name));
        Ok(Node { host, postgres, dir, config, log, daemon: Mutex::new(None) })
    }

    pub fn name(&self) -> &str {
        &self.host.name
    }

    pub fn ns(&self) -> &str {
        self.host.ns()
    }

    pub fn address(&self) -> &str {
        self.host.address()
    }

    fn program(&self) -> String {
        self.host.lab_dir.join("portcullis").display().to_string()
    }

    /// The command line of a verb of the program, as run inside this node.
    pub fn command_line(&self, words: &[&str]) -> Vec<String> {
        let config = self.config.display().to_string();
        let mut line = vec![self.program(), "--config".to_owned(), config, "--node".to_owned(), self.name().to_owned()];
        line.extend(words.iter().map(|word| (*word).to_owned()));
        line
    }

    /// Changes the configuration file; for the next start of the daemon.
    pub fn reconfigure(&self, from: &str, to: &str) -> Outcome {
        let text = std::fs::read_to_string(&self.config)?;
        if !text.contains(from) {
            return Err(Fail(format!("{} has no {from:?}", self.config.display())));
        }
        Ok(std::fs::write(&self.config, text.replacen(from, to, 1))?)
    }

    /// A file of its `state_dir` as the machine itself has it, mounts included.
    pub fn state_seen_from_here(&self, file: &str) -> Outcome<PathBuf> {
        let inside = self.dir.join("state").join(file);
        Ok(PathBuf::from(format!("/proc/{}/root{}", self.host.init_pid()?, inside.display())))
    }

    /// The node's gate as clients dial it by address.
    pub fn gate(&self) -> Outcome<SocketAddr> {
        Ok(net::at(self.address(), GATE_PORT).parse()?)
    }

    /// Starts the daemon as root, as a unit without a service manager would, and waits until its status page answers.
    pub fn start_daemon(&self) -> Outcome {
        self.start_daemon_with_log(&self.log)
    }

    /// The same with its standard error elsewhere: a pipe that nobody reads, for one.
    pub fn start_daemon_with_log(&self, log: &Path) -> Outcome {
        let filter = std::env::var("LAB_LOG").unwrap_or_else(|_| "info".to_owned());
        let line = self.command_line(&["daemon"]);
        let words: Vec<&str> = line.iter().map(String::as_str).collect();
        let pid = self.host.spawn(log, &[("RUST_LOG", &filter)], &words)?;
        *self.daemon.lock().unwrap_or_else(PoisonError::into_inner) = Some(pid);
        wait_until(secs(60), &format!("the daemon on {} to answer", self.name()), || {
            Ok(!is_alive(pid) || self.status().map(|_| true)?)
        })?;
        if is_alive(pid) { Ok(()) } else { Err(Fail(format!("the daemon ended: {}", tail(&self.log, 5)))) }
    }

    /// A signal to the daemon; after SIGKILL it is gone when this returns. Returns the moment just before the signal.
    pub fn kill_daemon(&self, signal: Signal) -> Outcome<Instant> {
        let pid = self.daemon_pid()?;
        let before = now();
        send(pid, signal)?;
        if signal == Signal::KILL {
            self.daemon.lock().unwrap_or_else(PoisonError::into_inner).take();
            wait_dead(pid)?;
        }
        Ok(before)
    }

    /// The n-th record that its daemon appends from now on is its last (a debug build: io/journal.rs); 0 takes it back.
    /// Returns how many were left.
    pub fn crash_at_record(&self, n: u32) -> Outcome<Option<u32>> {
        let file = self.dir.join("state/crash-at-record");
        let left = std::fs::read_to_string(&file).ok().and_then(|text| text.trim().parse().ok());
        if n == 0 {
            let _not_there = std::fs::remove_file(&file);
            return Ok(left);
        }
        let fresh = self.dir.join("crash-at-record");
        Template::once()?.write_secret(&fresh, &n.to_string())?;
        std::fs::rename(fresh, file)?;
        Ok(left)
    }

    /// SIGTERM, and waits for a clean end.
    pub fn stop_daemon(&self) -> Outcome {
        let pid = self.daemon_pid()?;
        send(pid, Signal::TERM)?;
        wait_until(secs(60), "the daemon to end after SIGTERM", || Ok(!is_alive(pid)))?;
        self.daemon.lock().unwrap_or_else(PoisonError::into_inner).take();
        Ok(())
    }

    pub fn daemon_pid(&self) -> Outcome<i32> {
        let daemon = *self.daemon.lock().unwrap_or_else(PoisonError::into_inner);
        daemon.ok_or_else(|| Fail(format!("no daemon was started on {}", self.name())))
    }

    /// The machine loses power: wire, then every process, then what lay in memory (sockets and their lock files under
    /// /run). Returns the moment the wire went dark.
    pub fn power_off(&self) -> Outcome<Instant> {
        self.daemon.lock().unwrap_or_else(PoisonError::into_inner).take();
        let dark = self.host.power_off()?;
        for folder in [&self.postgres.socket_dir, &self.dir.join("run")] {
            for entry in std::fs::read_dir(folder)?.flatten().filter(|entry| !entry.path().is_dir()) {
                std::fs::remove_file(entry.path())?;
            }
        }
        Ok(dark)
    }

    /// Boots the machine as its units would: the daemon, and PostgreSQL only if `may-start-primary` allows it.
    /// Returns whether it was allowed.
    pub fn boot(&self) -> Outcome<bool> {
        self.host.power_on()?;
        let allowed = self.start_postgres_as_the_unit_does()?;
        self.start_daemon()?;
        Ok(allowed)
    }

    /// `ExecStartPre=portcullis may-start-primary`, then `pg_ctl start`.
    pub fn start_postgres_as_the_unit_does(&self) -> Outcome<bool> {
        let allowed = self.may_start_primary()?;
        if allowed {
            self.postgres.start(&self.host)?;
        }
        Ok(allowed)
    }

    /// The answer to the PostgreSQL unit's question, asked as the unit's user.
    pub fn may_start_primary(&self) -> Outcome<bool> {
        let said = self.cli_as(SYSTEM_USER, &["may-start-primary"])?;
        match said.code {
            0 => Ok(true),
            3 => Ok(false),
            other => Err(Fail(format!("may-start-primary ended with {other}, not 0 or 3: {}{}", said.out, said.err))),
        }
    }

    /// A verb of the program, run on this node as root. Never waits longer than [`VERB_LIMIT`].
    pub fn cli(&self, words: &[&str]) -> Outcome<Said> {
        self.cli_as("", words)
    }

    pub fn cli_as(&self, user: &str, words: &[&str]) -> Outcome<Said> {
        let line = self.command_line(words);
        let line: Vec<&str> = line.iter().map(String::as_str).collect();
        let started = now();
        let output = self.host.exec_within(VERB_LIMIT, user, &line)?;
        Ok(Said::of(words.join(" "), started, &output))
    }

    /// [`Node::cli`] whose lines are handed over as they come.
    pub fn cli_live(&self, words: &[&str], on_line: impl FnMut(&str)) -> Outcome<Said> {
        let line = self.command_line(words);
        let line: Vec<&str> = line.iter().map(String::as_str).collect();
        let started = now();
        let (code, out) = self.host.exec_live(VERB_LIMIT, &line, on_line)?;
        Ok(Said { line: words.join(" "), code, out, err: String::new(), started, ended: now() })
    }

    /// GET from the node's status server, asked inside the node: works while its network is cut.
    pub fn http(&self, path: &str) -> Outcome<(u16, String)> {
        http_from(self.ns(), if self.address().contains(':') { "::1" } else { "127.0.0.1" }, path)
    }

    /// `status.json`, or why not.
    pub fn status(&self) -> Outcome<Value> {
        let (code, body) = self.http("/status.json")?;
        if code != 200 {
            return Err(Fail(format!("/status.json on {} answered {code}", self.name())));
        }
        Ok(serde_json::from_str(&body)?)
    }

    pub fn role(&self) -> Outcome<String> {
        Ok(text_at(&self.status()?, "/role"))
    }

    pub fn gate_state(&self) -> Outcome<String> {
        Ok(text_at(&self.status()?, "/gate/state"))
    }

    pub fn gate_is_open(&self) -> Outcome<bool> {
        Ok(self.status()?.pointer("/gate/open") == Some(&Value::Bool(true)))
    }

    pub fn epoch(&self) -> Outcome<u64> {
        self.status()?.pointer("/epoch").and_then(Value::as_u64).ok_or_else(|| Fail("status has no epoch".to_owned()))
    }

    /// Is the VIP on this node's card?
    pub fn has_vip(&self) -> Outcome<bool> {
        net::has_address(self.ns(), net::VIP)
    }

    pub fn wait_active(&self, deadline: Duration) -> Outcome<Duration> {
        self.wait_status(deadline, "to be active with an open gate", |status| {
            text_at(status, "/role") == "active" && status.pointer("/gate/open") == Some(&Value::Bool(true))
        })
    }

    pub fn wait_role(&self, role: &str, deadline: Duration) -> Outcome<Duration> {
        self.wait_status(deadline, &format!("to be {role}"), |status| text_at(status, "/role") == role)
    }

    /// A daemon answers before it has looked at its PostgreSQL; a command of the first moment would be refused.
    pub fn wait_postgres(&self, role: &str) -> Outcome<Duration> {
        self.wait_status(secs(60), &format!("to see its PostgreSQL as a {role}"), |status| {
            status.pointer("/postgres/up") == Some(&Value::Bool(true)) && text_at(status, "/postgres/role") == role
        })
    }

    pub fn wait_peer(&self) -> Outcome<Duration> {
        self.wait_status(secs(60), "to hear its peer", |status| {
            status.pointer("/peer/reachable") == Some(&Value::Bool(true))
        })
    }

    /// `rejoin NAME`, asked for here, once the nodes hear each other: a node that just came back is dialled again only
    /// after a moment.
    pub fn rejoin(&self, name: &str) -> Outcome<Said> {
        self.wait_peer()?;
        self.cli(&["rejoin", name])?.expect(0)
    }

    pub fn wait_in_sync(&self, deadline: Duration) -> Outcome<Duration> {
        self.wait_status(deadline, "to be in sync with its standby", |status| {
            status.pointer("/replication/in_sync") == Some(&Value::Bool(true))
        })
    }

    /// Polls the status until it satisfies; the error quotes the last one seen.
    pub fn wait_status(&self, deadline: Duration, what: &str, good: impl Fn(&Value) -> bool) -> Outcome<Duration> {
        wait_until(deadline, &format!("{} {what}", self.name()), || {
            let status = self.status()?;
            if good(&status) { Ok(true) } else { Err(Fail(summary(&status))) }
        })
    }

    /// Everything a person would look at first.
    pub fn diagnosis(&self) -> String {
        let status = self.status().map(|status| serde_json::to_string_pretty(&status).unwrap_or_default());
        let addresses = super::sys::sh_words(&format!("ip -n {} -o addr show", self.ns()));
        let processes = self.host.exec("", &["ps", "-eo", "pid,ppid,stat,user,etimes,args"]);
        let show = |outcome: Outcome<String>| outcome.unwrap_or_else(|error| format!("({error})"));
        format!(
            "=== {name}: status.json\n{}\n=== {name}: addresses\n{}\n=== {name}: processes\n{}\n\
             === {name}: daemon log\n{}\n=== {name}: PostgreSQL log\n{}\n=== {name}: pg_ctl log\n{}\n",
            show(status),
            show(addresses),
            show(processes),
            tail(&self.log, 150),
            tail(&self.postgres.log, 60),
            tail(&self.dir.join("pglog/start.log"), 10),
            name = self.name(),
        )
    }
}

/// The text at a JSON pointer, empty when it is not there.
pub fn text_at(status: &Value, pointer: &str) -> String {
    status.pointer(pointer).and_then(Value::as_str).unwrap_or_default().to_owned()
}

fn summary(status: &Value) -> String {
    let part = |pointer: &str| status.pointer(pointer).map(Value::to_string).unwrap_or_default();
    format!(
        "role {} epoch {} gate {} replication {} peer {} witness {} procedure {}",
        part("/role"),
        part("/epoch"),
        part("/gate"),
        part("/replication"),
        part("/peer"),
        part("/witness"),
        part("/procedure")
    )
}

/// HTTP/1.0 GET of a status server from a namespace, with patience: who asks once must not fail for a busy machine.
pub fn http_from(ns: &str, address: &str, path: &str) -> Outcome<(u16, String)> {
    let target: SocketAddr = net::at(address, STATUS_PORT).parse()?;
    in_netns(ns, || http_within(secs(15), target, path))
}

/// [`http_from`] in the namespace that the calling thread is in; a second of patience, for those who look again.
pub fn http_here(target: SocketAddr, path: &str) -> Outcome<(u16, String)> {
    http_within(secs(1), target, path)
}

fn http_within(patience: Duration, target: SocketAddr, path: &str) -> Outcome<(u16, String)> {
    let mut stream = TcpStream::connect_timeout(&target, patience)?;
    stream.set_read_timeout(Some(patience))?;
    stream.set_write_timeout(Some(patience))?;
    stream.write_all(format!("GET {path} HTTP/1.0\r\nHost: lab\r\nConnection: close\r\n\r\n").as_bytes())?;
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes)?;
    let text = String::from_utf8_lossy(&bytes);
    let (head, body) = text.split_once("\r\n\r\n").ok_or("the status server's answer has no end of headers")?;
    let code = head.split_whitespace().nth(1).ok_or("the status server's answer has no status code")?.parse()?;
    Ok((code, body.to_owned()))
}
