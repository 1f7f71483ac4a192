//! The one clock. CLOCK_BOOTTIME, because CLOCK_MONOTONIC (and so `std::time::Instant` and tokio's timers) stands
//! still while the machine is suspended, and a lease must not.

use crate::base::time::Instant;
use rustix::time::{ClockId, clock_gettime};

/// Reads CLOCK_BOOTTIME. Cannot fail on Linux 2.6.39 or later.
pub fn now() -> Instant {
    let time = clock_gettime(ClockId::Boottime);
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    let nanos = u64::try_from(time.tv_nsec).unwrap_or(0);
    Instant::from_nanos(seconds.saturating_mul(1_000_000_000).saturating_add(nanos))
}

/// The kernel's boot_id: another one means another boot, or another machine (a clone).
pub fn boot_id() -> std::io::Result<String> {
    Ok(std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_owned())
}

/// Wall time: only shown to people and written into records; grants and ends nothing.
pub fn wall() -> jiff::Timestamp {
    jiff::Timestamp::now()
}
