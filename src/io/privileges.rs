//! Who the daemon is: started as root it becomes the owner of the data directory and keeps two capabilities, so that
//! PostgreSQL's tools and `peer` logins are that user's (the contract).
//!
//! **Invariant:** must run before any other thread exists: credentials and capabilities are a thread's own in Linux,
//! and threads made later inherit them.

use rustix::fs::{Gid, Uid};
use rustix::thread as creds;
use std::ffi::OsString;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// The capabilities that stay: addresses and nftables, ARP.
fn kept() -> creds::CapabilitySet {
    creds::CapabilitySet::NET_ADMIN | creds::CapabilitySet::NET_RAW
}

/// Makes `dirs` (0750) and, when root, becomes the owner of `data_dir` (of its nearest existing parent, where it does
/// not exist yet). Children never inherit a capability.
///
/// # Errors
/// One sentence; nothing runs with half-changed rights because the caller ends.
pub fn become_owner(data_dir: &Path, dirs: &[PathBuf]) -> Result<(), String> {
    let root = rustix::process::geteuid().is_root();
    let owner = if root { Some(owner_of(data_dir)?) } else { None };
    for dir in dirs {
        std::fs::create_dir_all(dir).map_err(|e| format!("{} cannot be made: {e}", dir.display()))?;
        if let Some((uid, gid)) = owner {
            give(dir, uid, gid)?;
        }
    }
    if let Some((uid, gid)) = owner {
        change(uid, gid).map_err(|e| format!("cannot become the owner of {}: {e}", data_dir.display()))?;
    }
    // What systemd's AmbientCapabilities= gave us is ours alone.
    let _unsupported = creds::clear_ambient_capability_set();
    Ok(())
}

/// Lets programs that this very thread starts keep the daemon's two capabilities, where it has them. Only for a thread
/// that starts this program itself (`doctor` on behalf of another node) and ends.
///
/// # Errors
/// The kernel refuses; children have no capability then.
pub fn lend_to_own_children() -> Result<(), String> {
    let lend = || -> rustix::io::Result<()> {
        let mut sets = creds::capabilities(None)?;
        sets.inheritable = sets.permitted & kept();
        creds::set_capabilities(None, sets)?;
        for one in [creds::CapabilitySet::NET_ADMIN, creds::CapabilitySet::NET_RAW] {
            if sets.inheritable.contains(one) {
                creds::configure_capability_in_ambient_set(one, true)?;
            }
        }
        Ok(())
    };
    lend().map_err(|error| format!("capabilities cannot be lent: {error}"))
}

/// The directory and what the daemon keeps right in it; nothing deeper.
fn give(dir: &Path, uid: Uid, gid: Gid) -> Result<(), String> {
    let told = |path: &Path, e: std::io::Error| format!("{} cannot be given to its user: {e}", path.display());
    let chown = |path: &Path| std::os::unix::fs::chown(path, Some(uid.as_raw()), Some(gid.as_raw()));
    chown(dir).map_err(|e| told(dir, e))?;
    let entries = std::fs::read_dir(dir).map_err(|e| told(dir, e))?;
    for entry in entries.flatten() {
        let plain = entry.file_type().is_ok_and(|t| t.is_file());
        if plain && entry.metadata().is_ok_and(|m| m.uid() == 0) {
            chown(&entry.path()).map_err(|e| told(&entry.path(), e))?;
        }
    }
    Ok(())
}

fn owner_of(data_dir: &Path) -> Result<(Uid, Gid), String> {
    let mut at = Some(data_dir);
    while let Some(dir) = at {
        if let Ok(meta) = std::fs::metadata(dir) {
            if meta.uid() == 0 {
                return Err(format!(
                    "{} belongs to root, and PostgreSQL does not run as root; give it to the user that runs PostgreSQL",
                    dir.display()
                ));
            }
            let passwd = std::fs::read_to_string("/etc/passwd").unwrap_or_default();
            // The directory's group may be any; with another than its processes' the kernel hides those from us.
            let gid = primary_group(&passwd, meta.uid()).unwrap_or_else(|| meta.gid());
            return Ok((Uid::from_raw(meta.uid()), Gid::from_raw(gid)));
        }
        at = dir.parent();
    }
    Err(format!("{} does not exist, nor does any of its parents", data_dir.display()))
}

