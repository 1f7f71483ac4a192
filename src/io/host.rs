//! Which machine is this? Its name and whether an address is one of its own.
//!
//! Asked by every verb that was not told `--node`; changes nothing.

use std::net::{IpAddr, UdpSocket};

/// This host's name, lower case, as the kernel has it.
pub fn name() -> String {
    rustix::system::uname().nodename().to_string_lossy().to_ascii_lowercase()
}

/// Is the address one of this host's? A UDP socket can be bound to no other (unless `ip_nonlocal_bind` is set, which
/// makes every address look like one: then say `--node`).
pub fn is_local(address: IpAddr) -> bool {
    UdpSocket::bind((address, 0)).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loopback_is_local_and_documentation_is_not() {
        assert!(is_local(IpAddr::from([127, 0, 0, 1])));
        assert!(!is_local(IpAddr::from([192, 0, 2, 11])));
        assert!(!name().is_empty());
    }
}
