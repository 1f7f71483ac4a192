//! The command line as types: every verb of the contract with its flags, its help and an example.
//!
//! Definitions only; `cli.rs` runs them. What is here is printed as `--help`, manual pages and completions, and kept as
//! golden files in `tests/golden/help/`.

use clap::{Args, Parser, Subcommand, ValueEnum, ValueHint};
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use super::render::check::Threshold;
use crate::base::ids::NodeName;

/// The whole command line.
#[derive(Debug, Parser)]
#[command(
    name = "portcullis",
    version,
    about = "A DNS-fenced two-node failover appliance for PostgreSQL",
    long_about = "A DNS-fenced two-node failover appliance for PostgreSQL: two servers, one daemon on each, a person \
                  who decides, and a gate that serves only while fresh proof holds it open.",
    after_help = "Example:\n  portcullis status\n  portcullis promote          # on the node that shall become active",
    disable_help_subcommand = true,
    propagate_version = false
)]
pub struct Cli {
    #[command(flatten)]
    pub globals: Globals,
    #[command(subcommand)]
    pub command: Command,
}

/// Options that stand before or after the verb.
#[derive(Debug, Clone, Args)]
pub struct Globals {
    /// The configuration
    #[arg(
        long,
        global = true,
        help_heading = "Global options",
        value_name = "FILE",
        default_value = "/etc/portcullis/portcullis.toml",
        value_hint = ValueHint::FilePath
    )]
    pub config: PathBuf,
    /// Which [[node]] this host is [default: the one whose name or address is this host's]
    // A list only because `init` takes --node name=address once for each node; `Globals::node_name` allows one.
    #[arg(long, global = true, help_heading = "Global options", value_name = "NAME")]
    pub node: Vec<String>,
    /// How log lines on standard error look
    #[arg(long, global = true, help_heading = "Global options", value_name = "FORM", default_value = "text")]
    pub log: LogFormat,
}

/// Form of the log on standard error, one line an event.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    Text,
    Json,
}

