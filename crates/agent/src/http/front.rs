//! One connection, from accept to close. Reads and bounds the first head, lets hyper serve the rest, and closes so that
//! the last answer reaches a caller that is still sending. Called by the accept loops in `mod`.
//!
//! ```text
//! accept ─ no place left ──────────────────────────────► 503 ┐
//!    └─ first head ─ too large, too slow, malformed ───► 4xx ┼─► answer, shut down writing, drain, close
//!         └─ hyper: further requests, each through `call` ───┘
//! ```
//! hyper bounds the heads of later requests on a connection by itself: an idle or slow one is closed after the head
//! deadline, a bad one answered with its status alone.

use std::{
    convert::Infallible,
    future::{Future, poll_fn},
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use axum::{body::Body, extract::Request, response::Response};
use bytes::{Buf, Bytes, BytesMut};
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use qudata_api::ErrorCode;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf},
    sync::watch,
    time::timeout,
};

use super::{auth::Peer, call, error, head, limits::Limits};
use crate::refusal::Refusal;

/// hyper reads at most this much ahead.
const READ_AHEAD: usize = 64 << 10;
/// How much of what a caller still sends is read and thrown away after its last answer.
const DRAIN_BYTES: usize = 8 << 20;

/// A connection's two directions.
pub(super) trait Stream: AsyncRead + AsyncWrite + Unpin + Send + 'static {}
impl<S: AsyncRead + AsyncWrite + Unpin + Send + 'static> Stream for S {}

/// Serves one connection to its end.
pub(super) async fn attend<S: Stream>(mut stream: S, peer: Peer, app: Arc<call::App>) {
    let mut closing = app.closing.clone();
    let first = tokio::select! {
        first = read_head(&mut stream, &app.limits) => first,
        _ = closing.wait_for(|closing| *closing) => return,
    };
    match first {
        Ok(Some(read)) => {
            let limits = app.limits.clone();
            let rewound = Rewound { read, stream };
            close(converse(rewound, peer, app, closing).await, &limits).await;
        }
        Ok(None) => {}
        Err(refusal) => {
            tracing::debug!(peer = peer.kind(), code = ?refusal.code, "a connection was refused");
            app.counters.refused(refusal.code);
            refuse(stream, refusal, &app.limits).await;
        }
    }
}

/// Answers a connection that is not served, and closes it.
pub(super) async fn refuse<S: Stream>(mut stream: S, refusal: Refusal, limits: &Limits) {
    let words = error::raw_last_words(refusal);
    // A caller that takes no answer gets none.
    if let Ok(Ok(())) = timeout(limits.farewell, stream.write_all(&words)).await {
        close(stream, limits).await;
    }
}

/// The bytes up to and past the end of the first head; none when the caller left without a word.
async fn read_head<S: Stream>(stream: &mut S, limits: &Limits) -> Result<Option<Bytes>, Refusal> {
    let reading = async {
        let mut bytes = BytesMut::with_capacity(4096);
        let mut search = head::EndSearch::default();
        loop {
            let count = stream.read_buf(&mut bytes).await;
            // A broken connection gets no answer; one that ended in the middle of a head still can.
            let Ok(count) = count else { return Ok(None) };
            let end = search.advance(&bytes);
            if end.unwrap_or(bytes.len()) > limits.head_bytes {
                let sentence = format!("the request's head is over {} bytes", limits.head_bytes);
                return Err(Refusal::new(ErrorCode::HeaderTooLarge, sentence));
            }
            if let Some(end) = end {
                head::check(bytes.get(..end).unwrap_or_default(), limits)?;
                return Ok(Some(bytes.freeze()));
            }
            match count {
                0 if bytes.is_empty() => return Ok(None),
                0 => return Err(Refusal::new(ErrorCode::MalformedBody, "the request ended within its head")),
                _ => {}
            }
        }
    };
    timeout(limits.head_deadline, reading).await.unwrap_or_else(|_| {
        let seconds = limits.head_deadline.as_secs();
        let sentence = format!("the request's head did not arrive within {seconds} s");
        Err(Refusal::new(ErrorCode::RequestTimeout, sentence))
    })
}

type Answer = Pin<Box<dyn Future<Output = Result<Response<Body>, Infallible>> + Send>>;

/// Lets hyper serve the connection; gives the stream back for a gentle end.
async fn converse<S: Stream>(
    stream: S,
    peer: Peer,
    app: Arc<call::App>,
    mut closing: watch::Receiver<bool>,
) -> S {
    let limits = app.limits.clone();
    let service = service_fn(move |request: Request<Incoming>| -> Answer {
        let (app, peer) = (app.clone(), peer);
        Box::pin(async move { Ok(call::answer(&app, peer, request).await) })
    });
    let mut connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(limits.head_deadline)
        .max_header_size(limits.head_bytes)
        .max_buf_size(READ_AHEAD)
        // A caller may end its own direction and still wait for the answer.
        .half_close(true)
        .serve_connection(TokioIo::new(stream), service);
    let mut told = false;
    loop {
        tokio::select! {
            // Broken and badly continued connections end here as well; there is nobody left to tell.
            ended = poll_fn(|cx| connection.poll_without_shutdown(cx)) => {
                if let Err(error) = ended {
                    tracing::debug!(%error, "a connection ended early");
                }
                break;
            }
            _ = closing.wait_for(|closing| *closing), if !told => {
                told = true;
                Pin::new(&mut connection).graceful_shutdown();
            }
        }
    }
    connection.into_parts().io.into_inner()
}

/// Ends our direction first and reads on for a while: closing with unread bytes makes the kernel reset the connection,
/// and a reset can overtake the answer.
async fn close<S: Stream>(mut stream: S, limits: &Limits) {
    let farewell = async {
        stream.shutdown().await?;
        let mut rest = vec![0; 16 << 10];
        let mut total = 0;
        while total < DRAIN_BYTES {
            match stream.read(&mut rest).await? {
                0 => break,
                count => total += count,
            }
        }
        io::Result::Ok(())
    };
    // How the other side takes its leave is its own affair.
    let _ = timeout(limits.farewell, farewell).await;
}

/// A stream whose first bytes were read already.
struct Rewound<S> {
    read: Bytes,
    stream: S,
}

impl<S: Stream> AsyncRead for Rewound<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.read.is_empty() {
            return Pin::new(&mut self.stream).poll_read(cx, buf);
        }
        let count = self.read.len().min(buf.remaining());
        buf.put_slice(self.read.get(..count).unwrap_or_default());
        self.read.advance(count);
        Poll::Ready(Ok(()))
    }
}

impl<S: Stream> AsyncWrite for Rewound<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
