//! Start, stop and `pg_controldata`: what is done to a cluster from outside a session.
//!
//! **How it is run** is found out each time: the `start` command of the configuration, else Debian's unit where
//! systemd runs and a cluster under /etc/postgresql owns the data directory, else `pg_ctl` from `bin_dir`, which puts
//! the postmaster into a session of its own with its output in a file. PostgreSQL never hangs on the daemon's process
//! or pipes. Stopping is by signal to the postmaster (or the configured `stop` command first): it needs no right that
//! the owner lacks, it can be bounded, and a unit whose postmaster ends so is simply inactive.

use super::postmaster::{self, Phase, Postmaster};
use super::{Cluster, PgError, autoconf, errand, files, standby, tool};
use crate::base::ids::{Lsn, SystemId};
use crate::base::time::Instant;
use crate::engine::report::ControlData;
use crate::io::clock;
use rustix::process::{Pid, Signal};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// `pg_controldata`, `postgres -C`, `systemctl show`: tools that only look.
pub(super) const LOOK_LIMIT: Duration = Duration::from_secs(10);
/// How often a start or stop under way is looked at.
const WATCH_EVERY: Duration = Duration::from_millis(10);
/// After SIGQUIT PostgreSQL itself kills its children at 5 s (`SIGKILL_CHILDREN_AFTER_SECS`); then it is our turn.
const IMMEDIATE_LIMIT: Duration = Duration::from_secs(6);
/// After SIGKILL only a process stuck in the kernel is left; longer waiting helps nothing.
const KILL_LIMIT: Duration = Duration::from_secs(5);
/// How much of PostgreSQL's log is searched for the reason of a failed start.
const LOG_TAIL: usize = 64 * 1024;
/// Where Debian keeps the configuration of its clusters.
pub(super) const DEBIAN_ETC: &str = "/etc/postgresql";

/// How hard to stop.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StopMode {
    /// Sessions are ended, a checkpoint is written, standbys get the last WAL.
    Fast,
    /// Like a crash; the next start recovers.
    Immediate,
}

/// What a stop took in the end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StopHow {
    AlreadyDown,
    Fast,
    Immediate,
    /// SIGKILL.
    Killed,
}

/// A stop that is done: no process of the cluster is left.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stopped {
    pub how: StopHow,
    pub took: Duration,
}

/// How PostgreSQL is started here.
enum Runner {
    Command(Vec<String>),
    Unit(String),
    PgCtl,
}

/// A cluster as Debian's postgresql-common lays it out.
pub(super) struct DebianCluster {
    version: String,
    name: String,
    /// `postgresql.conf`.
    pub(super) config: PathBuf,
}

impl DebianCluster {
    /// The unit of postgresql-common that runs it.
    pub(super) fn unit(&self) -> String {
        format!("postgresql@{}-{}.service", self.version, self.name)
    }
}

impl Cluster {
    /// A postmaster of this data directory is alive. A pid file, a zombie or a stranger with its number is not. Where
    /// it cannot be told, one is: nobody may move or change its directory.
    pub fn is_running(&self) -> bool {
        Postmaster::find(&self.settings.data_dir).map_or(true, |found| found.is_some())
    }

    /// The live postmaster.
    fn postmaster(&self) -> Result<Option<Postmaster>, PgError> {
        Postmaster::find(&self.settings.data_dir).map_err(|error| blind(&error))
    }

    /// Every live process of the cluster.
    fn processes(&self) -> Result<Vec<Pid>, PgError> {
        postmaster::processes(&self.settings.data_dir).map_err(|error| blind(&error))
    }

    /// What `pg_controldata` says.
    ///
    /// # Errors
    /// There is no cluster in the data directory, or the tool fails.
    pub async fn control_data(&self) -> Result<ControlData, PgError> {
        self.control_data_of(&self.settings.data_dir).await
    }

    pub(super) async fn control_data_of(&self, data_dir: &Path) -> Result<ControlData, PgError> {
        let text = self.control_text(data_dir).await?;
        read_control_data(&text)
            .ok_or_else(|| PgError::Failed("pg_controldata answered in an unknown form; check bin_dir".to_owned()))
    }

