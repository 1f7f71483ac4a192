//! What PostgreSQL knows of a role: its secret and its memberships, read from the catalogue over one kept admin
//! connection; and the end of backends whose sessions were killed, over the same.
//!
//! What it is NOT: no cache of secrets, unless `auth.cache` says so: a changed password, a revoked LOGIN or a passed
//! VALID UNTIL counts at the next login by password. Logins of one role that come together share a question that was
//! asked after the last of them came, so that none hears of an older state than with a question of its own.
//!
//! **Invariant:** nobody is refused by what is remembered: only roles that may log in are, and who does not prove
//! himself has the next login ask. (But the salt of an exchange is of one secret: `auth.cache` may cost the first login
//! with a new password.)

use super::gate::Gate;
use super::listener::Rules;
use crate::base::time::Instant;
use crate::wire::md5;
use crate::wire::scram::{self, Verifier};
use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex as Lock, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;
use tokio::net::UnixStream;
use tokio::runtime::Handle;
use tokio::sync::Mutex;
use tokio_postgres::{Client, NoTls, Row, Statement};
use zeroize::Zeroizing;

/// How long a look-up may take, a new admin connection included; then the login is refused (57P03).
const LOOKUP_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a role that may log in is let in by trust or a certificate without being asked about again.
const LOGIN_REMEMBERED: Duration = Duration::from_secs(1);
/// Roles remembered; more are asked about each time, until some were not seen for a while.
const MAX_REMEMBERED: usize = 1024;
/// One row always, for a role that does not exist too. `VALID UNTIL` is judged by PostgreSQL's own clock.
const ROLE: &str = "select r.rolcanlogin, \
     case when r.rolvaliduntil is null or r.rolvaliduntil > pg_catalog.now() then r.rolpassword end, \
     pg_catalog.current_setting('password_encryption') = 'md5', \
     pg_catalog.current_setting('scram_iterations', true) \
     from (values (1)) one left join pg_catalog.pg_authid r on r.rolname = $1::text::name";
/// Explicit grants alone, direct or not: PostgreSQL's `is_member_of_role_nosuper`.
const MEMBERSHIPS: &str = "with recursive member (of) as (\
     select oid from pg_catalog.pg_authid where rolname = $1::text::name \
     union select m.roleid from pg_catalog.pg_auth_members m join member on m.member = member.of) \
     select r.rolname::text from pg_catalog.pg_authid r join member on r.oid = member.of";
/// Those of a database that were there at that time (a number may mean another by now), but none whose commit waits for
/// its standby, or may be about to: that would show it to others although the standby does not have it (R4).
const END: &str = "select pg_catalog.pg_terminate_backend(pid) from pg_catalog.pg_stat_activity \
     where pid = any ($1::int4[]) and datname = $2::text::name and backend_start < $3::text::timestamptz \
     and wait_event is distinct from 'SyncRep' and (backend_xid is null or state <> 'active')";
/// Those whose commits wait for their standby.
const HELD_UP: &str = "select pg_catalog.count(*) from pg_catalog.pg_stat_activity \
     where pid = any ($1::int4[]) and wait_event = 'SyncRep'";
/// Whatever ALTER ROLE or ALTER DATABASE say: the names in the query are PostgreSQL's own.
const OPTIONS: &str = "-c search_path=pg_catalog";
/// Databases tried for the admin connection, in order.
const DATABASES: [&str; 2] = ["postgres", "template1"];

/// The way to `pg_authid`.
pub(crate) struct Roles {
    door: Arc<PathBuf>,
    admin_user: String,
    rules: Arc<Rules>,
    gate: Arc<Gate>,
    kept: Mutex<Option<Arc<Kept>>>,
    /// Roles that may log in and did.
    remembered: Lock<HashMap<String, Arc<Role>>>,
    shared: Lock<HashMap<String, Arc<Shared>>>,
    /// Drives the connection, whoever asks first: not the guard's runtime, and no data thread.
    runtime: OnceLock<Handle>,
}

