//! Looks for frps from outside while there is no session with it. frpc itself waits up to 20 s between two tries; when
//! frps is back, the one who knows can have it try at once. Called by `rounds`.
//!
//! A connection is held open: that it breaks tells that frps was restarted, however quickly.

use std::time::Duration;

use tokio::{
    io::AsyncReadExt,
    net::TcpStream,
    sync::watch,
    task::JoinSet,
    time::{Instant, sleep, timeout},
};

/// How long frps may take to accept.
const CONNECT_DEADLINE: Duration = Duration::from_secs(3);
/// Between two tries.
const RETRY: Duration = Duration::from_millis(500);
/// frps closes a connection on which nobody speaks for 10 s (`connReadTimeout`); ours is changed before.
const HOLD: Duration = Duration::from_secs(8);

/// A look-out. Ends when dropped.
#[derive(Debug)]
pub(crate) struct Beacon {
    appeared: watch::Receiver<Option<Instant>>,
    _look_out: JoinSet<()>,
}

impl Beacon {
    /// Starts to look for whoever listens at `host` and `port`.
    pub(crate) fn light(host: String, port: u16) -> Self {
        let (tell, appeared) = watch::channel(None);
        let mut look_out = JoinSet::new();
        look_out.spawn(watch_for(host, port, tell));
        Self { appeared, _look_out: look_out }
    }

    /// Since when frps has been there, if it is known to be.
    pub(crate) fn appeared(&self) -> Option<Instant> {
        *self.appeared.borrow()
    }
}

async fn watch_for(host: String, port: u16, tell: watch::Sender<Option<Instant>>) {
    loop {
        match timeout(CONNECT_DEADLINE, TcpStream::connect((host.as_str(), port))).await {
            Ok(Ok(stream)) => {
                tell.send_if_modified(|since| since.is_none() && since.replace(Instant::now()).is_none());
                if stays(stream).await {
                    continue;
                }
                tell.send_replace(None);
            }
            Ok(Err(_)) | Err(_) => {
                tell.send_replace(None);
            }
        }
        sleep(RETRY.mul_f64(rand::random_range(0.8..1.2))).await;
    }
}

/// Whether the other side holds the connection for as long as it is held here.
async fn stays(mut stream: TcpStream) -> bool {
    let mut byte = [0; 1];
    // frps never speaks first: whatever comes is the end.
    timeout(HOLD, stream.read(&mut byte)).await.is_err()
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use tokio::net::TcpListener;

    use super::*;

    async fn until(beacon: &Beacon, there: bool) -> Instant {
        let seen = async {
            while beacon.appeared().is_some() != there {
                sleep(Duration::from_millis(5)).await;
            }
        };
        timeout(Duration::from_secs(5), seen).await.unwrap();
        Instant::now()
    }

    #[tokio::test]
    async fn coming_leaving_and_a_quick_restart_are_noticed() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let port = listener.local_addr().unwrap().port();
        drop(listener);
        let beacon = Beacon::light("127.0.0.1".into(), port);
        sleep(Duration::from_millis(50)).await;
        assert_eq!(beacon.appeared(), None);
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, port)).await.unwrap();
        until(&beacon, true).await;
        let first = beacon.appeared().unwrap();
        let (held, _) = listener.accept().await.unwrap();
        // Gone for no time at all.
        drop(held);
        until(&beacon, false).await;
        until(&beacon, true).await;
        assert!(beacon.appeared().unwrap() > first);
        let (held, _) = listener.accept().await.unwrap();
        drop(beacon);
        let mut held = held;
        let end = timeout(Duration::from_secs(5), held.read(&mut [0; 1])).await.unwrap();
        assert_eq!(end.unwrap(), 0, "a dropped look-out holds nothing");
    }
}
