//! An address of this machine that one test has alone: in 127.0.0.0/8 there are enough for everybody. Called by `Frps` and
//! by tests with a fake frpc, which publishes where its server should be.
#![allow(clippy::panic, reason = "dev only: a test that cannot go on stops here, with a sentence")]

use std::net::{Ipv4Addr, TcpListener};

/// How many there are on one machine.
const PLACES: u8 = 250;
/// Listening on this port of an address is what reserves the address; it ends with the process.
const RESERVED: u16 = 6999;

/// A reserved address. All ports on it are free, but for those that somebody listens on for all addresses.
#[derive(Debug)]
pub struct Place {
    address: Ipv4Addr,
    _reserved: TcpListener,
}

impl Place {
    /// The first free one.
    pub fn take() -> Self {
        for last in 1..=PLACES {
            let address = Ipv4Addr::new(127, 77, 0, last);
            if let Ok(reserved) = TcpListener::bind((address, RESERVED)) {
                return Self { address, _reserved: reserved };
            }
        }
        panic!("all addresses from 127.77.0.1 to 127.77.0.{PLACES} are taken by other tests");
    }

    /// The address.
    pub fn address(&self) -> Ipv4Addr {
        self.address
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_has_one_holder() {
        let (first, second) = (Place::take(), Place::take());
        assert_ne!(first.address(), second.address());
        assert!(TcpListener::bind((first.address(), RESERVED)).is_err());
    }
}
