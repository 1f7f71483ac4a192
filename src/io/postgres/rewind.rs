//! Rejoin: the cluster here becomes a standby of the active node's, by the gentlest way that is right.
//!
//! ```text
//!  look (divergence) -> follow:  settings, standby.signal
//!                    -> rewind:  recovered read-only if it crashed -> pg_rewind --dry-run, WAL it misses fetched
//!                                -> DATA.diverged-TIME/{wal/, own/, pg_control, report.json, begun.json}
//!                                -> mark "moving", foreign files moved out -> mode 0701, mark "rewinding"
//!                                -> pg_rewind -> own files and settings, standby.signal -> old mode, mark gone
//!       interrupted: again       -> what is kept put back -> pg_rewind --dry-run -> pg_rewind -> ... (`again`)
//!                    -> clone:   whenever anything of that cannot be had
//! ```
//!
//! **Invariants:** `pg_rewind` changes DATA in place, so what only this node has (the diverged WAL) is kept first, and
//! a half-rewound directory is never started: until the end its mode is one that PostgreSQL refuses to start with, and
//! the mark keeps the daemon and `may-start-primary` from it if a person mends that mode. It is rewound again, or set
//! aside by a clone. What was moved before `pg_rewind` ran is moved back when it then does not run. Nobody but
//! `pg_rewind` itself says how it ended; that it was needed is our finding, and when it then says that it was not, that
//! is a fault.
//!
//! Over 600 lines: it is one procedure, and each step says what a crash after it leaves behind.

use super::control::StopMode;
use super::divergence::{Alone, Divergence, UNCOUNTED, Way};
use super::kept::Keeping;
use super::progress::{self, Tick};
use super::{
    Cluster, Peer, PgError, SourceFacts, control, files, history, own, paths, postmaster, settings, spaces, tool,
};
use crate::base::ids::Lsn;
use crate::engine::report::RejoinHow;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Under `state_dir` from before a rewind changes anything until all is in order again.
const MARK: &str = "rewind-under-way";
/// Of the data directory meanwhile: PostgreSQL starts only with 0700 or 0750 (`checkDataDir`), and nobody else may look
/// inside either.
const POISON: u32 = 0o701;
/// A cluster's mode; `initdb -g` makes it 0750.
pub(super) const PRIVATE: u32 = 0o700;
const GROUP_READS: u32 = 0o750;
/// The functions that `pg_rewind` reads files with.
const AS_REWIND: &str = "SELECT (SELECT count(*) FROM pg_ls_dir('global', true, false)), \
    (pg_stat_file('global/pg_control', true)).size, octet_length(pg_read_binary_file('global/pg_control')), \
    octet_length(pg_read_binary_file('global/pg_control', 0, 1, true))";
/// A connection of `pg_rewind` is told from others by it.
const APPLICATION: &str = "portcullis-rewind";
/// A crashed cluster's recovery, and its stop.
const RECOVER_LIMIT: Duration = Duration::from_secs(300);
const STOP_LIMIT: Duration = Duration::from_secs(60);
/// Where a clone leaves what it does not take.
const SET_ASIDE: &str = "they stay in the directory set aside";
/// A question asked as `pg_rewind` would.
const TRY_LIMIT: Duration = Duration::from_secs(20);
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

impl Rejoined {
    /// Where a clone put what was here: the directory, and what lies outside it.
    pub fn set_aside(&self) -> Option<String> {
        let aside = self.aside.as_ref().filter(|_| self.how == RejoinHow::Clone)?;
        let outside: Vec<String> = spaces::led_to(aside).iter().map(|dir| dir.display().to_string()).collect();
        let with = if outside.is_empty() { String::new() } else { format!(", with {}", outside.join(", ")) };
        Some(format!("the old data directory is kept as {}{with}", aside.display()))
    }
}

/// Why `pg_rewind` would get nothing from the source as things stand.
#[derive(Debug)]
pub(super) enum Obstacle {
    /// Made away with by what a rejoin does first: role, password and rights are the active node's to make.
    MayGo(String),
    Stays(String),
}

/// How far a rewind is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    /// What is not PostgreSQL's is moved out; the cluster is what it was.
    Moving,
    Rewinding,
    Rewound,
    /// The copy is complete that takes the half-rewound one's place.
    Cloning,
}

