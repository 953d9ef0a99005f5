//! Hears when something is removed from nftables, by whomever. Called by the agent's guard, which looks then: a firewall that
//! is loaded anew flushes the policy of guests together with its own, and until the next look nothing would confine them.
//!
//! The kernel announces changes to netlink's group of nftables, one datagram with several messages per transaction
//! (netlink(7), `linux/netfilter/nf_tables.h`).

use std::{io, os::fd::OwnedFd};

use rustix::{
    io::Errno,
    net::{
        AddressFamily, RecvFlags, SocketFlags, SocketType, bind,
        netlink::{self, SocketAddrNetlink},
        recv, socket_with,
    },
};
use tokio::io::{Interest, unix::AsyncFd};

/// `NFNLGRP_NFTABLES` is group 7; the mask counts from 1.
const GROUP: u32 = 1 << 6;
/// `NFNL_SUBSYS_NFTABLES`, the upper byte of a message's type.
const SUBSYSTEM: u8 = 10;
/// `NFT_MSG_DELTABLE`, `DELCHAIN`, `DELRULE`, `DELSET`: the lower byte. Elements come and go with every machine.
const REMOVALS: [u8; 4] = [2, 5, 8, 11];
/// `struct nlmsghdr`.
const HEADER: usize = 16;
/// What is longer is cut off; the first messages are enough.
const DATAGRAM: usize = 64 << 10;

/// A seat at the kernel's announcements. What happens while nobody waits is kept, up to the kernel's bound.
#[derive(Debug)]
pub struct Removals {
    socket: AsyncFd<OwnedFd>,
}

impl Removals {
    /// Listens in the network namespace of the calling thread, within a runtime.
    ///
    /// # Errors
    /// What the kernel answers.
    pub fn listen() -> io::Result<Self> {
        Self::of(open()?)
    }

    #[allow(deprecated, reason = "its successor is unsafe; an OwnedFd is the descriptor that it says it is")]
    pub(super) fn of(socket: OwnedFd) -> io::Result<Self> {
        Ok(Self { socket: AsyncFd::with_interest(socket, Interest::READABLE)? })
    }

    /// Waits until a table, a chain, a rule or a set was removed. Also true of the agent's own removals. Dropping the
    /// future loses nothing.
    ///
    /// # Errors
    /// When the socket is broken.
    pub async fn next(&self) -> io::Result<()> {
        let mut datagram = vec![0; DATAGRAM];
        loop {
            let mut ready = self.socket.readable().await?;
            let read = ready.try_io(|socket| Ok(recv(socket, datagram.as_mut_slice(), RecvFlags::empty())?));
            match read {
                Ok(Ok((length, _))) => {
                    if datagram.get(..length).is_some_and(tells_of_a_removal) {
                        return Ok(());
                    }
                }
                // More than the kernel keeps: nobody knows what.
                Ok(Err(error)) if error.raw_os_error() == Some(Errno::NOBUFS.raw_os_error()) => return Ok(()),
                Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(Err(error)) => return Err(error),
                Err(_would_block) => {}
            }
        }
    }
}

pub(super) fn open() -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, Some(netlink::NETFILTER))?;
    bind(&socket, &SocketAddrNetlink::new(0, GROUP))?;
    Ok(socket)
}

/// Goes from header to header: length, type, flags, sequence and sender, in the order of this machine; each message begins at
/// a multiple of four.
fn tells_of_a_removal(mut datagram: &[u8]) -> bool {
    while let Some((header, _)) = datagram.split_first_chunk::<HEADER>() {
        let [l0, l1, l2, l3, t0, t1, ..] = *header;
        let [kind, subsystem] = u16::from_ne_bytes([t0, t1]).to_le_bytes();
        if subsystem == SUBSYSTEM && REMOVALS.contains(&kind) {
            return true;
        }
        let length = usize::try_from(u32::from_ne_bytes([l0, l1, l2, l3])).unwrap_or(usize::MAX);
        let Some(rest) = length.checked_next_multiple_of(4).and_then(|end| datagram.get(end..)) else {
            break;
        };
        if length < HEADER {
            break;
        }
        datagram = rest;
    }
    false
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn message(kind: u16, payload: usize) -> Vec<u8> {
        let length = u32::try_from(HEADER + payload).unwrap();
        let mut bytes = length.to_ne_bytes().to_vec();
        bytes.extend(kind.to_ne_bytes());
        bytes.resize((HEADER + payload).next_multiple_of(4), 7);
        bytes
    }

    #[test]
    fn a_removal_is_found_among_other_messages() {
        let (element, rule, table) = (0x0a0e, 0x0a08, 0x0a02);
        assert!(!tells_of_a_removal(&[]));
        assert!(!tells_of_a_removal(&[message(element, 9), message(0x0a06, 0), message(0x0808, 3)].concat()));
        for removal in [rule, table] {
            assert!(tells_of_a_removal(&message(removal, 0)));
            assert!(tells_of_a_removal(&[message(element, 9), message(removal, 5)].concat()));
        }
        // A length that does not lead on must not lead to the same place for ever.
        let mut endless = message(element, 0);
        endless[..4].copy_from_slice(&0_u32.to_ne_bytes());
        assert!(!tells_of_a_removal(&endless));
    }

    proptest! {
        #[test]
        fn any_bytes_are_read(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            tells_of_a_removal(&bytes);
        }
    }
}
