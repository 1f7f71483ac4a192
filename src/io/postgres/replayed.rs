//! Which timeline a standby has replayed, when no walreceiver tells: after its primary died, `pg_control` names only
//! the timeline of the last restart point, which may be minutes and several switchovers old.
//!
//! PostgreSQL (`recovery_target_timeline = 'latest'`) follows the newest history file that goes on from its own
//! timeline, and takes no WAL of another branch: it refuses a history that left before its own position, and asks for
//! a timeline's segments only once it follows its history. So the newest history names the timeline of a position, if
//! that timeline's own segment holds the page with the last byte before it.
//!
//! **Invariant:** a timeline is claimed only for a replay position beyond the point where it began, and a position only
//! where its page is here. Everything doubtful is no claim: then what the control file says stands.

use super::history::{self, History, Span};
use crate::base::ids::{Lsn, TimelineId};
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// PostgreSQL 15, `XLOG_BLCKSZ`; with another one there is no claim.
const PAGE: u64 = 8192;

/// Where a standby stands, as PostgreSQL says.
#[derive(Debug, Clone, Copy)]
pub(super) struct Position {
    /// The highest timeline that its control file proves.
    pub(super) known: TimelineId,
    pub(super) replay: Lsn,
    /// Flushed by the last walreceiver of this start.
    pub(super) receive: Option<Lsn>,
    pub(super) segment_size: u64,
}

/// The timeline replayed, where it is above `known`, and how far its WAL is here without a gap.
pub(super) fn timeline_of(wal: &Path, at: Position) -> Option<(TimelineId, Lsn)> {
    let history = newest_history(wal)?;
    // A branch that does not come from our own timeline says nothing of us.
    history.from(Lsn(0)).find(|span| span.timeline == at.known)?;
    let span = span_before(&history, at.replay)?;
    if span.timeline <= at.known || !holds_page(wal, span, at.replay, at.segment_size) {
        return None;
    }
    let received = at
        .receive
        .filter(|lsn| span_before(&history, *lsn) == Some(span) && holds_page(wal, span, *lsn, at.segment_size));
    Some((span.timeline, received.unwrap_or_default().max(at.replay)))
}

/// By the history file of the highest number that names a timeline.
fn newest_history(wal: &Path) -> Option<History> {
    let number = |name: &str| {
        let hex = name.strip_suffix(".history").filter(|hex| hex.len() == 8)?;
        u32::from_str_radix(hex, 16).ok().map(TimelineId)
    };
    let files = fs::read_dir(wal).ok()?.flatten();
    let mut timelines: Vec<TimelineId> = files.filter_map(|file| number(file.file_name().to_str()?)).collect();
    timelines.sort_unstable();
    timelines.into_iter().rev().find_map(|timeline| {
        let ended = history::parse(&fs::read_to_string(wal.join(history::file_name(timeline))).ok()?);
        (!ended.is_empty()).then(|| History::new(&ended, timeline))
    })
}

/// The part of it that holds the last byte before `lsn`.
fn span_before(history: &History, lsn: Lsn) -> Option<Span> {
    let before = Lsn(lsn.0.checked_sub(1)?);
    let holds = |span: &Span| span.begin <= before && span.end.is_none_or(|end| before < end);
    history.from(Lsn(0)).find(holds)
}