/// One verb.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run this node: gate, guard, peer channel and status page
    #[command(
        after_help = "Example:\n  portcullis daemon --config /etc/portcullis/portcullis.toml\n\nSIGHUP reloads, \
                            SIGTERM shuts down cleanly. Exit codes: 0; 2 bad configuration."
    )]
    Daemon,
    /// Show this node, its peer, the witness, the lease, the VIP, replication and the last events
    #[command(after_help = "Example:\n  portcullis status --watch")]
    Status(StatusArgs),
    /// Show one row per node, as SHOW pool_nodes does
    #[command(after_help = "Example:\n  portcullis nodes --json")]
    Nodes(JsonArgs),
    /// Make THIS node active: switchover if the peer is alive, else failover
    #[command(after_help = "Example:\n  portcullis promote --dry-run\n  portcullis promote\n\nExit codes: 0 done; 1 \
                            failed, nothing changed; 3 refused as unsafe (says why); 4 stopped half-way, run again to \
                            finish.")]
    Promote(PromoteArgs),
    /// Make the other node active, from either node, only if it can be done without loss; never a failover
    #[command(after_help = "Example:\n  portcullis switchover --to midna\n\nExit codes: 0 done; 1 failed, nothing \
                            changed; 3 refused as unsafe; 4 stopped half-way, run again to finish.")]
    Switchover(SwitchoverArgs),
    /// Bring a node back as standby, from either node
    #[command(
        visible_alias = "recover",
        after_help = "Example:\n  portcullis rejoin alp\n\nNODE's daemon must run; its PostgreSQL may be stopped, \
                      crashed, running fenced, or not there at all. Exit codes: 0 done; 1 failed, nothing changed; 3 \
                      refused as unsafe; 4 stopped half-way, run again to finish."
    )]
    Rejoin(RejoinArgs),
    /// Show the event log
    #[command(after_help = "Example:\n  portcullis events --since 1h")]
    Events(EventsArgs),
    /// Shut this node's gate durably
    #[command(after_help = "Example:\n  portcullis fence --reason \"disk replacement\"")]
    Fence(FenceArgs),
    /// Lift a fence; refused while the witness points elsewhere or is silent, or the peer holds a higher epoch
    #[command(after_help = "Example:\n  portcullis unfence\n\nExit codes: 0 lifted; 3 refused (says why).")]
    Unfence(StepArgs),
    /// Take a standby into service by hand (not built yet)
    #[command(after_help = "Example:\n  portcullis attach midna")]
    Attach(NodeArgs),
    /// Take a standby out of service by hand (not built yet)
    #[command(after_help = "Example:\n  portcullis detach midna")]
    Detach(NodeArgs),
    /// Hold clients at their next transaction boundary, of one database or of all
    #[command(
        after_help = "Example:\n  portcullis pause\n  portcullis pause orders    # until none is in a transaction\n\n\
                      Clients wait at most pool.query_wait. A database stays paused until it is resumed, or the \
                      daemon restarts: that forgets it. Exit codes: 0 held; 1 nobody has logged in to that \
                      database; 4 held, but some are still in a transaction after 10 s: they are held when it ends, \
                      and pause again waits for it."
    )]
    Pause(DatabaseArgs),
    /// Let held clients go on, of one database or of all
    #[command(
        after_help = "Example:\n  portcullis resume\n  portcullis resume orders\n\nWithout a name it ends the pause \
                      without a name; databases that were paused by name stay so."
    )]
    Resume(DatabaseArgs),
    /// Lend no connection to PostgreSQL again that is open now, of one database or of all
    #[command(
        after_help = "Example:\n  portcullis reconnect orders    # after ALTER DATABASE orders SET ...\n\nIdle ones \
                      are closed at once, others when they come back: at the end of the transaction, in session \
                      mode at the end of the session. Clients notice nothing. Exit codes: 0; 1 nobody has logged \
                      in to that database."
    )]
    Reconnect(DatabaseArgs),
    /// End every session of a database at once
    #[command(after_help = "Example:\n  portcullis kill orders\n\nClients are told FATAL 57P01 \
                      and their connections to PostgreSQL are closed, idle ones too; new clients are welcome, \
                      unless it is paused. A statement that was running PostgreSQL ends by itself. There is no kill \
                      without a name: to end everything, fence. Exit codes: 0; 1 nobody has logged in to that \
                      database; 4 some are still ending.")]
    Kill(KillArgs),
    /// Read the configuration again, apply what can be applied, and name what needs a restart
    #[command(after_help = "Example:\n  portcullis reload\n\nAs SIGHUP, but it says what came \
                      of it. The files and keys of [auth] and all of [pool] but mode and threads are applied, for \
                      what begins after it; no session ends. Exit codes: 0 read; 1 no daemon; 2 wrong: nothing was \
                      changed (says why).")]
    Reload(StepArgs),
    /// Leave PostgreSQL alone; the gate goes on obeying the lease
    #[command(after_help = "Example:\n  portcullis maintenance on")]
    Maintenance(MaintenanceArgs),
    /// Monitoring-plugin output with perfdata
    #[command(after_help = "Example:\n  portcullis check\n  portcullis check --warning replication_delay=16000000 \
                            --critical lease=1: --warning waiting=5\n\nRANGE is that of the Monitoring Plugins: 10 \
                            (alert above 10), 10: (below), 10:20 (outside), @10:20 (inside). METRIC: lease (s, of \
                            the active node), sessions, waiting (clients without a backend), witness_age, \
                            peer_age (s), replication_delay (bytes), replication_delay_seconds.\n\n\
                            Exit codes: 0 ok; 1 warning; 2 critical; 3 unknown and \
                            wrong usage.")]
    Check(CheckArgs),
    /// Parse and prove the configuration offline; names key, value, line and the fix
    #[command(
        after_help = "Example:\n  portcullis check-config /etc/portcullis/portcullis.toml\n\nExit codes: 0 good; \
                            2 wrong."
    )]
    CheckConfig(CheckConfigArgs),
    /// Check everything a failover will need, live, on all nodes
    #[command(
        after_help = "Example:\n  portcullis doctor --json\n\nIt looks at this node, and the other nodes' daemons look \
                      at theirs; what could not be checked is named with the reason. As root, or as the user \
                      PostgreSQL runs as; without this node's daemon too. It changes nothing: --fix does what cannot \
                      hurt (modes of secret files; role and grants for pg_rewind, on the active node) and asks \
                      before.\n\nExit codes: 0 nothing, or advice alone; 1 findings."
    )]
    Doctor(DoctorArgs),
    /// The lines of /pool_nodes as a CGI answer
    #[command(after_help = "Example:\n  portcullis cgi")]
    Cgi,
    /// Read and write through the front door, one line a tick, and sum up the outages
    #[command(after_help = "Example:\n  portcullis probe --duration 1m \"host=db.example.org port=6432 dbname=app \
                            user=app\"\n\nThe table portcullis_probe is made when it is missing. Exit codes: 0 no \
                            outage; 1 outage seen.")]
    Probe(ProbeArgs),
    /// Switch over there and back with a prober running; prints the measured interruption
    #[command(
        after_help = "Example:\n  portcullis drill --dsn \"host=db.example.org port=6432 dbname=app user=app\"\n\nWith \
                      --dsn it reads and writes through the front door as probe does (PGPASSWORD is used; table \
                      portcullis_probe); without it only the door is tried. Never a failover. Exit codes: 0 there \
                      and back; 1 failed, nothing changed; 3 refused as unsafe; 4 stopped half-way: it says where \
                      the service is."
    )]
    Drill(DrillArgs),
    /// Run the embedded authoritative DNS server, on a third machine
    #[command(
        after_help = "Example:\n  portcullis witness --config /etc/portcullis/portcullis.toml\n\nIt answers for \
                            [dns] zone on [witness] listen and takes TSIG-signed RFC 2136 updates; its zone is kept \
                            under state_dir."
    )]
    Witness,
    /// Write a commented configuration and the secrets it names, here and on the other node; never overwrites
    #[command(
        after_help = "Example:\n  portcullis init\n  portcullis init --yes --service-name db.example.org --node \
                            midna=192.0.2.12 --postgres primary\n  portcullis init --export - | ssh root@192.0.2.12 \
                            portcullis init --import - --postgres standby\n\nOn a terminal it asks for what is not \
                            given, and proposes what it finds. It ends with the next steps as exact \
                            commands. Exit codes: 0 written; 2 not."
    )]
    Init(Box<InitArgs>),
    /// For the PostgreSQL unit: may the local cluster start writable?
    #[command(after_help = "Example:\n  portcullis may-start-primary\n\nWorks without the daemon too. Exit codes: 0 \
                            yes; 3 no.")]
    MayStartPrimary,
    /// Print completions for a shell
    #[command(after_help = "Example:\n  portcullis completions bash > /etc/bash_completion.d/portcullis")]
    Completions(CompletionsArgs),
    /// Write the manual pages, one for each verb
    #[command(after_help = "Example:\n  portcullis man /usr/local/share/man/man8")]
    Man(ManArgs),
}

