//! Whether a TCP port of the host is free right now. Used when ports are leased to an instance.

use std::net::{IpAddr, SocketAddr, TcpListener};

/// True when `port` can be bound on `address` at this moment. The answer can be out of date the moment it is given:
/// the owner of the port is whoever binds it, so a later bind failure must still be handled.
pub fn bindable(address: IpAddr, port: u16) -> bool {
    TcpListener::bind(SocketAddr::new(address, port)).is_ok()
}

#[cfg(test)]
mod tests {
    use std::{
        net::Ipv4Addr,
        thread::sleep,
        time::{Duration, Instant},
    };

    use super::*;

    #[test]
    fn a_bound_port_is_not_bindable() {
        let held = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let port = held.local_addr().unwrap().port();
        assert!(!bindable(Ipv4Addr::LOCALHOST.into(), port));
        drop(held);
        // Not at once: a child of another test has the socket too, between its fork and its exec.
        let until = Instant::now() + Duration::from_secs(10);
        while !bindable(Ipv4Addr::LOCALHOST.into(), port) {
            assert!(Instant::now() < until, "port {port} stays taken");
            sleep(Duration::from_millis(10));
        }
    }
}
