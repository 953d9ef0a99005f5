//! A stream that is watched while something else changes: whether it broke, and its longest silence.

use std::{net::Ipv4Addr, time::Duration};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    sync::watch,
    task::JoinHandle,
    time::Instant,
};

/// What became of a stream.
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct Seen {
    pub(crate) bytes: usize,
    pub(crate) drops: usize,
    pub(crate) longest_gap: Duration,
}

/// A reader that connects again when the stream breaks. Returns when told to.
pub(crate) struct Stream {
    stop: watch::Sender<bool>,
    reader: JoinHandle<Seen>,
}

impl Stream {
    /// Reads from `port`, after having sent `hello`.
    pub(crate) async fn open(port: u16, hello: &'static str) -> Self {
        let (stop, stopped) = watch::channel(false);
        let (ready, mut is_ready) = watch::channel(false);
        let reader = tokio::spawn(read(port, hello, stopped, ready));
        is_ready.wait_for(|ready| *ready).await.unwrap();
        Self { stop, reader }
    }

    pub(crate) async fn close(self) -> Seen {
        self.stop.send_replace(true);
        self.reader.await.unwrap()
    }
}

async fn read(
    port: u16,
    hello: &str,
    mut stopped: watch::Receiver<bool>,
    ready: watch::Sender<bool>,
) -> Seen {
    let mut seen = Seen::default();
    let mut last: Option<Instant> = None;
    let mut buffer = [0; 4096];
    loop {
        let opened = open(port, hello).await;
        let mut lived = false;
        if let Some(mut stream) = opened {
            loop {
                let read = tokio::select! {
                    read = stream.read(&mut buffer) => read.unwrap_or(0),
                    _ = stopped.wait_for(|stop| *stop) => return seen,
                };
                // The answer of frps itself to a request it has no route for is no part of the stream.
                if read == 0 || buffer.starts_with(b"HTTP/1.1 404") {
                    break;
                }
                lived = true;
                let now = Instant::now();
                if let Some(last) = last.replace(now) {
                    seen.longest_gap = seen.longest_gap.max(now - last);
                }
                seen.bytes += read;
                ready.send_replace(true);
            }
        }
        seen.drops += usize::from(lived);
        if *stopped.borrow() {
            return seen;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

async fn open(port: u16, hello: &str) -> Option<TcpStream> {
    let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await.ok()?;
    stream.write_all(hello.as_bytes()).await.ok()?;
    Some(stream)
}