/// Is the page with the last byte before `lsn` in that timeline's own segment? A recycled segment holds pages of
/// other positions.
fn holds_page(wal: &Path, span: Span, lsn: Lsn, segment_size: u64) -> bool {
    let read = || {
        let last = lsn.0.checked_sub(1)?;
        let page = last - last % PAGE;
        let name = history::segment_name(span.timeline, Lsn(last), segment_size);
        // xlp_magic, xlp_info, xlp_tli, xlp_pageaddr of XLogPageHeaderData.
        let mut header = [0; 16];
        let file = fs::File::open(wal.join(name)).ok()?;
        file.read_exact_at(&mut header, page % segment_size.max(1)).ok()?;
        let [_, _, _, _, t0, t1, t2, t3, address @ ..] = header;
        let timeline = u32::from_ne_bytes([t0, t1, t2, t3]);
        // The page in which the timeline began was copied from the one before it, header and all.
        let its_own = timeline == span.timeline.0 || (page <= span.begin.0 && timeline < span.timeline.0);
        Some(its_own && u64::from_ne_bytes(address) == page)
    };
    read().unwrap_or(false)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SEGMENT: u64 = 1 << 20;

    fn write_history(wal: &Path, timeline: u32, ended: &[(u32, u64)]) {
        let lines: Vec<String> = ended.iter().map(|(t, end)| format!("{t}\t{}\tno reason\n", Lsn(*end))).collect();
        fs::write(wal.join(history::file_name(TimelineId(timeline))), lines.concat()).expect("written");
    }

    /// A page of that timeline's segment, headed as `writer` and `address` say.
    fn write_page(wal: &Path, timeline: u32, at: u64, writer: u32, address: u64) {
        let path = wal.join(history::segment_name(TimelineId(timeline), Lsn(at), SEGMENT));
        let file = fs::File::options().create(true).truncate(false).write(true).open(path).expect("opened");
        let header = [&[0xd1, 0x10, 0, 0], &writer.to_ne_bytes()[..], &address.to_ne_bytes()[..]].concat();
        file.write_all_at(&header, at % SEGMENT).expect("written");
    }

    fn page(wal: &Path, timeline: u32, at: u64) {
        write_page(wal, timeline, at, timeline, at);
    }

    fn claim(wal: &Path, known: u32, replay: u64, receive: Option<u64>) -> Option<(u32, u64)> {
        let (known, receive) = (TimelineId(known), receive.map(Lsn));
        let position = Position { known, replay: Lsn(replay), receive, segment_size: SEGMENT };
        timeline_of(wal, position).map(|(timeline, lsn)| (timeline.0, lsn.0))
    }

    /// Timeline 1 ended at 20 pages, 2 at 40; 3 goes on.
    fn pair_switched_over_twice(wal: &Path) {
        write_history(wal, 2, &[(1, 20 * PAGE)]);
        write_history(wal, 3, &[(1, 20 * PAGE), (2, 40 * PAGE)]);
        (20..40).for_each(|n| page(wal, 2, n * PAGE));
        (40..50).for_each(|n| page(wal, 3, n * PAGE));
    }

    #[test]
    fn a_timeline_is_claimed_beyond_its_beginning_only() {
        let dir = tempfile::tempdir().expect("a directory");
        let wal = dir.path();
        pair_switched_over_twice(wal);
        for known in [1, 2] {
            assert_eq!(claim(wal, known, 40 * PAGE + 1, None), Some((3, 40 * PAGE + 1)), "from {known}");
            assert_eq!(claim(wal, known, 50 * PAGE, None), Some((3, 50 * PAGE)), "the end of the last page");
        }
        assert_eq!(claim(wal, 1, 40 * PAGE, None), Some((2, 40 * PAGE)), "all of 2, nothing of 3");
        assert_eq!(claim(wal, 2, 40 * PAGE, None), None);
        assert_eq!(claim(wal, 3, 45 * PAGE, None), None, "the control file says so itself");
        assert_eq!(claim(wal, 1, 10 * PAGE, None), None);
        assert_eq!(claim(wal, 2, 50 * PAGE + 1, None), None, "that WAL is not here");
        assert_eq!(claim(wal, 4, 45 * PAGE, None), None, "not our branch");
    }

    #[test]
    fn what_was_received_counts_where_it_is_here() {
        let dir = tempfile::tempdir().expect("a directory");
        let wal = dir.path();
        pair_switched_over_twice(wal);
        assert_eq!(claim(wal, 2, 41 * PAGE, Some(50 * PAGE)), Some((3, 50 * PAGE)));
        assert_eq!(claim(wal, 2, 41 * PAGE, Some(51 * PAGE)), Some((3, 41 * PAGE)));
        assert_eq!(claim(wal, 2, 39 * PAGE, Some(50 * PAGE)), None, "received is not replayed");
    }

    /// A node that came back from timeline 3: its segments are still here while 2 is replayed towards 4.
    #[test]
    fn the_wal_of_a_branch_that_was_left_proves_nothing() {
        let dir = tempfile::tempdir().expect("a directory");
        let wal = dir.path();
        pair_switched_over_twice(wal);
        write_history(wal, 4, &[(1, 20 * PAGE), (2, 45 * PAGE)]);
        assert_eq!(claim(wal, 2, 44 * PAGE, None), None, "2 lasted longer here");
        assert_eq!(claim(wal, 2, 46 * PAGE, None), None, "4 is not here");
        page(wal, 4, 46 * PAGE);
        assert_eq!(claim(wal, 2, 46 * PAGE + 9, None), Some((4, 46 * PAGE + 9)));
        // What only keeps a number from being used names no timeline.
        fs::write(wal.join("00000005.history"), "# portcullis\n").expect("written");
        assert_eq!(claim(wal, 2, 46 * PAGE + 9, None), Some((4, 46 * PAGE + 9)));
    }

    #[test]
    fn a_recycled_segment_is_not_wal() {
        let dir = tempfile::tempdir().expect("a directory");
        let wal = dir.path();
        write_history(wal, 2, &[(1, 20 * PAGE + 100)]);
        write_page(wal, 2, 20 * PAGE, 1, 20 * PAGE);
        write_page(wal, 2, 21 * PAGE, 2, PAGE);
        write_page(wal, 2, 22 * PAGE, 1, 22 * PAGE);
        assert_eq!(claim(wal, 1, 20 * PAGE + 101, None), Some((2, 20 * PAGE + 101)), "the page it began in is a copy");
        assert_eq!(claim(wal, 1, 21 * PAGE + 9, None), None, "a page of another place");
        assert_eq!(claim(wal, 1, 22 * PAGE + 9, None), None, "a page of another timeline");
        assert_eq!(claim(wal, 1, 0, None), None);
        let gone = wal.join("none");
        assert_eq!(claim(&gone, 1, 21 * PAGE, None), None);
    }
}