    /// All that `pg_controldata` says.
    pub(super) async fn control_text(&self, data_dir: &Path) -> Result<String, PgError> {
        let mut command = tool::command(self.bin("pg_controldata"));
        command.arg("-D").arg(data_dir);
        let output = tool::run(command, "pg_controldata", LOOK_LIMIT).await?;
        if !output.ok {
            return Err(PgError::Failed(format!("pg_controldata failed: {}", output.last_line())));
        }
        Ok(output.out)
    }

    /// Starts PostgreSQL as its signal files say, and waits until it takes sessions. Already running is fine.
    ///
    /// # Errors
    /// `TimedOut`: it runs and goes on by itself, but takes no sessions yet. `Failed`: it did not start; with the
    /// reason from its log.
    pub async fn start(&self, limit: Duration) -> Result<(), PgError> {
        let deadline = clock::now() + limit;
        if self.postmaster()?.is_none() {
            self.launch(limit).await?;
        }
        self.wait_ready(deadline, limit).await
    }

    async fn launch(&self, limit: Duration) -> Result<(), PgError> {
        let data_dir = &self.settings.data_dir;
        if !data_dir.join("PG_VERSION").exists() {
            return Err(PgError::Refused(format!("there is no cluster in {}; rejoin makes one", data_dir.display())));
        }
        self.undo_rewind_not_begun().await?;
        if self.is_rewind_broken() {
            return Err(self.refuses_half());
        }
        if !self.processes()?.is_empty() {
            // Backends that outlived a killed postmaster; a new one beside them would be refused, or worse.
            self.finish_off(KILL_LIMIT).await?;
        }
        let lock = self.settings.socket_dir.join(format!(".s.PGSQL.{}.lock", self.settings.port));
        let deadline = clock::now() + KILL_LIMIT;
        while [data_dir.join("postmaster.pid"), lock.clone()].iter().any(|file| postmaster::is_leaving(file))
            && clock::now() < deadline
        {
            tokio::time::sleep(WATCH_EVERY).await;
        }
        for file in postmaster::clear_stale_locks(data_dir, &lock).map_err(|error| blind(&error))? {
            tracing::info!(file = %file.display(), "removed a stale lock file: its process is not this PostgreSQL");
        }
        standby::clear_skipped(data_dir);
        let debian = debian_cluster(Path::new(DEBIAN_ETC), data_dir);
        let _taken_back_at_the_end = errand::begin(&self.state_dir);
        match self.runner(debian.as_ref()).await {
            Runner::Command(list) => {
                let log = self.state_dir.join("postgresql-start-command.log");
                let output = tool::run_detached(command_of(&list)?, "the start command", &log, limit).await?;
                if !output.ok {
                    return Err(PgError::Failed(format!("the start command failed: {}", output.last_line())));
                }
                Ok(())
            }
            Runner::Unit(unit) => {
                let mut command = tool::command("systemctl");
                command.args(["--no-ask-password", "start", &unit]);
                let output = tool::run(command, "systemctl start", limit).await?;
                if !output.ok {
                    return Err(PgError::Failed(format!(
                        "systemd did not start {unit}: {}; see journalctl -u {unit}",
                        output.complaint()
                    )));
                }
                Ok(())
            }
            Runner::PgCtl => self.pg_ctl_start(debian.as_ref(), limit).await,
        }
    }

