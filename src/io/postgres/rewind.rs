//! Rejoin: the cluster here becomes a standby of the active node's, by the gentlest way that is right.
//!
//! ```text
//!  look (divergence) -> follow:  settings, standby.signal
//!                    -> rewind:  recovered read-only if it crashed -> pg_rewind --dry-run, WAL it misses fetched
//!                                -> DATA.diverged-TIME/{wal/, own/, pg_control, report.json}
//!                                -> mark "moving", foreign files moved out -> mode 0701, mark "rewinding"
//!                                -> pg_rewind -> own files and settings, standby.signal -> old mode, mark gone
//!                    -> clone:   whenever anything of that cannot be had
//! ```
//!
//! **Invariants:** `pg_rewind` changes DATA in place, so what only this node has (the diverged WAL) is kept first, and
//! a half-rewound directory is never started: until the end its mode is one that PostgreSQL refuses to start with. It
//! is set aside by the clone that follows, and where a clone is refused no rewind begins. What was moved before
//! `pg_rewind` ran is moved back when it then does not run. Nobody but `pg_rewind` itself says how it ended; that it
//! was needed is our finding, and when it then says that it was not, that is a fault.

use super::control::StopMode;
use super::divergence::{Divergence, Way};
use super::progress::{self, Tick};
use super::{Cluster, Peer, PgError, SourceFacts, autoconf, files, history, own, postmaster, settings, tool};
use crate::engine::report::RejoinHow;
use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Stands between the data directory's name and the time in the name of what is kept of a diverged end.
pub const DIVERGED_INFIX: &str = ".diverged-";
/// Under `state_dir` from before a rewind changes anything until all is in order again.
const MARK: &str = "rewind-under-way";
/// Of the data directory meanwhile: PostgreSQL starts only with 0700 or 0750 (`checkDataDir`), and nobody else may look
/// inside either.
const POISON: u32 = 0o701;
/// A cluster's mode; `initdb -g` makes it 0750.
pub(super) const PRIVATE: u32 = 0o700;
const GROUP_READS: u32 = 0o750;
/// A connection of `pg_rewind` is told from others by it.
const APPLICATION: &str = "portcullis-rewind";
/// A crashed cluster's recovery, and its stop.
const RECOVER_LIMIT: Duration = Duration::from_secs(300);
const STOP_LIMIT: Duration = Duration::from_secs(60);
/// WAL segments that are fetched for one rewind, at most.
const FETCH_MAX: usize = 256;
const FETCH_LIMIT: Duration = Duration::from_secs(60);
/// `pg_rewind --dry-run` reads the WAL since the histories parted and lists all files of both.
const DRY_LIMIT: Duration = Duration::from_secs(30 * 60);

/// How it became a standby, not yet started.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rejoined {
    pub how: RejoinHow,
    /// The old directory, or what was kept of it.
    pub aside: Option<PathBuf>,
}

/// How far a rewind is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// What is not PostgreSQL's is moved out; the cluster is what it was.
    Moving,
    Rewinding,
    Rewound,
}