/// The logins of one role that wait for an answer.
#[derive(Default)]
struct Shared {
    came: AtomicU64,
    /// The last answer, and how many had come before its question.
    answer: Mutex<(u64, Option<Arc<Role>>)>,
}

/// A place among them; the last one to leave clears the table.
struct Place<'a> {
    roles: &'a Roles,
    role: &'a str,
    shared: Arc<Shared>,
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        let mut all = locked(&self.roles.shared);
        // The table's and ours.
        if Arc::strong_count(&self.shared) == 2 {
            all.remove(self.role);
        }
    }
}

fn locked<T>(lock: &Lock<T>) -> MutexGuard<'_, T> {
    // Nothing panics while one of these is held, and a panic ends the process.
    lock.lock().unwrap_or_else(PoisonError::into_inner)
}

struct Kept {
    client: Client,
    role: Statement,
}

#[derive(Clone, Copy)]
enum Question {
    Role,
    Memberships,
}

/// What a role's password is proven against.
#[derive(Clone)]
pub(crate) enum Secret {
    Scram(Verifier),
    Md5(md5::Hash),
}

/// What is known of a role, or of one that does not exist.
#[derive(Clone)]
pub(crate) struct Role {
    /// When the question was asked.
    asked: Instant,
    /// `None`: there is no such role.
    pub(crate) may_log_in: Option<bool>,
    /// `None`: no such role, no password, or none that is valid now.
    pub(crate) secret: Option<Secret>,
    /// New passwords are stored as md5: so would this role's be, if it had one.
    pub(crate) md5_is_usual: bool,
    /// Iterations that this role's secret would have.
    pub(crate) iterations: u32,
}

/// PostgreSQL could not be asked; for the log, never for a client.
#[derive(Debug, thiserror::Error)]
#[error(
    "the roles of PostgreSQL cannot be read as its superuser over {door}: {why}; check that it runs and lets the \
     daemon's user in"
)]
pub(crate) struct Unreadable {
    door: String,
    why: String,
}

impl Roles {
    pub(crate) fn new(door: Arc<PathBuf>, admin_user: &str, rules: Arc<Rules>, gate: Arc<Gate>) -> Roles {
        Roles {
            door,
            admin_user: admin_user.to_owned(),
            rules,
            gate,
            kept: Mutex::new(None),
            remembered: Lock::default(),
            shared: Lock::default(),
            runtime: OnceLock::new(),
        }
    }

    /// The runtime that drives the connection from now on is this one.
    pub(crate) fn run_here(&self) {
        let _ = self.runtime.set(Handle::current());
    }

    /// Whether a role may log in, for who proves no password; `None`: there is no such role. A yes may be a second old.
    pub(crate) async fn may_log_in(&self, role: &str) -> Result<Option<bool>, Unreadable> {
        let good_for = self.rules.cache().max(LOGIN_REMEMBERED);
        if self.recall(role, good_for).is_some() {
            return Ok(Some(true));
        }
        let known = self.role(role).await?;
        self.remember(role, &known);
        Ok(known.may_log_in)
    }

    /// A role whose secret is remembered.
    pub(crate) fn remembered(&self, role: &str) -> Option<Arc<Role>> {
        let cache = self.rules.cache();
        if cache.is_zero() { None } else { self.recall(role, cache).filter(|role| role.secret.is_some()) }
    }

    fn recall(&self, role: &str, good_for: Duration) -> Option<Arc<Role>> {
        let remembered = locked(&self.remembered);
        remembered.get(role).filter(|role| self.gate.now().since(role.asked) < good_for).cloned()
    }

    /// The next login of this role asks.
    pub(crate) fn forget(&self, role: &str) {
        locked(&self.remembered).remove(role);
    }

    pub(crate) fn forget_all(&self) {
        locked(&self.remembered).clear();
    }

