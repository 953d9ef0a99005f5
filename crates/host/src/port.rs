//! Whether a TCP port of the host is free right now. Used when ports are leased to an instance.

use std::net::{IpAddr, SocketAddr, TcpListener};

/// True when `port` can be bound on `address` at this moment. The answer can be out of date the moment it is given:
/// the owner of the port is whoever binds it, so a later bind failure must still be handled.
pub fn bindable(address: IpAddr, port: u16) -> bool {
    TcpListener::bind(SocketAddr::new(address, port)).is_ok()
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    #[test]
    fn a_bound_port_is_not_bindable() {
        let held = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let port = held.local_addr().unwrap().port();
        assert!(!bindable(Ipv4Addr::LOCALHOST.into(), port));
        drop(held);
        assert!(bindable(Ipv4Addr::LOCALHOST.into(), port));
    }
}