impl Phase {
    const ALL: [(Phase, &'static str); 4] = [
        (Phase::Moving, "moving"),
        (Phase::Rewinding, "rewinding"),
        (Phase::Rewound, "rewound"),
        (Phase::Cloning, "cloning"),
    ];
}

/// What stands in `state_dir` while a rewind is under way.
pub(super) struct Mark {
    pub(super) kept: PathBuf,
    pub(super) phase: Phase,
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

    pub(super) fn write(&self, state_dir: &Path) -> Result<(), PgError> {
        let word = Phase::ALL.into_iter().find(|(phase, _)| *phase == self.phase).map_or("rewinding", |(_, word)| word);
        let text = format!("{word} {:o} {}\n", self.mode, self.kept.display());
        files::replace(&state_dir.join(MARK), text.as_bytes(), 0o600)
    }

    /// From now on the data directory may be a copy, with nothing half about it.
    pub(super) fn ends_in_a_clone(state_dir: &Path) -> Result<(), PgError> {
        Mark::read(state_dir).map_or(Ok(()), |mark| Mark { phase: Phase::Cloning, ..mark }.write(state_dir))
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

/// A `pg_rewind` may have begun here and did not end, or all that comes after it did not. Where a person has given the
/// directory its old mode, the mark still says so.
pub fn is_rewind_broken(state_dir: &Path, data_dir: &Path) -> bool {
    match Mark::read(state_dir).map(|mark| mark.phase) {
        Some(Phase::Moving) => false,
        Some(Phase::Rewinding) => data_dir.join("PG_VERSION").exists(),
        Some(Phase::Rewound | Phase::Cloning) | None => is_half_rewound(data_dir),
    }
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
        if let Some(mark) = self.rewound() {
            self.finish_rewind(&mark, peer).await?;
            return Ok(Rejoined { how: RejoinHow::Rewind, aside: Some(mark.kept) });
        }
        if !self.is_rewind_broken() && !self.is_copy_moving_in() {
            // Of one that ended just before a crash.
            files::remove(&self.state_dir.join(MARK))?;
        }
        match self.gentle(peer, source, tell).await? {
            Ok(done) => Ok(done),
            Err(why) => {
                tell(Tick::Words(format!("cloning: {why}")));
                let aside = self.clone_from(peer, source, tell).await.map_err(|error| match error {
                    PgError::Refused(refusal) => PgError::Refused(format!("{why}; and a clone is refused: {refusal}")),
                    error => error,
                })?;
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
        if self.is_rewind_broken() {
            // Somebody may have given it its old mode.
            poison(&self.settings.data_dir)?;
            let again = self.rewind_again(peer, source, tell).await?;
            return Ok(again.map_err(|why| format!("a rewind was interrupted here, and cannot be done again ({why})")));
        }
        let mut way = match self.way(source).await {
            Ok(way) => way,
            Err(error) => return Ok(Err(uncounted(error.to_string(), tell))),
        };
        if let Way::Rewind(diverged) = &way
            && !self.local().await.is_ok_and(|local| local.clean)
        {
            let diverged = diverged.clone();
            tell(Tick::Words("it crashed: recovering it, read-only, to see where its WAL ends".to_owned()));
            if let Err(error) = self.recover_read_only().await {
                // Of its WAL as it lies there: the recovery would have ended at the same place.
                tell(told(&diverged, SET_ASIDE));
                return Ok(Err(format!("it does not recover ({error})")));
            }
            way = match self.way(source).await {
                Ok(way) => way,
                Err(error) => {
                    tell(told(&diverged, SET_ASIDE));
                    return Ok(Err(error.to_string()));
                }
            };
        }
        match way {
            Way::Refuse(why) => Err(PgError::Refused(why)),
            Way::Clone { why, alone } => Ok(Err(match alone {
                Alone::Nothing => why,
                Alone::Unknown => uncounted(why, tell),
                Alone::Counted(diverged) => {
                    tell(told(&diverged, SET_ASIDE));
                    why
                }
            })),
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
        let restore = self.can_restore_for_rewind().await;
        let common = match self.rehearse(peer, diverged, restore, tell).await {
            Ok(common) => common,
            Err(why) => {
                tell(told(diverged, SET_ASIDE));
                return Ok(Err(format!("pg_rewind is not possible ({why})")));
            }
        };
        let mut diverged = diverged.clone();
        if !diverged.whole
            && let Ok(Way::Rewind(fetched)) = self.way(source).await
        {
            // The rehearsal may have brought what was missing.
            diverged = fetched;
        }
        let keeping = self.keeping(&diverged, common.map(|common| (common, source.oldest)))?;
        if let Some(why) = self.rewind_refusal(source, &keeping).await {
            return Err(PgError::Refused(why));
        }
        let command = self.pg_rewind(peer, restore)?;
        let kept = self.keep_diverged(peer, source, keeping).await?;
        tell(told(&diverged, &format!("their WAL is kept in {}", kept.display())));
        let mode = mode_of(&self.settings.data_dir).unwrap_or(PRIVATE);
        let mut mark = Mark { kept, phase: Phase::Moving, mode };
        if let Err(error) = self.make_ready(&mut mark, source).await {
            self.undo(&mark).await?;
            return Ok(Err(format!("a rewind cannot be made ready ({error})")));
        }
        match self.run_rewind(command, mark, peer, tell).await? {
            Ok(done) => Ok(Ok(done)),
            Err(why) => {
                tell(Tick::Words(format!("{why}: once more")));
                let again = self.rewind_again(peer, source, tell).await?;
                Ok(again.map_err(|again| format!("{why}, and again: {again}")))
            }
        }
    }

    /// The one step that leaves a half-rewound directory when it breaks off.
    pub(super) async fn run_rewind(
        &self,
        command: tokio::process::Command,
        mut mark: Mark,
        peer: &Peer,
        tell: &mut impl FnMut(Tick),
    ) -> Result<Result<Rejoined, String>, PgError> {
        tell(Tick::Phase("rewinding"));
        if let Err(error) = progress::watched(command, "pg_rewind", tell).await {
            return Ok(Err(error.to_string()));
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
        self.put_back(mark, None).await
    }

    /// What belongs to the directory and its mode; then the mark goes. `later`: where what was made there since goes.
    async fn put_back(&self, mark: &Mark, later: Option<PathBuf>) -> Result<(), PgError> {
        let (own, data_dir) = (mark.own(), self.settings.data_dir.clone());
        files::apart(move || own::move_back(&own, &data_dir, later.as_deref())).await?;
        set_mode(&self.settings.data_dir, mark.mode)?;
        files::remove(&self.state_dir.join(MARK))
    }

    /// All that comes before `pg_rewind`; until the last line it can be undone.
    async fn make_ready(&self, mark: &mut Mark, source: &SourceFacts) -> Result<(), PgError> {
        spaces::make_missing(source)?;
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
            // Nothing there is the source's: a server that a person started meanwhile wrote it.
            let later = paths::dated_name(&mark.own(), "-later-");
            return self.put_back(mark, Some(later)).await;
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
        is_rewind_broken(&self.state_dir, &self.settings.data_dir)
    }

    /// A copy was taking the place of a half-rewound directory, and is not there whole: what was there may be set aside
    /// already, and only the mark knows this machine's own files.
    fn is_copy_moving_in(&self) -> bool {
        let data_dir = &self.settings.data_dir;
        let is_in = data_dir.join("PG_VERSION").exists() && mode_of(data_dir).is_some();
        !is_in && Mark::read(&self.state_dir).is_some_and(|mark| mark.phase == Phase::Cloning)
    }

    /// It is no cluster now.
    pub(super) fn refuses_half(&self) -> PgError {
        let dir = self.settings.data_dir.display();
        PgError::Refused(format!(
            "a rewind of {dir} did not end, and PostgreSQL is not started in it; run rejoin again, it goes on"
        ))
    }

    /// The mark of a `pg_rewind` that ended, when what comes after it did not.
    pub(super) fn rewound(&self) -> Option<Mark> {
        let rewound = |mark: &Mark| mark.phase == Phase::Rewound && is_half_rewound(&self.settings.data_dir);
        Mark::read(&self.state_dir).filter(rewound)
    }

    /// Why a rewind must not begin here; nothing is touched.
    pub(super) async fn rewind_refusal(&self, source: &SourceFacts, keeping: &Keeping) -> Option<String> {
        if let Err(why) = spaces::refuse_inside(source, &paths::resolved(&self.settings.data_dir)) {
            return Some(why.to_string());
        }
        match self.rewind_room(source, keeping).await {
            Ok(short) => short.map(|short| short.refusal("the rewind needs about").to_string()),
            Err(error) => Some(error.to_string()),
        }
    }

    /// What a person should know before: whether a clone could follow a rewind that cannot be done again.
    pub(super) async fn without_way_back(&self, source: &SourceFacts, keeping: Keeping) -> Option<String> {
        let but = "should this machine crash in the middle of it, only a clone helps";
        match self.clone_obstacle(source, Some(keeping)).await {
            Ok(None) => None,
            Ok(Some(short)) => Some(format!("{but}, for which {}", short.words())),
            Err(why) => Some(format!("{but}, which as things stand is refused: {why}")),
        }
    }

    /// `pg_rewind --dry-run` until it has all the WAL it asks for; gives the checkpoint it goes back to.
    pub(super) async fn rehearse(
        &self,
        peer: &Peer,
        diverged: &Divergence,
        restore: bool,
        tell: &mut impl FnMut(Tick),
    ) -> Result<Option<Lsn>, String> {
        let size = self.local().await.map_err(|error| error.to_string())?.segment_size;
        let wal = self.settings.data_dir.join("pg_wal");
        for _ in 0..FETCH_MAX {
            let mut command = self.pg_rewind(peer, restore).map_err(|error| error.to_string())?;
            command.arg("--dry-run");
            let output = tool::run(command, "pg_rewind", DRY_LIMIT).await.map_err(|error| error.to_string())?;
            if output.ok && !output.err.contains("no rewind required") {
                return Ok(common_checkpoint(&output.err));
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

    /// Connects as `pg_rewind` would, and calls what it calls.
    pub(super) async fn try_as_rewind(&self, peer: &Peer) -> Result<(), Obstacle> {
        let stays = |error: PgError| Obstacle::Stays(error.to_string());
        self.write_passfile().map_err(stays)?;
        let mut command = tool::command(self.bin("psql"));
        command.args(["-X", "-A", "-t", "-w", "-v", "ON_ERROR_STOP=1", "-d"]);
        command.arg(self.source_conninfo(peer).map_err(stays)?);
        command.args(["-c", AS_REWIND]);
        let output = tool::run(command, "psql", TRY_LIMIT).await.map_err(stays)?;
        if output.ok {
            return Ok(());
        }
        let said = |part: &str| output.err.contains(part);
        let why = output.err.lines().find(|line| !line.trim().is_empty()).unwrap_or("no message").trim();
        let why = why.trim_start_matches("psql: error: ").to_owned();
        let login = ["password authentication failed", "does not exist", "permission denied", "no password supplied"];
        Err(if login.into_iter().any(said) { Obstacle::MayGo(why) } else { Obstacle::Stays(why) })
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

    pub(super) fn pg_rewind(&self, peer: &Peer, restore: bool) -> Result<tokio::process::Command, PgError> {
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

    /// The administrator has a `restore_command`.
    pub(super) async fn has_restore_command(&self) -> bool {
        let mut command = tool::command(self.bin("postgres"));
        command.arg("-D").arg(&self.settings.data_dir).args(["-C", "restore_command"]);
        if let Some(debian) = self.debian() {
            command.arg("-c").arg(format!("config_file={}", debian.config.display()));
        }
        let output = tool::run(command, "postgres -C", control::LOOK_LIMIT).await;
        output.is_ok_and(|output| output.ok && !output.out.trim().is_empty())
    }

    /// `pg_rewind` can use it: with a configuration apart from the data directory only from 15 on (`--config-file`).
    pub(super) async fn can_restore_for_rewind(&self) -> bool {
        let text = settings::read_or_empty(&self.settings.data_dir.join("PG_VERSION")).unwrap_or_default();
        let version = text.trim().parse::<u32>().unwrap_or(0);
        (self.debian().is_none() || version >= 15) && self.has_restore_command().await
    }
}

/// `pg_rewind: rewinding from last common checkpoint at 0/3000060 on timeline 1`
fn common_checkpoint(said: &str) -> Option<Lsn> {
    let (_, rest) = said.split_once("last common checkpoint at ")?;
    rest.split_whitespace().next()?.parse().ok()
}

/// Gives back why.
fn uncounted(why: String, tell: &mut impl FnMut(Tick)) -> String {
    tell(Tick::Uncounted(format!("{UNCOUNTED} ({why}); if so, {SET_ASIDE}")));
    why
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
    use crate::base::ids::Lsn;

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
    fn a_rehearsal_tells_where_it_goes_back_to() {
        let said = "pg_rewind: servers diverged at WAL location 0/5000098 on timeline 2\n\
                    pg_rewind: rewinding from last common checkpoint at 0/3000060 on timeline 2\n";
        assert_eq!(common_checkpoint(said), Some(Lsn(0x300_0060)));
        assert_eq!(common_checkpoint("pg_rewind: error: x"), None);
    }
}