    async fn pg_ctl_start(&self, debian: Option<&DebianCluster>, limit: Duration) -> Result<(), PgError> {
        let log = self.start_log(debian);
        let before = fs::metadata(&log).map_or(0, |meta| meta.len());
        let mut command = tool::command(self.bin("pg_ctl"));
        command.arg("start").arg("-D").arg(&self.settings.data_dir).arg("-l").arg(&log);
        command.arg("-w").arg("-t").arg(limit.as_secs().max(1).to_string());
        if let Some(debian) = debian {
            let set = format!("config_file={}", debian.config.display());
            command.arg("-o").arg(format!("-c {}", shell_quoted(&set)));
        }
        let output = tool::run(command, "pg_ctl start", limit + LOOK_LIMIT).await?;
        // pg_ctl also fails when recovery takes longer than its patience; then PostgreSQL is there nevertheless.
        if output.ok || self.is_running() {
            return Ok(());
        }
        let text = files::tail_from(&log, before, LOG_TAIL);
        let reason = reason_in(&text).unwrap_or_else(|| output.last_line());
        Err(PgError::Failed(format!("PostgreSQL did not start: {reason}; see {}", log.display())))
    }

    async fn wait_ready(&self, deadline: Instant, limit: Duration) -> Result<(), PgError> {
        loop {
            match (self.is_running(), postmaster::phase(&self.settings.data_dir)) {
                (true, Some(Phase::Ready)) => return Ok(()),
                (true, Some(Phase::Stopping)) => {
                    return Err(PgError::Failed("PostgreSQL is shutting down; stop it and start it anew".to_owned()));
                }
                (true, Some(Phase::Starting | Phase::Standby) | None) => {}
                (false, _) => {
                    return Err(PgError::Failed("PostgreSQL ended while it started; see its log".to_owned()));
                }
            }
            if clock::now() >= deadline {
                return Err(PgError::TimedOut(format!(
                    "PostgreSQL runs but takes no sessions yet after {limit:?}; it goes on recovering by itself"
                )));
            }
            tokio::time::sleep(WATCH_EVERY).await;
        }
    }

    /// Stops PostgreSQL within about `limit` + 11 s: fast (unless `Immediate` is asked for) for `limit`, then
    /// immediate, then SIGKILL; frozen processes are thawed or killed. Afterwards no process of the cluster is left.
    /// Already stopped is fine.
    ///
    /// # Errors
    /// A process cannot even be killed (stuck in the kernel), or nothing can be looked at (no descriptors): call again.
    pub async fn stop(&self, mode: StopMode, limit: Duration) -> Result<Stopped, PgError> {
        let begun = clock::now();
        let data_dir = &self.settings.data_dir;
        let done = |how| Ok(Stopped { how, took: clock::now().since(begun) });
        let Some(postmaster) = self.postmaster()? else {
            if self.processes()?.is_empty() {
                return done(StopHow::AlreadyDown);
            }
            self.finish_off(KILL_LIMIT).await?;
            return done(StopHow::Killed);
        };
        if mode == StopMode::Fast {
            if let Some(list) = &self.settings.stop {
                self.run_stop_command(list, limit).await;
            }
            postmaster.signal(Signal::INT);
            postmaster::thaw(data_dir);
            if self.gone_by(&postmaster, begun + limit).await {
                return done(StopHow::Fast);
            }
            tracing::warn!(?limit, "PostgreSQL did not stop in fast mode in time; stopping it in immediate mode");
        }
        postmaster.signal(Signal::QUIT);
        postmaster::thaw(data_dir);
        if self.gone_by(&postmaster, clock::now() + IMMEDIATE_LIMIT).await {
            return done(StopHow::Immediate);
        }
        tracing::warn!("PostgreSQL did not stop in immediate mode in time; killing it");
        postmaster.signal(Signal::KILL);
        self.finish_off(KILL_LIMIT).await?;
        done(StopHow::Killed)
    }

    async fn run_stop_command(&self, list: &[String], limit: Duration) {
        let log = self.state_dir.join("postgresql-stop-command.log");
        let result = match command_of(list) {
            Ok(command) => tool::run_detached(command, "the stop command", &log, limit).await,
            Err(error) => Err(error),
        };
        match result {
            Ok(output) if output.ok => {}
            Ok(output) => tracing::warn!(reason = output.last_line(), "the stop command failed; stopping by signal"),
            Err(error) => tracing::warn!(%error, "the stop command failed; stopping by signal"),
        }
    }

