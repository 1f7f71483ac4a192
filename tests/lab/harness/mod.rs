//! The lab: two nodes with real PostgreSQL, a DNS server and a client host on one machine, each in namespaces of its
//! own, with real wires between them that can be cut. Shared by the lab tests and the demo.
//!
//! It is NOT a simulator: nothing here stands in for anything. Times are CLOCK_BOOTTIME, which all namespaces share, so
//! moments seen on different hosts compare directly.
//!
//! **Invariants:** whatever way the lab process ends, nothing is left (see [`host::Lifeline`]); only processes that the
//! lab started are ever signalled; every wait has a deadline.
#![allow(dead_code, reason = "the tests and the demo each use their part")]

pub mod client;
pub mod config;
pub mod dns_relay;
pub mod host;
pub mod net;
pub mod node;
pub mod postgres;
pub mod raw;
mod sweep;
pub mod sys;
pub mod watch;
pub mod witness;

use config::{Keys, Options};
use dns_relay::DnsRelay;
use host::{Boot, Host, Lifeline};
use net::{Plug, Switch};
use node::Node;
use std::fs;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use sys::{Outcome, secs};
use witness::{Kind, Witness};

static LABS_MADE: AtomicU32 = AtomicU32::new(0);

/// Fields are dropped in this order: machines first, then the lifeline, which waits for the janitor.
#[derive(Debug)]
pub struct Lab {
    pub a: Node,
    pub b: Node,
    /// With `third` in the options.
    pub c: Option<Node>,
    pub witness: Witness,
    /// With `secondary` in the options; not running at first.
    pub secondary: Option<Witness>,
    /// With `relay` in the options; passes everything at first.
    pub relay: Option<DnsRelay>,
    pub client: Host,
    pub switch: Switch,
    pub dir: PathBuf,
    pub options: Options,
    lifeline: Lifeline,
}

impl Lab {
    /// Wires and machines, folders, secrets and configuration; nothing runs on them yet.
    pub fn new(options: Options) -> Outcome<Lab> {
        let template = postgres::Template::once()?;
        let pid = std::process::id();
        // Several labs of one process stand at once.
        let prefix = format!("pc{pid}-{}", LABS_MADE.fetch_add(1, Ordering::Relaxed));
        let dir = PathBuf::from(format!("/tmp/pclab-{pid}-{}", options.name));
        let [first, second] = options.nodes;
        let plug = |name: &str, last| Plug::of_family(&prefix, name, last, options.ipv6);
        let plugs = [plug(first, 11), plug(second, 12), plug("dns", config::DNS), plug("client", 20)];
        let (plug_second, plug_relay) = (plug("dns2", config::SECONDARY), plug("relay", config::RELAY));
        let plug_third = plug("c", config::THIRD);
        let mut namespaces: Vec<String> = plugs.iter().map(|plug| plug.ns.clone()).collect();
        namespaces.extend([format!("{prefix}-sw"), plug_second.ns.clone(), plug_relay.ns.clone()]);
        namespaces.push(plug_third.ns.clone());
        let lifeline = Lifeline::new(&dir, &namespaces)?;
        fs::create_dir(&dir)?;
        fs::write(dir.join("owner"), pid.to_string())?;
        template.lend_program(&dir)?;
        let resolver = format!("nameserver {}\noptions timeout:1 attempts:2\n", plugs[2].address);
        fs::write(dir.join("resolv.conf"), resolver)?;
        let switch = Switch::build(&prefix)?;
        let [plug_a, plug_b, plug_dns, plug_client] = plugs;
        let boot = |name: &str, plug: Plug| Host::new(name, plug, &switch, &dir, lifeline.reader()?, Boot::Shell);
        let init = if options.systemd { Boot::Systemd } else { Boot::Shell };
        let a = Node::new(Host::new(first, plug_a, &switch, &dir, lifeline.reader()?, init)?)?;
        let b = Node::new(boot(second, plug_b)?)?;
        let mut c = None;
        if options.third {
            c = Some(Node::new(boot("c", plug_third)?)?);
        }
        let dns = boot("dns", plug_dns)?;
        let client = boot("client", plug_client)?;
        let keys = Keys::new()?;
        config::write_secrets(&dir, &keys)?;
        fs::write(&a.config, config::text(&options, &dir, 0)?)?;
        fs::write(&b.config, config::text(&options, &dir, 1)?)?;
        if let Some(c) = &c {
            fs::write(&c.config, config::text(&options, &dir, 3)?)?;
        }
        let witness_config = dir.join("witness.toml");
        fs::write(&witness_config, config::text(&options, &dir, 2)?)?;
        let witness = match options.witness {
            Kind::Bind => Witness::bind(dns, &keys.tsig, a.address())?,
            Kind::Knot => Witness::knot(dns, &keys.tsig, a.address())?,
            Kind::Embedded => Witness::embedded(dns, &keys.tsig, &witness_config, options.stepped_clock)?,
        };
        let mut secondary = None;
        if options.secondary {
            secondary = Some(Witness::secondary(boot("dns2", plug_second)?, &keys.tsig, witness.address())?);
        }
        let mut relay = None;
        if options.relay {
            relay = Some(DnsRelay::start(plug_relay, &switch, witness.address(), &keys.tsig)?);
        }
        Ok(Lab { a, b, c, witness, secondary, relay, client, switch, dir, options, lifeline })
    }

