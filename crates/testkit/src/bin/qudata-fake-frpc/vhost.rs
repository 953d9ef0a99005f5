//! HTTP by virtual host: one listener where the server's would be, which reads the head of a request, finds the proxy by
//! `Host`, and copies from there on. One request a connection is enough for tests. Called by main.

use std::{
    io::{self, BufRead, BufReader, Read, Write},
    net::{IpAddr, TcpListener, TcpStream},
    sync::Arc,
    thread,
    time::Duration,
};

use qudata_testkit::frp::FakeFrpc;

use crate::{forward, proxies::Proxies};

const PATIENCE: Duration = Duration::from_secs(30);
const LONGEST_HEAD: u64 = 64 * 1024;

/// Listens at `address`, as long as the program runs.
pub(crate) fn start(address: IpAddr, proxies: &Arc<Proxies>) -> io::Result<()> {
    let listener = TcpListener::bind((address, FakeFrpc::VHOST_HTTP_PORT))?;
    let proxies = Arc::clone(proxies);
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let proxies = Arc::clone(&proxies);
            // A client that is gone, or no HTTP client: its own affair.
            thread::spawn(move || drop(serve(&stream, &proxies)));
        }
    });
    Ok(())
}

fn serve(public: &TcpStream, proxies: &Proxies) -> io::Result<()> {
    public.set_read_timeout(Some(PATIENCE))?;
    let mut reader = BufReader::new(public);
    let (head, host) = read_head(&mut reader)?;
    let Some(local) = proxies.local_of(&host) else {
        let words = "HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";
        return (&*public).write_all(words.as_bytes());
    };
    let mut local = TcpStream::connect_timeout(&local.into(), PATIENCE)?;
    local.write_all(head.as_bytes())?;
    // What was read together with the head.
    local.write_all(reader.buffer())?;
    public.set_read_timeout(None)?;
    forward::join(public.try_clone()?, local)
}

/// The head as it came, and the host it names without port.
fn read_head(reader: &mut impl BufRead) -> io::Result<(String, String)> {
    let mut reader = reader.take(LONGEST_HEAD);
    let (mut head, mut host) = (String::new(), String::new());
    loop {
        let before = head.len();
        if reader.read_line(&mut head)? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let line = head.get(before..).unwrap_or_default().trim_end();
        if line.is_empty() {
            return Ok((head, host));
        }
        if let Some((name, value)) = line.split_once(':')
            && name.eq_ignore_ascii_case("host")
        {
            value.trim().split(':').next().unwrap_or_default().clone_into(&mut host);
        }
    }
}