#[derive(Debug, Args)]
pub struct JsonArgs {
    /// JSON instead of a table
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct StepArgs {
    /// One JSON object a line
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct DoctorArgs {
    /// JSON instead of text
    #[arg(long)]
    pub json: bool,
    /// Look at this node alone
    #[arg(long)]
    pub here: bool,
    /// Do what is harmless, after asking
    #[arg(long)]
    pub fix: bool,
    /// Ask nothing, with --fix
    #[arg(long, requires = "fix")]
    pub yes: bool,
    /// For the doctor of another node
    #[arg(long, hide = true, conflicts_with_all = ["json", "here", "fix"])]
    pub for_peer: bool,
}

#[derive(Debug, Args)]
pub struct DatabaseArgs {
    /// Only this database [default: all]
    #[arg(value_name = "DATABASE")]
    pub database: Option<String>,
    /// One JSON object a line
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct KillArgs {
    /// The database; there is no default
    #[arg(value_name = "DATABASE")]
    pub database: String,
    /// One JSON object a line
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct NodeArgs {
    /// Name of the [[node]]
    #[arg(value_name = "NODE")]
    pub node_name: NodeName,
}

#[derive(Debug, Args)]
pub struct CheckArgs {
    /// Warn when a value is beyond this
    #[arg(short, long, value_name = "METRIC=RANGE")]
    pub warning: Vec<Threshold>,
    /// Be critical when a value is beyond this
    #[arg(short, long, value_name = "METRIC=RANGE")]
    pub critical: Vec<Threshold>,
    /// JSON instead of the plugin's line; the exit codes are the same
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct StatusArgs {
    /// The JSON of /status.json
    #[arg(long)]
    pub json: bool,
    /// Show it again every second until Ctrl-C
    #[arg(long)]
    pub watch: bool,
}

#[derive(Debug, Args)]
pub struct PromoteArgs {
    /// Do not ask; needed where there is no terminal
    #[arg(long)]
    pub yes: bool,
    /// Print the steps and run every check, without acting
    #[arg(long)]
    pub dry_run: bool,
    /// Go on although writes that were acknowledged may be missing here
    #[arg(long)]
    pub accept_data_loss: bool,
    /// Vouch that this node is switched off: needed without DNS, and then its lease is not waited for
    #[arg(long, value_name = "NAME")]
    pub peer_is_off: Option<NodeName>,
    /// One JSON object a step
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct SwitchoverArgs {
    /// Which node shall become active [default: the one standby]
    #[arg(long, value_name = "NAME")]
    pub to: Option<NodeName>,
    /// Accepted; nothing is asked
    #[arg(long)]
    pub yes: bool,
    /// Print the steps and run every check, without acting
    #[arg(long)]
    pub dry_run: bool,
    /// One JSON object a step
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct RejoinArgs {
    /// The node to bring back
    #[arg(value_name = "NODE")]
    pub node_name: NodeName,
    /// Accepted; nothing is asked
    #[arg(long)]
    pub yes: bool,
    /// Print the steps and run every check, without acting
    #[arg(long)]
    pub dry_run: bool,
    /// One JSON object a step
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct EventsArgs {
    /// Only events since then: 30m (ago), 2026-11-20 or 2026-11-20T15:11 (UTC)
    #[arg(long, value_name = "T")]
    pub since: Option<Since>,
    /// One JSON object a line
    #[arg(long)]
    pub json: bool,
}

/// Where an event log begins.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Since {
    Ago(Duration),
    At(jiff::Timestamp),
}
impl FromStr for Since {
    type Err = String;
    fn from_str(text: &str) -> Result<Since, String> {
        if let Ok(at) = text.parse() {
            return Ok(Since::At(at));
        }
        // Without a zone it is UTC, as the event log's own times are.
        if let Ok(civil) = text.parse::<jiff::civil::DateTime>()
            && let Ok(at) = civil.to_zoned(jiff::tz::TimeZone::UTC)
        {
            return Ok(Since::At(at.timestamp()));
        }
        span(text).map(Since::Ago).map_err(|_| "write how long ago, 30m, or a time in UTC, 2026-11-20T15:11".to_owned())
    }
}

/// A duration with its unit, as in the configuration.
fn span(text: &str) -> Result<Duration, String> {
    match humantime::parse_duration(text) {
        Ok(span) if !text.bytes().all(|byte| byte.is_ascii_digit()) => Ok(span),
        _ => Err("write a number with its unit, as 250ms or 5s".to_owned()),
    }
}

fn tick(text: &str) -> Result<Duration, String> {
    span(text).and_then(|span| if span.is_zero() { Err("write 1ms or more".to_owned()) } else { Ok(span) })
}

#[derive(Debug, Args)]
pub struct FenceArgs {
    /// Why, for the event log
    #[arg(long, value_name = "TEXT")]
    pub reason: Option<String>,
    /// One JSON object a line
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct MaintenanceArgs {
    pub switch: Switch,
    /// One JSON object a line
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Switch {
    On,
    Off,
}

#[derive(Debug, Args)]
pub struct CheckConfigArgs {
    /// The configuration [default: that of --config]
    #[arg(value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub file: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub struct ProbeArgs {
    /// Time from one tick to the next
    #[arg(long, value_name = "TIME", default_value = "250ms", value_parser = tick)]
    pub interval: Duration,
    /// Stop after this long [default: at Ctrl-C]
    #[arg(long, value_name = "TIME", value_parser = span)]
    pub duration: Option<Duration>,
    /// No update, no table
    #[arg(long)]
    pub read_only: bool,
    /// One JSON object a tick
    #[arg(long)]
    pub json: bool,
    /// How to connect: libpq words or a URL
    #[arg(value_name = "DSN")]
    pub dsn: String,
}

#[derive(Debug, Args)]
pub struct DrillArgs {
    /// Where to first [default: the other voter]
    #[arg(long, value_name = "NAME")]
    pub to: Option<NodeName>,
    /// How the prober connects: libpq words or a URL [default: it tries the door, without a login]
    #[arg(long, value_name = "DSN")]
    pub dsn: Option<String>,
    /// Accepted; nothing is asked
    #[arg(long)]
    pub yes: bool,
    /// One JSON object a step
    #[arg(long)]
    pub json: bool,
}

/// What `init` does to the local PostgreSQL.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum PostgresHow {
    /// Nothing: the lines it needs are printed
    Leave,
    /// Settings in conf.d, rules at the top of pg_hba.conf, the question before its unit's start
    Prepare,
    /// As prepare, and restarted; its data is the service's
    Primary,
    /// As prepare, and stopped; its fresh data is moved aside, for a copy of the other node's
    Standby,
}

/// For which DNS server `init` prints lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum DnsServer {
    Bind,
    Knot,
}

#[derive(Debug, Args)]
pub struct InitArgs {
    /// Ask nothing: what is not given is taken as it was found on this machine and in DNS
    #[arg(long)]
    pub yes: bool,
    /// The DNS name clients use [found: db. before this machine's domain]
    #[arg(long, value_name = "NAME")]
    pub service_name: Option<String>,
    /// The DNS zone it is in [found: the one with an SOA record, else the name without its first label]
    #[arg(long, value_name = "ZONE")]
    pub zone: Option<String>,
    /// A DNS server of the zone, address:port, that which takes updates first; several: repeat [found: of its SOA and
    /// NS]
    #[arg(long = "server", value_name = "ADDRESS")]
    pub servers: Vec<String>,
    /// A node, name=address, with both families name=address,address; once for each of the two [found: this machine as
    /// the first]
    // The same id as the global option, whose place it takes here.
    #[arg(id = "node", long = "node", value_name = "NAME=ADDRESS")]
    pub nodes: Vec<String>,
    /// PostgreSQL's data directory, the same on both nodes [found: the newest cluster's]
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub data_dir: Option<PathBuf>,
    /// Directory of PostgreSQL's programs, the same on both nodes [found: the cluster's]
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub bin_dir: Option<PathBuf>,
    /// PostgreSQL's port, the same on both nodes [found: the cluster's, else 5432]
    #[arg(long, value_name = "PORT")]
    pub port: Option<u16>,
    /// Directory of PostgreSQL's sockets, the same on both nodes [found: the cluster's, else /var/run/postgresql]
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub socket_dir: Option<PathBuf>,
    /// A virtual address with its mask, 192.0.2.100/24
    #[arg(long, value_name = "ADDRESS/MASK")]
    pub vip: Option<String>,
    /// The network card of the virtual address [default: the one with its subnet]
    #[arg(long, value_name = "NAME", requires = "vip")]
    pub vip_interface: Option<String>,
    /// A service with a VIP and no DNS; needs --vip
    #[arg(long, conflicts_with_all = ["servers", "witness"])]
    pub no_dns: bool,
    /// The zone is served by portcullis itself, on a third machine, which --server names
    #[arg(long)]
    pub witness: bool,
    /// What to do to the PostgreSQL of this machine (Debian's clusters)
    #[arg(long, value_name = "HOW")]
    pub postgres: Option<PostgresHow>,
    /// Print the key and the rule that a DNS server of yours needs, from the configuration that is there
    #[arg(long, value_name = "PROGRAM", conflicts_with_all = ["export", "import"])]
    pub dns_server: Option<DnsServer>,
    /// Write configuration and secrets as one file (-: standard output), for --import on the other node
    #[arg(long, value_name = "FILE", conflicts_with = "import")]
    pub export: Option<PathBuf>,
    /// With --export: only what the machine of the embedded DNS server needs
    #[arg(long, requires = "export")]
    pub for_witness: bool,
    /// Take configuration and secrets from the file (-: standard input) that --export wrote, and ask nothing
    #[arg(long, value_name = "FILE", conflicts_with_all = ["service_name", "node", "vip", "servers", "witness"])]
    pub import: Option<PathBuf>,
    /// Where the files go
    #[arg(long, value_name = "DIR", default_value = "/etc/portcullis", value_hint = ValueHint::DirPath)]
    pub output_dir: PathBuf,
    /// Print the commented example and write nothing
    #[arg(long)]
    pub example: bool,
}

#[derive(Debug, Args)]
pub struct CompletionsArgs {
    pub shell: clap_complete::Shell,
}

#[derive(Debug, Args)]
pub struct ManArgs {
    /// An existing directory
    #[arg(value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub dir: PathBuf,
}