    /// The DNS server, a primary on a with the writers' table, and a streaming standby on b; no daemon yet.
    pub fn start_servers(&self) -> Outcome {
        self.witness.start()?;
        if let Some(secondary) = &self.secondary {
            secondary.start()?;
        }
        self.a.postgres.init_primary(&self.a.host)?;
        self.a.postgres.sql("app", client::TABLE_SQL)?;
        self.b.postgres.init_standby_of(&self.b.host, &self.a.host)
    }

    /// [`Lab::start_servers`], then both daemons, until a is active, its gate open, and the pair in sync.
    pub fn start_pair(&self) -> Outcome {
        self.start_servers()?;
        self.b.start_daemon()?;
        self.a.start_daemon()?;
        self.a.wait_active(secs(60))?;
        self.a.wait_in_sync(secs(60))?;
        Ok(())
    }

    pub fn nodes(&self) -> [&Node; 2] {
        [&self.a, &self.b]
    }

    /// All logs and states, for the person who has to find out why.
    pub fn diagnosis(&self) -> String {
        let records = match (self.witness.service_addresses(), self.witness.marker()) {
            (Ok(addresses), Ok(marker)) => format!("A {addresses:?} marker {marker:?}"),
            (addresses, marker) => format!("A {addresses:?} marker {marker:?}"),
        };
        format!(
            "{}{}{}=== the record\n{records}\n=== DNS server log\n{}\n",
            self.a.diagnosis(),
            self.b.diagnosis(),
            self.c.as_ref().map(Node::diagnosis).unwrap_or_default(),
            sys::tail(&self.witness.log, 40)
        )
    }

    /// Copies every log and configuration file to a folder, for a look after the lab is gone.
    pub fn save_logs(&self, to: &std::path::Path) -> Outcome {
        let to = to.join(self.options.name);
        fs::create_dir_all(&to)?;
        let files = fs::read_dir(&self.dir)?.flatten().map(|entry| entry.path());
        for file in files.filter(|path| path.extension().is_some_and(|end| end == "log" || end == "toml")) {
            fs::copy(&file, to.join(file.file_name().unwrap_or_default()))?;
        }
        for node in self.nodes() {
            let _ = fs::copy(&node.postgres.log, to.join(format!("{}-postgresql.log", node.name())));
        }
        Ok(())
    }

    /// Leaves the lab running after this process ends; the returned pid is the process to kill to end it.
    pub fn keep(mut self) -> Outcome<u32> {
        let keeper = self.lifeline.hand_over()?;
        fs::write(self.dir.join("owner"), keeper.to_string())?;
        fs::write(self.dir.join("keeper"), keeper.to_string())?;
        for host in [&self.a.host, &self.b.host, &self.witness.host, &self.client] {
            host.forget();
        }
        Ok(keeper)
    }
}
