//! Names of directories, and what can be done with them.

use rustix::fs::{Access, AtFlags, CWD, StatxAttributes, StatxFlags};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Whether entries can be made in and taken out of the directory.
pub(super) fn may_write(dir: &Path) -> bool {
    rustix::fs::accessat(CWD, dir, Access::WRITE_OK | Access::EXEC_OK, AtFlags::EACCESS).is_ok()
}

/// Whether a rename from one directory to the other can do: both writable, one file system.
pub(super) fn may_move_between(a: &Path, b: &Path) -> bool {
    let device = |dir: &Path| fs::metadata(dir).ok().map(|meta| meta.dev());
    may_write(a) && may_write(b) && device(a).is_some() && device(a) == device(b)
}

/// `target`, `infix` and the time, and a number where that is taken.
pub(super) fn dated_name(target: &Path, infix: &str) -> PathBuf {
    let time = jiff::Timestamp::now().strftime("%Y%m%dT%H%M%SZ").to_string();
    let first = with_suffix(target, &format!("{infix}{time}"));
    let further = (2_u32..).map(|n| with_suffix(&first, &format!("-{n}")));
    std::iter::once(first.clone()).chain(further).find(|name| fs::symlink_metadata(name).is_err()).unwrap_or(first)
}

pub(super) fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    PathBuf::from(name)
}

/// statx(2): the root of a mount, also of a bind mount within one file system.
pub(super) fn is_mount_point(path: &Path) -> bool {
    rustix::fs::statx(CWD, path, AtFlags::SYMLINK_NOFOLLOW, StatxFlags::BASIC_STATS)
        .is_ok_and(|stat| stat.stx_attributes.contains(StatxAttributes::MOUNT_ROOT))
}

/// The path with all symbolic links resolved, also where what they lead to is not there (any more).
pub(super) fn resolved(path: &Path) -> PathBuf {
    let mut path = path.to_owned();
    // As many as the kernel follows.
    for _ in 0..40 {
        if let Ok(real) = fs::canonicalize(&path) {
            return real;
        }
        let parent = path.parent().unwrap_or(Path::new("/"));
        match fs::read_link(&path) {
            Ok(to) => path = parent.join(to),
            Err(_) => {
                let real = fs::canonicalize(parent).ok();
                return real.zip(path.file_name()).map_or_else(|| path.clone(), |(real, name)| real.join(name));
            }
        }
    }
    path
}