    /// Waits until the postmaster and all its processes are gone.
    async fn gone_by(&self, postmaster: &Postmaster, deadline: Instant) -> bool {
        loop {
            if postmaster.has_ended() && self.processes().is_ok_and(|left| left.is_empty()) {
                return true;
            }
            if clock::now() >= deadline {
                return false;
            }
            // Frozen meanwhile, or again.
            postmaster.signal(Signal::CONT);
            tokio::time::sleep(WATCH_EVERY).await;
        }
    }

    /// Kills what is left of the cluster until nothing is.
    async fn finish_off(&self, limit: Duration) -> Result<(), PgError> {
        let deadline = clock::now() + limit;
        while !self.processes()?.is_empty() {
            if clock::now() >= deadline {
                return Err(PgError::Failed(
                    "processes of PostgreSQL do not even die of SIGKILL; look at its disks, or restart the machine"
                        .to_owned(),
                ));
            }
            postmaster::kill_all(&self.settings.data_dir, Signal::KILL);
            tokio::time::sleep(WATCH_EVERY).await;
        }
        Ok(())
    }

    pub(super) fn bin(&self, name: &str) -> PathBuf {
        self.settings.bin_dir.join(name)
    }

    /// The Debian cluster that owns this node's data directory.
    pub(super) fn debian(&self) -> Option<DebianCluster> {
        debian_cluster(Path::new(DEBIAN_ETC), &self.settings.data_dir)
    }

    async fn runner(&self, debian: Option<&DebianCluster>) -> Runner {
        if let Some(list) = &self.settings.start {
            return Runner::Command(list.clone());
        }
        // sd_booted(3): the directory exists only where systemd is the init.
        if let Some(debian) = debian.filter(|_| Path::new("/run/systemd/system").is_dir()) {
            let unit = debian.unit();
            let mut command = tool::command("systemctl");
            command.args(["show", "--property=LoadState", "--value", &unit]);
            if let Ok(output) = tool::run(command, "systemctl show", LOOK_LIMIT).await
                && output.out.trim() == "loaded"
            {
                return Runner::Unit(unit);
            }
        }
        Runner::PgCtl
    }

    /// Where a PostgreSQL started by us writes before its own logging starts (and all, without a logging collector):
    /// Debian's log, which its logrotate knows, else a file of ours.
    fn start_log(&self, debian: Option<&DebianCluster>) -> PathBuf {
        let usual =
            debian.map(|d| PathBuf::from(format!("/var/log/postgresql/postgresql-{}-{}.log", d.version, d.name)));
        usual
            .filter(|path| fs::OpenOptions::new().append(true).open(path).is_ok())
            .unwrap_or_else(|| self.state_dir.join(format!("postgresql-{}.log", self.node)))
    }
}

/// Whether PostgreSQL runs cannot be seen.
fn blind(error: &std::io::Error) -> PgError {
    PgError::Failed(format!("it cannot be seen whether PostgreSQL runs: {error}; free descriptors or memory"))
}

fn command_of(list: &[String]) -> Result<tokio::process::Command, PgError> {
    let Some((program, arguments)) = list.split_first() else {
        return Err(PgError::Failed("a start or stop command of this node is empty; name a program".to_owned()));
    };
    let mut command = tool::command(program);
    // Whatever it leaves running must not be killed with it at the limit.
    command.args(arguments);
    Ok(command)
}

/// The cluster under `etc` (VERSION/NAME/postgresql.conf) whose `data_directory` is `data_dir`.
fn debian_cluster(etc: &Path, data_dir: &Path) -> Option<DebianCluster> {
    let wanted = fs::canonicalize(data_dir).unwrap_or_else(|_| data_dir.to_owned());
    for version in fs::read_dir(etc).ok()?.flatten() {
        let Ok(names) = fs::read_dir(version.path()) else { continue };
        for name in names.flatten() {
            let config = name.path().join("postgresql.conf");
            let Ok(text) = fs::read_to_string(&config) else { continue };
            let Some(owned) = autoconf::value_in(&text, "data_directory").map(PathBuf::from) else { continue };
            if fs::canonicalize(&owned).unwrap_or(owned) == wanted {
                return Some(DebianCluster {
                    version: version.file_name().into_string().ok()?,
                    name: name.file_name().into_string().ok()?,
                    config,
                });
            }
        }
    }
    None
}