    /// What is known of a role now: asked after this was called.
    pub(crate) async fn role(&self, role: &str) -> Result<Arc<Role>, Unreadable> {
        let shared = Arc::clone(locked(&self.shared).entry(role.to_owned()).or_default());
        let place = Place { roles: self, role, shared };
        let number = place.shared.came.fetch_add(1, Ordering::SeqCst) + 1;
        let turn = tokio::time::timeout(LOOKUP_TIMEOUT, place.shared.answer.lock()).await;
        let mut answer = turn.map_err(|_| self.unreadable(format!("no turn within {} s", LOOKUP_TIMEOUT.as_secs())))?;
        if let (came, Some(known)) = &*answer
            && *came >= number
        {
            return Ok(Arc::clone(known));
        }
        let came = place.shared.came.load(Ordering::SeqCst);
        let known = Arc::new(self.look_up(role).await?);
        *answer = (came, Some(Arc::clone(&known)));
        Ok(known)
    }

    /// Remembers a role that logs in.
    pub(crate) fn remember(&self, role: &str, known: &Arc<Role>) {
        if known.may_log_in != Some(true) {
            return;
        }
        let cache = self.rules.cache();
        // A secret that nobody may use again is not kept.
        let kept =
            if cache.is_zero() { Arc::new(Role { secret: None, ..Role::clone(known) }) } else { Arc::clone(known) };
        let mut remembered = locked(&self.remembered);
        if remembered.len() >= MAX_REMEMBERED {
            let good_for = cache.max(LOGIN_REMEMBERED);
            remembered.retain(|_, role| self.gate.now().since(role.asked) < good_for);
        }
        if remembered.len() < MAX_REMEMBERED {
            remembered.insert(role.to_owned(), kept);
        }
    }

    async fn look_up(&self, role: &str) -> Result<Role, Unreadable> {
        let asked = self.gate.now();
        let rows = self.ask(Question::Role, role).await?;
        let row = rows.first().ok_or_else(|| self.unreadable("no row".to_owned()))?;
        let stored = Zeroizing::new(row.get::<_, Option<String>>(1).unwrap_or_default());
        let scram = Verifier::parse(&stored).map(Secret::Scram);
        let iterations = row.get::<_, Option<&str>>(3).and_then(|text| text.parse().ok());
        Ok(Role {
            asked,
            may_log_in: row.get(0),
            secret: scram.or_else(|| md5::Hash::parse(&stored).map(Secret::Md5)),
            md5_is_usual: row.get(2),
            iterations: iterations.unwrap_or(scram::DEFAULT_ITERATIONS),
        })
    }

    /// Roles that this one is a member of, itself included; none for a role that does not exist.
    pub(crate) async fn memberships(&self, role: &str) -> Result<Vec<String>, Unreadable> {
        let rows = self.ask(Question::Memberships, role).await?;
        Ok(rows.iter().map(|row| row.get(0)).collect())
    }

    /// PostgreSQL's time.
    pub(crate) async fn time(&self) -> Result<String, Unreadable> {
        let asked = async {
            let kept = self.connection().await?;
            let row = kept.client.query_one("select pg_catalog.clock_timestamp()::text", &[]).await;
            row.map(|row| row.get(0)).map_err(|e| describe(&e))
        };
        self.in_time(asked).await
    }

    /// Ends these backends of a database, as far as they are those of before that time and no commit of theirs waits
    /// for its standby. A statement that runs there ends with its backend. How many were told.
    pub(crate) async fn end(&self, backends: &[i32], database: &str, before: &str) -> Result<usize, Unreadable> {
        let asked = async {
            let kept = self.connection().await?;
            let rows = kept.client.query(END, &[&backends, &database, &before]).await;
            rows.map(|rows| rows.len()).map_err(|e| describe(&e))
        };
        self.in_time(asked).await
    }

