//! One published TCP port: a listener whose connections are copied to the local port and back. Called by `proxies`.

use std::{
    io,
    net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream},
    sync::{Arc, Mutex, PoisonError},
    thread,
    time::Duration,
};

const CONNECT: Duration = Duration::from_secs(10);

/// A listening port. Dropping it frees the port and lets established streams go on, as frp does with the streams of a
/// proxy that is removed.
#[derive(Debug)]
pub(crate) struct Forward {
    listener: Arc<TcpListener>,
    streams: Arc<Mutex<Vec<TcpStream>>>,
    address: SocketAddr,
}

impl Forward {
    /// Listens on `address` and copies to `local`.
    pub(crate) fn start(address: SocketAddr, local: (IpAddr, u16)) -> io::Result<Self> {
        let listener = Arc::new(TcpListener::bind(address)?);
        let address = listener.local_addr()?;
        let streams = Arc::new(Mutex::new(Vec::new()));
        let (accepts, opened) = (Arc::clone(&listener), Arc::clone(&streams));
        thread::spawn(move || {
            for stream in accepts.incoming() {
                // The listener was shut down.
                let Ok(stream) = stream else { return };
                let opened = Arc::clone(&opened);
                thread::spawn(move || drop(connect(stream, local.into(), &opened)));
            }
        });
        Ok(Self { listener, streams, address })
    }

    /// The port it really has.
    pub(crate) fn port(&self) -> u16 {
        self.address.port()
    }

    /// Ends established streams too, as when the session with the server ends.
    pub(crate) fn cut(&self) {
        for stream in self.streams.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
            // It may have ended by itself.
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}

impl Drop for Forward {
    fn drop(&mut self) {
        // Wakes the accepting thread with an error.
        let _ = rustix::net::shutdown(&*self.listener, rustix::net::Shutdown::Both);
    }
}

/// A local side that cannot be reached closes the public one.
fn connect(public: TcpStream, local: SocketAddr, opened: &Mutex<Vec<TcpStream>>) -> io::Result<()> {
    let local = TcpStream::connect_timeout(&local, CONNECT)?;
    opened.lock().unwrap_or_else(PoisonError::into_inner).extend([public.try_clone()?, local.try_clone()?]);
    join(public, local)
}

/// Copies both ways until one side is done: as with frp, half a stream is no stream.
pub(crate) fn join(public: TcpStream, local: TcpStream) -> io::Result<()> {
    let (mut up, mut down) = (public.try_clone()?, local.try_clone()?);
    let there = thread::spawn(move || copy(&mut up, &local));
    copy(&mut down, &public);
    // It panics for nothing.
    let _ = there.join();
    Ok(())
}

fn copy(from: &mut TcpStream, mut to: &TcpStream) {
    // However it ended: both sides are closed whole.
    let _ = io::copy(from, &mut to);
    let _ = to.shutdown(Shutdown::Both);
    let _ = from.shutdown(Shutdown::Both);
}