/// One word for the shell that `pg_ctl` gives its options to.
fn shell_quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', "'\\''"))
}

/// The sentence for which PostgreSQL gave up: the last FATAL or PANIC of its log, else the last line.
fn reason_in(log: &str) -> Option<String> {
    let lines = || log.lines().rev().map(str::trim).filter(|line| !line.is_empty());
    let fatal = |line: &str| ["FATAL:", "PANIC:"].iter().find_map(|s| line.find(s)).map(|at| at + "FATAL:".len());
    lines()
        .find_map(|line| line.get(fatal(line)?..).map(|text| text.trim().to_owned()))
        .or_else(|| lines().next().map(str::to_owned))
}

/// The value behind a label of `pg_controldata`.
pub(super) fn control_field<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    text.lines().find_map(|line| line.strip_prefix(name)?.trim_start().strip_prefix(':').map(str::trim))
}

fn read_control_data(text: &str) -> Option<ControlData> {
    let field = |name: &str| control_field(text, name);
    Some(ControlData {
        system_id: SystemId(field("Database system identifier")?.parse().ok()?),
        state: field("Database cluster state")?.to_owned(),
        checkpoint: field("Latest checkpoint location")?.parse::<Lsn>().ok()?,
        timeline: crate::base::ids::TimelineId(field("Latest checkpoint's TimeLineID")?.parse().ok()?),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_data_is_read_by_its_full_labels() {
        let text = "pg_control version number:            1300\n\
            Database system identifier:           7318000000000000001\n\
            Database cluster state:               shut down\nLatest checkpoint location:           0/1530F40\n\
            Latest checkpoint's REDO location:    0/1530F00\nLatest checkpoint's TimeLineID:       3\n\
            Latest checkpoint's PrevTimeLineID:   2\n";
        let data = read_control_data(text).expect("readable");
        assert_eq!(data.system_id, SystemId(7_318_000_000_000_000_001));
        assert_eq!(data.state, "shut down");
        assert_eq!(data.checkpoint, "0/1530F40".parse().expect("valid"));
        assert_eq!(data.timeline.0, 3);
        assert!(read_control_data("garbage").is_none());
    }

    #[test]
    fn the_reason_of_a_failed_start_is_its_last_fatal() {
        let log =
            "2026 LOG:  starting\n2026 FATAL:  could not create lock file\n2026 LOG:  database system is shut down\n";
        assert_eq!(reason_in(log).as_deref(), Some("could not create lock file"));
        assert_eq!(reason_in("sh: not found\n\n").as_deref(), Some("sh: not found"));
        assert_eq!(reason_in(""), None);
    }

    #[test]
    fn a_debian_cluster_is_found_by_the_data_directory_it_names() {
        let dir = tempfile::tempdir().expect("tempdir");
        let etc = dir.path().join("etc");
        for (name, data) in [("one", "d1"), ("main", "d2")] {
            fs::create_dir_all(etc.join("15").join(name)).expect("mkdir");
            fs::create_dir_all(dir.path().join(data)).expect("mkdir");
            let line = format!("data_directory = '{}' # here\n", dir.path().join(data).display());
            fs::write(etc.join("15").join(name).join("postgresql.conf"), line).expect("write");
        }
        let found = debian_cluster(&etc, &dir.path().join("d2")).expect("found");
        assert_eq!((found.version.as_str(), found.name.as_str()), ("15", "main"));
        assert!(debian_cluster(&etc, &dir.path().join("d3")).is_none());
    }

    #[test]
    fn words_for_the_shell_stay_one_word() {
        assert_eq!(shell_quoted("config_file=/a b'c"), "'config_file=/a b'\\''c'");
    }
}