    /// How many of these backends have a commit that waits for its standby.
    pub(crate) async fn held_up(&self, backends: &[i32]) -> Result<u32, Unreadable> {
        let asked = async {
            let kept = self.connection().await?;
            let row = kept.client.query_one(HELD_UP, &[&backends]).await.map_err(|e| describe(&e))?;
            Ok(u32::try_from(row.get::<_, i64>(0)).unwrap_or(u32::MAX))
        };
        self.in_time(asked).await
    }

    async fn in_time<T>(&self, asked: impl Future<Output = Result<T, String>>) -> Result<T, Unreadable> {
        let slow = |_| Err(format!("no answer within {} s", LOOKUP_TIMEOUT.as_secs()));
        tokio::time::timeout(LOOKUP_TIMEOUT, asked).await.unwrap_or_else(slow).map_err(|why| self.unreadable(why))
    }

    fn unreadable(&self, why: String) -> Unreadable {
        Unreadable { door: self.door.display().to_string(), why }
    }

    async fn ask(&self, question: Question, role: &str) -> Result<Vec<Row>, Unreadable> {
        match tokio::time::timeout(LOOKUP_TIMEOUT, self.ask_twice(question, role)).await {
            Ok(answer) => answer.map_err(|why| self.unreadable(why)),
            Err(_) => {
                // Whatever hangs, the next login tries a connection of its own.
                *self.kept.lock().await = None;
                Err(self.unreadable(format!("no answer within {} s", LOOKUP_TIMEOUT.as_secs())))
            }
        }
    }

    async fn ask_twice(&self, question: Question, role: &str) -> Result<Vec<Row>, String> {
        // A connection that was lost since the last login is found out by using it: once.
        for last in [false, true] {
            let kept = self.connection().await?;
            let answer = match question {
                Question::Role => kept.client.query(&kept.role, &[&role]).await,
                // Not prepared: few rules ask it.
                Question::Memberships => kept.client.query(MEMBERSHIPS, &[&role]).await,
            };
            match answer {
                Ok(rows) => return Ok(rows),
                Err(e) => {
                    let mut slot = self.kept.lock().await;
                    if slot.as_ref().is_some_and(|current| Arc::ptr_eq(current, &kept)) {
                        *slot = None;
                    }
                    if last || !kept.client.is_closed() {
                        return Err(describe(&e));
                    }
                }
            }
        }
        Err("the connection was lost twice".to_owned())
    }

    async fn connection(&self) -> Result<Arc<Kept>, String> {
        let mut slot = self.kept.lock().await;
        if let Some(kept) = slot.as_ref().filter(|kept| !kept.client.is_closed()) {
            return Ok(Arc::clone(kept));
        }
        let mut error = String::new();
        for database in DATABASES {
            let connecting = connect(Arc::clone(&self.door), self.admin_user.clone(), database);
            let connected = match self.runtime.get() {
                Some(runtime) => runtime.spawn(connecting).await.map_err(|e| e.to_string()).flatten(),
                None => connecting.await,
            };
            match connected {
                Ok(kept) => {
                    let kept = Arc::new(kept);
                    *slot = Some(Arc::clone(&kept));
                    return Ok(kept);
                }
                Err(e) => error = e,
            }
        }
        Err(error)
    }
}

async fn connect(door: Arc<PathBuf>, admin_user: String, database: &str) -> Result<Kept, String> {
    let stream = UnixStream::connect(door.as_path()).await.map_err(|e| e.to_string())?;
    let mut config = tokio_postgres::Config::new();
    config.user(&admin_user).dbname(database).application_name("portcullis roles").options(OPTIONS);
    let (client, connection) = config.connect_raw(stream, NoTls).await.map_err(|e| describe(&e))?;
    tokio::spawn(connection);
    let role = client.prepare(ROLE).await.map_err(|e| describe(&e))?;
    Ok(Kept { client, role })
}

/// The database's own words where there are any.
fn describe(error: &tokio_postgres::Error) -> String {
    error.as_db_error().map_or_else(|| error.to_string(), |db| db.message().to_owned())
}
