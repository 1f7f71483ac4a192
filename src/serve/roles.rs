//! What PostgreSQL knows of a role: its verifier, read from `pg_authid` over one kept admin connection.
//!
//! What it is NOT: no cache. A changed password, a revoked LOGIN or a passed VALID UNTIL counts at the next login.

use crate::wire::scram::Verifier;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::UnixStream;
use tokio::sync::Mutex;
use tokio_postgres::{Client, NoTls, Statement};

/// How long a look-up may take, a new admin connection included; then the login is refused (57P03).
const LOOKUP_TIMEOUT: Duration = Duration::from_secs(5);
/// `VALID UNTIL` and LOGIN are judged by PostgreSQL's own clock and catalogue.
const QUERY: &str = "select rolpassword from pg_catalog.pg_authid \
     where rolname = $1::text::name and rolcanlogin and (rolvaliduntil is null or rolvaliduntil > now())";
/// Whatever ALTER ROLE or ALTER DATABASE say: the names in the query are PostgreSQL's own.
const OPTIONS: &str = "-c search_path=pg_catalog";
/// Databases tried for the admin connection, in order.
const DATABASES: [&str; 2] = ["postgres", "template1"];

/// The way to `pg_authid`.
pub(crate) struct Roles {
    door: Arc<PathBuf>,
    admin_user: String,
    kept: Mutex<Option<Arc<Kept>>>,
}

struct Kept {
    client: Client,
    lookup: Statement,
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
    pub(crate) fn new(door: Arc<PathBuf>, admin_user: &str) -> Roles {
        Roles { door, admin_user: admin_user.to_owned(), kept: Mutex::new(None) }
    }

    /// The verifier of a role that may log in with a password now; `None`: there is no such role, or it has none.
    pub(crate) async fn verifier(&self, role: &str) -> Result<Option<Verifier>, Unreadable> {
        let unreadable = |why: String| Unreadable { door: self.door.display().to_string(), why };
        let looked = tokio::time::timeout(LOOKUP_TIMEOUT, self.look_up(role)).await;
        match looked {
            Ok(Ok(verifier)) => Ok(verifier),
            Ok(Err(e)) => Err(unreadable(e)),
            Err(_) => {
                // Whatever hangs, the next login tries a connection of its own.
                *self.kept.lock().await = None;
                Err(unreadable(format!("no answer within {} s", LOOKUP_TIMEOUT.as_secs())))
            }
        }
    }

    async fn look_up(&self, role: &str) -> Result<Option<Verifier>, String> {
        // A connection that was lost since the last login is found out by using it: once.
        for last in [false, true] {
            let kept = self.connection().await?;
            match kept.client.query_opt(&kept.lookup, &[&role]).await {
                Ok(row) => {
                    let stored = row.and_then(|row| row.get::<_, Option<String>>(0));
                    return Ok(stored.as_deref().and_then(Verifier::parse));
                }
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
            match self.connect(database).await {
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

    async fn connect(&self, database: &str) -> Result<Kept, String> {
        let stream = UnixStream::connect(self.door.as_path()).await.map_err(|e| e.to_string())?;
        let mut config = tokio_postgres::Config::new();
        config.user(&self.admin_user).dbname(database).application_name("portcullis roles").options(OPTIONS);
        let (client, connection) = config.connect_raw(stream, NoTls).await.map_err(|e| describe(&e))?;
        tokio::spawn(connection);
        let lookup = client.prepare(QUERY).await.map_err(|e| describe(&e))?;
        Ok(Kept { client, lookup })
    }
}

/// The database's own words where there are any.
fn describe(error: &tokio_postgres::Error) -> String {
    error.as_db_error().map_or_else(|| error.to_string(), |db| db.message().to_owned())
}