impl Phase {
    const ALL: [(Phase, &'static str); 3] =
        [(Phase::Moving, "moving"), (Phase::Rewinding, "rewinding"), (Phase::Rewound, "rewound")];
}

/// What stands in `state_dir` while a rewind is under way.
pub(super) struct Mark {
    kept: PathBuf,
    phase: Phase,
    /// The data directory's before.
    pub(super) mode: u32,
}

impl Mark {
    pub(super) fn read(state_dir: &Path) -> Option<Mark> {
        let text = fs::read_to_string(state_dir.join(MARK)).ok()?;
        let (word, rest) = text.trim_end().split_once(' ')?;
        let (phase, _) = Phase::ALL.into_iter().find(|(_, known)| *known == word)?;
        // An older version's has no mode.
        let octal = |(mode, kept)| Some((u32::from_str_radix(mode, 8).ok()?, kept));
        let (mode, kept) = rest.split_once(' ').and_then(octal).unwrap_or((PRIVATE, rest));
        Some(Mark { kept: PathBuf::from(kept), phase, mode })
    }

    fn write(&self, state_dir: &Path) -> Result<(), PgError> {
        let word = Phase::ALL.into_iter().find(|(phase, _)| *phase == self.phase).map_or("rewinding", |(_, word)| word);
        let text = format!("{word} {:o} {}\n", self.mode, self.kept.display());
        files::replace(&state_dir.join(MARK), text.as_bytes(), 0o600)
    }

    /// This machine's own files as they were before.
    pub(super) fn own(&self) -> PathBuf {
        self.kept.join("own")
    }
}

/// A rewind of this directory began and did not end.
pub(super) fn is_half_rewound(data_dir: &Path) -> bool {
    fs::metadata(data_dir).is_ok_and(|meta| meta.permissions().mode() & 0o777 == POISON)
}

/// The mode of a directory that PostgreSQL would start in.
pub(super) fn mode_of(data_dir: &Path) -> Option<u32> {
    let mode = fs::metadata(data_dir).ok()?.permissions().mode() & 0o777;
    [PRIVATE, GROUP_READS].contains(&mode).then_some(mode)
}

/// Makes PostgreSQL refuse to start in it.
pub(super) fn poison(data_dir: &Path) -> Result<(), PgError> {
    set_mode(data_dir, POISON)
}

pub(super) fn set_mode(dir: &Path, mode: u32) -> Result<(), PgError> {
    fs::set_permissions(dir, fs::Permissions::from_mode(mode))
        .and_then(|()| fs::File::open(dir)?.sync_all())
        .map_err(|error| files::failed("given another mode", dir, &error))
}

impl Cluster {
    /// Makes this node's stopped cluster a standby that follows `peer`, not yet started.
    ///
    /// # Errors
    /// `Refused`: nothing was touched. Anything else: call again; what was there is in place, or set aside.
    pub async fn rejoin(
        &self,
        peer: &Peer,
        source: &SourceFacts,
        tell: &mut impl FnMut(Tick),
    ) -> Result<Rejoined, PgError> {
        let data_dir = &self.settings.data_dir;
        if self.is_running() {
            return Err(PgError::Refused("PostgreSQL runs here; stop it before it is rejoined".to_owned()));
        }
        files::settled().await;
        // Of a daemon that was killed meanwhile.
        postmaster::kill_tool("pg_rewind", data_dir);
        self.undo_rewind_not_begun().await?;
        let rewound = |mark: &Mark| mark.phase == Phase::Rewound && is_half_rewound(data_dir);
        if let Some(mark) = Mark::read(&self.state_dir).filter(rewound) {
            self.finish_rewind(&mark, peer).await?;
            return Ok(Rejoined { how: RejoinHow::Rewind, aside: Some(mark.kept) });
        }
        match self.gentle(peer, source, tell).await? {
            Ok(done) => Ok(done),
            Err(why) => {
                tell(Tick::Words(format!("cloning: {why}")));
                let aside = self.clone_from(peer, source, tell).await?;
                files::remove(&self.state_dir.join(MARK))?;
                Ok(Rejoined { how: RejoinHow::Clone, aside })
            }
        }
    }

    /// By following or rewinding; the inner error says why it must be a clone.
    async fn gentle(
        &self,
        peer: &Peer,
        source: &SourceFacts,
        tell: &mut impl FnMut(Tick),
    ) -> Result<Result<Rejoined, String>, PgError> {
        let mut way = match self.way(source).await {
            Ok(way) => way,
            Err(error) => return Ok(Err(error.to_string())),
        };
        if matches!(way, Way::Rewind(_)) && !self.local().await.is_ok_and(|local| local.clean) {
            tell(Tick::Words("it crashed: recovering it, read-only, to see where its WAL ends".to_owned()));
            if let Err(error) = self.recover_read_only().await {
                return Ok(Err(format!("it does not recover ({error})")));
            }
            way = match self.way(source).await {
                Ok(way) => way,
                Err(error) => return Ok(Err(error.to_string())),
            };
        }
        match way {
            Way::Refuse(why) => Err(PgError::Refused(why)),
            Way::Clone { why, diverged } => {
                diverged.iter().for_each(|diverged| tell(told(diverged, "they stay in the directory set aside")));
                Ok(Err(why))
            }
            Way::Follow { .. } => {
                tell(Tick::Words("no rewind needed: its data is a beginning of the active node's".to_owned()));
                self.make_standby(Some(peer))?;
                Ok(Ok(Rejoined { how: RejoinHow::Follow, aside: None }))
            }
            Way::Rewind(diverged) => self.rewind(peer, source, &diverged, tell).await,
        }
    }

    /// A cluster that crashed, brought to a clean stop without ever being writable.
    async fn recover_read_only(&self) -> Result<(), PgError> {
        self.make_standby(None)?;
        let started = self.start(RECOVER_LIMIT).await;
        self.stop(StopMode::Fast, STOP_LIMIT).await?;
        started
    }

    async fn rewind(
        &self,
        peer: &Peer,
        source: &SourceFacts,
        diverged: &Divergence,
        tell: &mut impl FnMut(Tick),
    ) -> Result<Result<Rejoined, String>, PgError> {
        self.write_passfile()?;
        let restore = self.has_restore_command();
        if let Err(why) = self.rehearse(peer, diverged, restore, tell).await {
            return Ok(Err(format!("pg_rewind is not possible ({why})")));
        }
        if let Some(why) = self.rewind_refusal(source, diverged).await {
            return Err(PgError::Refused(why));
        }
        let command = self.pg_rewind(peer, restore)?;
        let kept = self.keep_diverged(diverged).await?;
        tell(told(diverged, &format!("their WAL is kept in {}", kept.display())));
        let mode = mode_of(&self.settings.data_dir).unwrap_or(PRIVATE);
        let mut mark = Mark { kept, phase: Phase::Moving, mode };
        if let Err(error) = self.make_ready(&mut mark).await {
            self.undo(&mark).await?;
            return Ok(Err(format!("a rewind cannot be made ready ({error})")));
        }
        tell(Tick::Phase("rewinding"));
        if let Err(error) = progress::watched(command, "pg_rewind", tell).await {
            return Ok(Err(format!("{error}; what it left is set aside")));
        }
        mark.phase = Phase::Rewound;
        mark.write(&self.state_dir)?;
        self.finish_rewind(&mark, peer).await?;
        Ok(Ok(Rejoined { how: RejoinHow::Rewind, aside: Some(mark.kept) }))
    }

    async fn finish_rewind(&self, mark: &Mark, peer: &Peer) -> Result<(), PgError> {
        let data_dir = &self.settings.data_dir;
        self.write_passfile()?;
        self.make_own(Some(&mark.own()), data_dir, peer).await?;
        self.put_back(mark).await
    }

    /// What belongs to the directory and its mode; then the mark goes.
    async fn put_back(&self, mark: &Mark) -> Result<(), PgError> {
        let (own, data_dir) = (mark.own(), self.settings.data_dir.clone());
        files::apart(move || own::move_back(&own, &data_dir)).await?;
        set_mode(&self.settings.data_dir, mark.mode)?;
        files::remove(&self.state_dir.join(MARK))
    }

    /// All that comes before `pg_rewind`; until the last line it can be undone.
    async fn make_ready(&self, mark: &mut Mark) -> Result<(), PgError> {
        mark.write(&self.state_dir)?;
        let (own, data_dir) = (mark.own(), self.settings.data_dir.clone());
        files::apart(move || own::move_foreign(&data_dir, &own)).await?;
        poison(&self.settings.data_dir)?;
        mark.phase = Phase::Rewinding;
        mark.write(&self.state_dir)
    }

    /// `pg_rewind` has not run: the directory is made what it was.
    async fn undo(&self, mark: &Mark) -> Result<(), PgError> {
        if mark.own().exists() && self.settings.data_dir.exists() {
            return self.put_back(mark).await;
        }
        files::remove(&self.state_dir.join(MARK))
    }

    /// Of a daemon that was killed before its `pg_rewind` began.
    pub(super) async fn undo_rewind_not_begun(&self) -> Result<(), PgError> {
        match Mark::read(&self.state_dir).filter(|mark| mark.phase == Phase::Moving) {
            Some(mark) => self.undo(&mark).await,
            None => Ok(()),
        }
    }

    /// A `pg_rewind` may have begun here, and did not end.
    pub(super) fn is_rewind_broken(&self) -> bool {
        is_half_rewound(&self.settings.data_dir)
            && Mark::read(&self.state_dir).is_none_or(|mark| mark.phase != Phase::Moving)
    }

    /// A `pg_rewind` that breaks off can only be followed by a clone: one that would be refused then is asked for now.
    pub(super) async fn rewind_refusal(&self, source: &SourceFacts, diverged: &Divergence) -> Option<String> {
        let (data_dir, diverged) = (self.settings.data_dir.clone(), diverged.clone());
        let keeping = files::apart(move || Ok(diverged_wal(&data_dir, &diverged)?.iter().map(|(_, size)| size).sum()));
        let refused = match keeping.await {
            Ok(keeping) => self.clone_refusal(source, keeping).await.err(),
            Err(error) => Some(error),
        };
        refused
            .map(|why| format!("a pg_rewind that breaks off needs a clone after it, which is not possible here: {why}"))
    }

    /// `pg_rewind --dry-run` until it has all the WAL it asks for.
    async fn rehearse(
        &self,
        peer: &Peer,
        diverged: &Divergence,
        restore: bool,
        tell: &mut impl FnMut(Tick),
    ) -> Result<(), String> {
        let size = self.local().await.map_err(|error| error.to_string())?.segment_size;
        let wal = self.settings.data_dir.join("pg_wal");
        for _ in 0..FETCH_MAX {
            let mut command = self.pg_rewind(peer, restore).map_err(|error| error.to_string())?;
            command.arg("--dry-run");
            let output = tool::run(command, "pg_rewind", DRY_LIMIT).await.map_err(|error| error.to_string())?;
            if output.ok && !output.err.contains("no rewind required") {
                return Ok(());
            }
            let reason =
                output.err.lines().find(|line| line.contains("error:")).unwrap_or(&output.err).trim().to_owned();
            // Names of segments that are not here, but may be at the source as they were here: from before the
            // histories parted.
            let missing = output.err.split(|c: char| !c.is_ascii_hexdigit()).find(|word| {
                history::segment_of(word, size).is_some_and(|(timeline, first)| {
                    timeline <= diverged.timeline && first.0 + size <= diverged.at.0 && !wal.join(word).exists()
                })
            });
            let Some(segment) = missing else { return Err(reason) };
            tell(Tick::Words(format!("fetching WAL segment {segment} from the active node")));
            self.fetch_segment(peer, segment, size).await.map_err(|error| format!("{reason}; {error}"))?;
        }
        Err(format!("more than {FETCH_MAX} WAL segments are missing here"))
    }

    /// A segment of the source's `pg_wal`, put into ours.
    async fn fetch_segment(&self, peer: &Peer, segment: &str, size: u64) -> Result<(), PgError> {
        let wal = self.settings.data_dir.join("pg_wal");
        let answer = wal.join(format!("{segment}.portcullis-fetch"));
        let mut command = tool::command(self.bin("psql"));
        command.args(["-X", "-A", "-t", "-w", "-v", "ON_ERROR_STOP=1", "-d"]).arg(self.source_conninfo(peer)?);
        command.arg("-o").arg(&answer);
        command.args(["-c", &format!("SELECT encode(pg_read_binary_file('pg_wal/{segment}'), 'base64')")]);
        let output = tool::run(command, "psql", FETCH_LIMIT).await;
        if !output.as_ref().is_ok_and(|output| output.ok) {
            let _nothing_there_is_fine = fs::remove_file(&answer);
        }
        let output = output?;
        if !output.ok {
            return Err(PgError::Failed(format!("the active node does not give it: {}", output.last_line())));
        }
        let to = wal.join(segment);
        files::apart(move || {
            let text = fs::read(&answer).unwrap_or_default();
            let _nothing_there_is_fine = fs::remove_file(&answer);
            let text: Vec<u8> = text.into_iter().filter(|byte| !byte.is_ascii_whitespace()).collect();
            let bytes = data_encoding::BASE64.decode(&text).unwrap_or_default();
            if u64::try_from(bytes.len()) != Ok(size) {
                return Err(PgError::Failed(format!("the active node gave {} bytes, not a segment", bytes.len())));
            }
            files::replace(&to, &bytes, 0o600)
        })
        .await
    }

    fn pg_rewind(&self, peer: &Peer, restore: bool) -> Result<tokio::process::Command, PgError> {
        let mut command = tool::command(self.bin("pg_rewind"));
        command.arg("--target-pgdata").arg(&self.settings.data_dir);
        command.arg("--source-server").arg(self.source_conninfo(peer)?);
        // It was stopped, and recovered, by us.
        command.args(["--progress", "--no-ensure-shutdown"]);
        if restore {
            command.arg("--restore-target-wal");
            if let Some(debian) = self.debian() {
                command.arg("--config-file").arg(debian.config);
            }
        }
        Ok(command)
    }

    /// As the replication role, in a database: `pg_rewind` reads files by SQL.
    fn source_conninfo(&self, peer: &Peer) -> Result<String, PgError> {
        Ok(format!("{} dbname=postgres", self.tool_conninfo(peer, APPLICATION)?))
    }

    /// The administrator's `restore_command`, which `pg_rewind` can use: with a configuration apart from the data
    /// directory only from 15 on (`--config-file`).
    pub(super) fn has_restore_command(&self) -> bool {
        let data_dir = &self.settings.data_dir;
        let text = |path: PathBuf| settings::read_or_empty(&path).unwrap_or_default();
        let version = text(data_dir.join("PG_VERSION")).trim().parse::<u32>().unwrap_or(0);
        let debian = self.debian();
        if debian.is_some() && version < 15 {
            return false;
        }
        let main = debian.map_or_else(|| data_dir.join("postgresql.conf"), |debian| debian.config);
        let auto = autoconf::value_in(&text(data_dir.join(own::AUTO_CONF)), "restore_command");
        let value = auto.or_else(|| autoconf::value_in(&text(main), "restore_command"));
        value.is_some_and(|value| !value.trim().is_empty())
    }

    /// What only this node has, in a dated directory, before anything of it is changed.
    async fn keep_diverged(&self, diverged: &Divergence) -> Result<PathBuf, PgError> {
        let (data_dir, kept) = (self.settings.data_dir.clone(), self.kept_name(DIVERGED_INFIX)?);
        let report = serde_json::json!({
            "node": self.node.as_str(),
            "diverged_at": diverged.at.to_string(),
            "timeline": diverged.timeline.0,
            "diverged_transactions": diverged.transactions,
            "all_wal_kept": diverged.whole,
            "look": format!("pg_waldump -p wal -s {}", diverged.at),
        });
        let report = format!("{report:#}\n");
        let diverged = diverged.clone();
        files::apart(move || keep_in(&kept, &data_dir, &diverged, &report).map(|()| kept)).await
    }
}

fn keep_in(kept: &Path, data_dir: &Path, diverged: &Divergence, report: &str) -> Result<(), PgError> {
    for dir in [kept.to_owned(), kept.join("wal"), kept.join("own")] {
        fs::DirBuilder::new().mode(0o700).create(&dir).map_err(|error| files::failed("made", &dir, &error))?;
    }
    own::keep(data_dir, &kept.join("own"))?;
    files::copy(&data_dir.join("global/pg_control"), &kept.join("pg_control"))?;
    for (name, _) in diverged_wal(data_dir, diverged)? {
        files::copy(&data_dir.join("pg_wal").join(&name), &kept.join("wal").join(&name))?;
    }
    files::sync_parent(&kept.join("wal/."))?;
    files::replace(&kept.join("report.json"), report.as_bytes(), 0o600)
}

/// The files of `pg_wal` that tell what diverged, with their sizes.
fn diverged_wal(data_dir: &Path, diverged: &Divergence) -> Result<Vec<(OsString, u64)>, PgError> {
    let wal = data_dir.join("pg_wal");
    let entries = fs::read_dir(&wal).map_err(|error| files::failed("read", &wal, &error))?.flatten();
    let wanted = |entry: fs::DirEntry| {
        let (name, meta) = (entry.file_name(), entry.metadata().ok()?);
        let text = name.to_str()?;
        let tells = text.ends_with(".history") || is_diverged_segment(text, diverged, meta.len());
        (tells && meta.is_file()).then(|| (name.clone(), meta.len()))
    };
    Ok(entries.filter_map(wanted).collect())
}

/// A segment with WAL from where the histories part. `size` is the file's, which is the segment size.
fn is_diverged_segment(name: &str, diverged: &Divergence, size: u64) -> bool {
    history::segment_of(name, size.max(1))
        .is_some_and(|(timeline, first)| timeline >= diverged.timeline && first.0 + size > diverged.at.0)
}

fn told(diverged: &Divergence, kept: &str) -> Tick {
    let count = diverged.transactions;
    let least = if diverged.whole { "" } else { "at least " };
    let words = format!("{least}{count} transactions were committed here alone since {}; {kept}", diverged.at);
    Tick::Diverged { transactions: count, words }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::ids::{Lsn, TimelineId};

    #[test]
    fn a_mark_is_read_as_it_was_written() {
        let dir = tempfile::tempdir().expect("tempdir");
        assert!(Mark::read(dir.path()).is_none());
        for (phase, _) in Phase::ALL {
            Mark { kept: "/a b/c".into(), phase, mode: 0o750 }.write(dir.path()).expect("written");
            let mark = Mark::read(dir.path()).expect("there");
            assert_eq!((mark.phase, mark.mode, mark.own()), (phase, 0o750, PathBuf::from("/a b/c/own")));
        }
        fs::write(dir.path().join(MARK), "rewound /a b/c\n").expect("written");
        let older = Mark::read(dir.path()).expect("there");
        assert_eq!((older.phase, older.mode, older.own()), (Phase::Rewound, 0o700, PathBuf::from("/a b/c/own")));
    }

    #[test]
    fn a_directory_is_half_rewound_by_its_mode() {
        let dir = tempfile::tempdir().expect("tempdir");
        assert!(!is_half_rewound(dir.path()));
        poison(dir.path()).expect("poisoned");
        assert!(is_half_rewound(dir.path()));
        assert!(!is_half_rewound(&dir.path().join("none")));
    }

    #[test]
    fn diverged_segments_are_those_from_the_fork_on() {
        let diverged = Divergence { at: Lsn(0x500_0098), timeline: TimelineId(2), transactions: 0, whole: true };
        let size = 16 << 20;
        for (name, wanted) in [
            ("000000020000000000000004", false),
            ("000000020000000000000005", true),
            ("000000030000000000000006", true),
            ("000000010000000000000005", false),
            ("00000003.history", false),
        ] {
            assert_eq!(is_diverged_segment(name, &diverged, size), wanted, "{name}");
        }
    }
}