fn change(uid: Uid, gid: Gid) -> rustix::io::Result<()> {
    creds::set_keep_capabilities(true)?;
    creds::set_thread_groups(&groups(uid, gid))?;
    creds::set_thread_res_gid(gid, gid, gid)?;
    creds::set_thread_res_uid(uid, uid, uid)?;
    let sets =
        creds::CapabilitySets { effective: kept(), permitted: kept(), inheritable: creds::CapabilitySet::empty() };
    creds::set_capabilities(None, sets)?;
    creds::set_keep_capabilities(false)
}

/// The group of the user's own line in /etc/passwd.
fn primary_group(passwd: &str, uid: u32) -> Option<u32> {
    let uid = uid.to_string();
    passwd.lines().find_map(|line| {
        let mut fields = line.split(':').skip(2);
        (fields.next()? == uid).then(|| fields.next()?.parse().ok())?
    })
}

/// The user's groups from /etc/passwd and /etc/group, as initgroups(3) would give them (`ssl-cert` for a TLS key).
fn groups(uid: Uid, gid: Gid) -> Vec<Gid> {
    let mut all = vec![gid];
    let passwd = std::fs::read_to_string("/etc/passwd").unwrap_or_default();
    let uid = uid.as_raw().to_string();
    let name = passwd.lines().find_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        (fields.nth(1)? == uid).then(|| name.to_owned())
    });
    let Some(name) = name else { return all };
    let group = std::fs::read_to_string("/etc/group").unwrap_or_default();
    for line in group.lines() {
        let fields: Vec<&str> = line.split(':').collect();
        if let [_, _, id, members] = fields.as_slice()
            && members.split(',').any(|member| member == name)
            && let Ok(id) = id.parse()
        {
            all.push(Gid::from_raw(id));
        }
    }
    all
}

/// HOME, USER and LOGNAME for children: what a daemon that was started as root has in its own environment is root's.
pub fn own_variables() -> Vec<(&'static str, OsString)> {
    let passwd = std::fs::read_to_string("/etc/passwd").unwrap_or_default();
    let home = std::env::var_os("HOME").map(|home| {
        let owner = std::fs::metadata(&home).ok().map(|meta| meta.uid());
        (home, owner)
    });
    variables(&passwd, rustix::process::geteuid().as_raw(), home)
}

/// `home` is the one that was inherited, and whose it is: one of this user's own stays. A user who is not in passwd
/// (of a directory service, say) has nothing else.
fn variables(passwd: &str, uid: u32, home: Option<(OsString, Option<u32>)>) -> Vec<(&'static str, OsString)> {
    let line = passwd.lines().map(|line| line.split(':').collect::<Vec<_>>());
    let account = line.into_iter().find(|fields| fields.get(2).is_some_and(|id| *id == uid.to_string()));
    let Some([name, _, _, _, _, their_home, ..]) = account.as_deref() else {
        return home.into_iter().map(|(home, _)| ("HOME", home)).collect();
    };
    let home =
        home.filter(|(_, owner)| *owner == Some(uid)).map_or_else(|| OsString::from(their_home), |(home, _)| home);
    vec![("HOME", home), ("USER", OsString::from(name)), ("LOGNAME", OsString::from(name))]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn children_get_the_home_and_the_name_of_who_the_daemon_became() {
        let passwd =
            "root:x:0:0:root:/root:/bin/bash\nodd\npostgres:x:101:104:PostgreSQL:/var/lib/postgresql:/bin/sh\n";
        let roots = Some((OsString::from("/root"), Some(0)));
        let of = |uid, home| variables(passwd, uid, home);
        let wanted = |home: &str, name: &str| {
            vec![("HOME", OsString::from(home)), ("USER", OsString::from(name)), ("LOGNAME", OsString::from(name))]
        };
        assert_eq!(of(101, roots.clone()), wanted("/var/lib/postgresql", "postgres"));
        assert_eq!(of(101, None), wanted("/var/lib/postgresql", "postgres"));
        assert_eq!(of(101, Some(("/gone".into(), None))), wanted("/var/lib/postgresql", "postgres"));
        assert_eq!(of(101, Some(("/srv/pg".into(), Some(101)))), wanted("/srv/pg", "postgres"), "its own stays");
        assert_eq!(of(0, roots.clone()), wanted("/root", "root"));
        assert_eq!(of(77, roots), [("HOME", OsString::from("/root"))], "nobody of that number");
    }

    #[test]
    fn the_group_is_the_users_own() {
        let passwd = "root:x:0:0:root:/root:/bin/bash\nodd line\npostgres:x:101:104:PostgreSQL:/var/lib/postgresql:\n";
        assert_eq!(primary_group(passwd, 101), Some(104));
        assert_eq!(primary_group(passwd, 104), None);
        assert_eq!(primary_group("", 0), None);
    }
}
